"""Chips by name, and what stands in the way of using one."""

import sys
from types import SimpleNamespace

import pytest

from qwen3_fp8_ascend.backends import soc


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("Ascend910B1", "A2"),
        ("Ascend910B4-1", "A2"),
        ("Ascend910_9392", "A3"),
        ("Ascend910_9362", "A3"),
        ("Ascend950PR_9589", "A5"),
        ("Ascend910_9589", "A5"),
        ("Ascend310P3", None),
        ("Ascend910A", None),
        ("", None),
    ],
)
def test_generation_of(name: str, generation: str | None) -> None:
    found = soc.generation_of(name)
    assert (found.name if found else None) == generation


def test_only_a5_multiplies_fp8() -> None:
    assert [g.name for g in soc.GENERATIONS if g.fp8_matmul] == ["A5"]


@pytest.mark.parametrize(
    ("available", "name", "missing"),
    [(False, "", "sees no NPU"), (True, "Ascend310P3", "this NPU is Ascend310P3"), (True, "Ascend910B3", None)],
)
def test_missing_npu(monkeypatch: pytest.MonkeyPatch, available: bool, name: str, missing: str | None) -> None:
    npu = SimpleNamespace(is_available=lambda: available, get_device_name=lambda: name)
    module = SimpleNamespace(npu=npu, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_npu", module)  # type: ignore[arg-type]
    soc.device_name.cache_clear()
    try:
        reason = soc.missing_npu()
        assert (reason is None) if missing is None else (missing in str(reason))
        assert (soc.current_generation() is not None) == (missing is None)
    finally:
        soc.device_name.cache_clear()


def test_a_torch_npu_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("libhccl.so:\n cannot open shared object file")

    monkeypatch.setattr(soc.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(soc, "device_name", broken)
    assert soc.missing_npu() == "torch_npu does not load: libhccl.so: cannot open shared object file"
