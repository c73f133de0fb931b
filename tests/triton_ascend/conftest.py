"""Everything here needs triton-ascend and the wheels of ascendnpu-ir: `make test-triton-ascend`."""

import importlib.util
from pathlib import Path

import pytest
import torch


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton-ascend is not installed here"
    if importlib.util.find_spec("triton.backends.ascend") is None:
        return "this is upstream Triton, not triton-ascend"
    return None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    # These modules import triton-ascend's internals at the top; test_environment.py alone says why they are not here.
    if _missing() and collection_path.name not in ("test_environment.py", "triton_ascend"):
        return True
    return None


@pytest.fixture(scope="session")
def environment_reason() -> str | None:
    return _missing()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
