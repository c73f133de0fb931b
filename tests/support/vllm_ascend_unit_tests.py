"""A pytest plugin under which vLLM-Ascend's own unit tests run here, with or without this package registered.

Their conftest replaces what needs an NPU by mocks. With REGISTER_BLOCK_FP8=1 this package is registered before tests
are collected.
"""

import os

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """After their conftest, before their test modules: as early as an engine would load plugins."""
    if os.environ.get("REGISTER_BLOCK_FP8") != "1":
        return
    from vllm.model_executor.layers.quantization import get_quantization_config

    from qwen3_fp8_ascend.vllm_plugin import register

    register()
    registered = get_quantization_config("ascend")
    if registered.__module__ != "qwen3_fp8_ascend.vllm_plugin.ascend":
        raise pytest.UsageError(f"`ascend` is {registered}: this package did not register")
