"""What tests of the CPU backend share: each instruction set in turn, numbers of threads, bits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from qwen3_fp8_ascend.backends import cpu, load_backend
from qwen3_fp8_ascend.format import Activation

REASON = load_backend("cpu").unusable()
needs_cpu_backend = pytest.mark.skipif(REASON is not None, reason=f"cpu backend: {REASON}")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = tuple(Activation)

CAP = os.environ.get(cpu.ENVIRONMENT_VARIABLE)
"""The variable that lowers the backend's instruction set also makes the tests those of such a machine."""

NOT_HERE = "is not here: "


def lacking(name: str) -> str | None:
    """Why tests of an instruction set cannot run, or None."""
    if REASON is not None:
        return f"{name} {NOT_HERE}{REASON}"
    if name not in cpu.isas():
        return f"{name} {NOT_HERE}this machine has {', '.join(cpu.isas())}"
    if CAP and cpu.ISAS.index(name) > cpu.ISAS.index(CAP):
        return f"{name} {NOT_HERE}{cpu.ENVIRONMENT_VARIABLE} caps this run at {CAP}"
    return None


def is_lack(reason: str) -> bool:
    """Whether a test was skipped because the machine lacks an instruction set, as `lacking` says it."""
    return re.search(rf"\b({'|'.join(cpu.ISAS)}) {NOT_HERE}(?!cpu backend)", reason) is not None


ISAS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(lacking(name)), reason=str(lacking(name)))) for name in cpu.ISAS
]
"""Parameters; those this machine lacks are skipped."""


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = cpu.isa()
    cpu.set_isa(name)
    try:
        yield
    finally:
        cpu.set_isa(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers, so that NaN equals itself and the zeros differ."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))
