"""What is chosen on an AArch64 processor: `make test-aarch64` runs this under qemu, as one with bf16 instructions and
as one without."""

from __future__ import annotations

import os
import platform

import pytest
import torch

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import available_backends, cpu, load_backend
from qwen3_fp8_ascend.testing.judges import random_problem

PROCESSOR = os.environ.get("AARCH64_PROCESSOR")
LEVELS = {"max": ("portable", "neon", "neon_bf16"), "neoverse-n1": ("portable", "neon")}
"""qemu's processors; neoverse-n1 is Graviton 2's core, and has what Kunpeng 920 has for these kernels."""

pytestmark = pytest.mark.skipif(PROCESSOR is None, reason="runs under qemu: make test-aarch64")


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    """Loads it, which is not a skip: on this processor it must run."""
    assert load_backend("cpu").unusable() is None


def test_the_emulated_processor_is_another_architecture() -> None:
    assert platform.machine() == "aarch64"


def test_the_best_level_is_what_the_processor_has() -> None:
    assert PROCESSOR is not None
    assert cpu.isas() == LEVELS[PROCESSOR]
    assert cpu.isa() == LEVELS[PROCESSOR][-1]


def test_a_level_of_another_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("amx", *(level for level in cpu.ISAS if level not in cpu.isas())):
        monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, name)
        reason = cpu._choose_isa()
        assert reason is not None and "is not available" in reason and ", ".join(cpu.isas()) in reason
    with pytest.raises(RuntimeError, match="instruction set"):
        torch.ops.qwen3_fp8_ascend.cpu_set_isa(len(cpu.isas()))


def test_the_environment_variable_lowers_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    best = cpu.isa()
    try:
        for name in cpu.isas():
            monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, name)
            assert cpu._choose_isa() is None and cpu.isa() == name
    finally:
        cpu.set_isa(best)


def test_status_and_plan_name_the_level() -> None:
    """What `doctor` prints, and the log line of the automatic choice."""
    (status,) = (status for status in available_backends() if status.name == "cpu")
    assert status.usable and cpu.isa() in str(status)
    packed = ops.pack_weight(*(lambda p: (p.weight, p.scale))(random_problem(1, (40,), 36)))
    assert packed.backend == "cpu"
    assert cpu.BACKEND.plan is not None
    assert all(f"({cpu.isa()})" in how for _, how in cpu.BACKEND.plan())
