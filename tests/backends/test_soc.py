"""Chips by name, and what stands in the way of using one."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen3_fp8_ascend import provenance
from qwen3_fp8_ascend.backends import ascendc, registry, soc, torch_npu, triton
from qwen3_fp8_ascend.backends.triton import device as triton_device
from qwen3_fp8_ascend.errors import BlockFp8Error


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
    [
        (False, "", "sees no NPU"),
        (True, "Ascend310P3", "this NPU is Ascend310P3, on which block FP8 has no path"),
        (True, "Ascend910B3", None),
    ],
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
        assert soc.chip_without_path() == (name if "Ascend310" in name else None)
    finally:
        soc.device_name.cache_clear()


PATHS = {
    "Ascend910B3": ("ascendc", "ascendc"),
    "Ascend910B4-1": ("ascendc", "ascendc"),
    "Ascend910_9392": ("ascendc", "ascendc"),
    "Ascend950PR_9589": ("torch_npu", "triton"),
    "Ascend910_9589": ("torch_npu", "triton"),
    "Ascend310P3": None,
    "Ascend310B4": None,
    "Ascend910A": None,
    "Ascend910PremiumA": None,
}
"""What serves W8A8 and W8A16 on a chip where everything is installed; None for a chip without a path."""


@pytest.mark.parametrize("chip", PATHS)
def test_which_backend_a_chip_has(monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    """By the backends' own reasons; only what loads libraries is put aside."""
    npu = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: chip)
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu=npu, __spec__=SimpleNamespace()))  # type: ignore[arg-type]
    operators = SimpleNamespace(**dict.fromkeys(torch_npu.NATIVE_OPERATORS))
    monkeypatch.setattr(torch_npu, "_operators", lambda: operators)
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)

    def kernels() -> str | None:
        generation = soc.current_generation()
        served = generation is not None and generation.name in ascendc.SUPPORTED_GENERATIONS
        return soc.missing_npu() or (None if served else f"not for {soc.device_name()}")

    for backend, unusable in ((ascendc.BACKEND, kernels), (triton.BACKEND, soc.missing_npu)):
        monkeypatch.setitem(registry.LOADED, backend.name, dataclasses.replace(backend, unusable=unusable))
    caches = (soc.device_name, registry.select_backend)
    for cache in caches:
        cache.cache_clear()
    try:
        if PATHS[chip] is not None:
            assert tuple(registry.select_backend(None, "npu", c).name for c in ("w8a8", "w8a16")) == PATHS[chip]
            return
        for name in (None, "ascendc", "torch_npu", "triton"):
            with pytest.raises(BlockFp8Error) as refused:
                registry.select_backend(name, "npu", "w8a8")
            message = str(refused.value)
            assert message.count(f"this NPU is {chip}, on which block FP8 has no path") == 1, message
            for generation in soc.GENERATIONS:
                assert all(f"{prefix}*" in message for prefix in generation.names), message
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.parametrize("kind", [ImportError, OSError, RuntimeError, Exception])
def test_a_torch_npu_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    """torch_npu 2.13.0 raises a plain Exception where ASCEND_HOME_PATH names no folder."""

    def broken() -> None:
        raise kind("libhccl.so:\n cannot open shared object file")

    monkeypatch.setattr(soc.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(soc, "device_name", broken)
    reason = "torch_npu does not load: libhccl.so: cannot open shared object file"
    assert soc.missing_npu() == reason
    assert soc.chip_without_path() is None
    assert soc.current_generation() is None
    assert provenance.npu_name() is None
    monkeypatch.setattr(triton_device, "INTERPRETED", False)
    monkeypatch.setattr(triton_device, "has_triton", lambda: True)
    monkeypatch.setattr(triton_device.torch.cuda, "is_available", lambda: False)
    assert reason in (triton_device.unusable.__wrapped__() or ""), "Triton is there too, as beside triton-ascend"


def test_the_first_failure_is_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with the real torch_npu: a second import says `Rendezvous handler for parallel:// already registered`."""
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys\n"
        "if 'left_behind' in sys.modules: raise RuntimeError('already registered')\n"
        "sys.modules['left_behind'] = sys\n"
        "raise Exception('ASCEND_HOME_PATH does not exist')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("torch_npu", "left_behind"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(soc, "_failures", [])
    soc.device_name.cache_clear()
    try:
        reasons = {soc.missing_npu() for _ in range(3)}
    finally:
        soc.device_name.cache_clear()
        sys.modules.pop("left_behind", None)
    assert reasons == {"torch_npu does not load: ASCEND_HOME_PATH does not exist"}
