"""A pytest plugin under which vLLM-Ascend's own unit tests run here, with or without this package registered.

Their conftest replaces what needs an NPU by mocks, and takes torchvision for granted, whose builds for CUDA do not load
beside CPU torch: it becomes a mock too, for whatever imports it without asking. With REGISTER_BLOCK_FP8=1 this package
is registered before tests are collected.
"""

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

MOCKED = "torchvision"


class MockFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.partition(".")[0] != MOCKED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = MagicMock()
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


# transformers asks once, and finds it absent.
importlib.import_module("transformers.models.auto.image_processing_auto")
sys.meta_path.insert(0, MockFinder())


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
