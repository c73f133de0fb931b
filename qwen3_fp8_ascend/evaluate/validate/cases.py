"""What a step is made of: cases, what a case finds, and what all of them may use."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3_fp8_ascend.backends.registry import Backend, load_backend
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.devices import Device
from qwen3_fp8_ascend.testing.judges import Judgement


@dataclass
class Found(Judgement):
    """`skipped` is the reason why nothing was judged; `values` are facts and figures, without a verdict."""

    skipped: str | None = None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a step works on."""

    device: Device
    seed: int
    backend: Backend | None = None
    activation: Activation = Activation.W8A8
    thorough: bool = True
    """Whether every number of rows, and linears and layers of a real model's size, are worth their time."""

    def seed_of(self, case: str) -> int:
        """A case's own seed: the same whether it runs among others or alone."""
        return (zlib.crc32(case.encode()) ^ self.seed) & 0x7FFFFFFF


@dataclass(frozen=True)
class Case:
    """`run` is given the case's seed. `memory` is what it takes on the device and on the host, in bytes."""

    name: str
    run: Callable[[int], Judgement]
    memory: int = 0


Cases = Callable[[Context], Iterator[Case]]


@dataclass(frozen=True)
class Check:
    """One kind of step. To add one, add it to `plan.CHECKS`.

    seconds: the longest that a step may take.
    each: "machine" for one step, "backend" for one a backend, "arithmetic" for one a backend and what it computes.
    slow: whether backends that the automatic choice passes over (the specification) are judged too.
    lower: whether kernels for lesser processors than this one are judged too.
    all_scales: whether one for each arithmetic includes W8A8 with scales that are powers of two, which is W8A8 but for
        the quantization.
    alone: whether nothing else may run beside it: it times, or fills the device.
    """

    name: str
    cases: Cases
    seconds: float
    each: str = "backend"
    slow: bool = True
    lower: bool = False
    all_scales: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Step:
    """A check of one backend, or of the machine; `environment` is that of its process."""

    name: str
    check: Check
    backend: str | None = None
    activation: Activation | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    thorough: bool = True

    def context(self, device: Device, seed: int) -> Context:
        """What its cases work on."""
        backend = load_backend(self.backend) if self.backend else None
        return Context(device, seed, backend, self.activation or Activation.W8A8, self.thorough)
