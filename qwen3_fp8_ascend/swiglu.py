"""What an expert computes between its two linears: silu(gate) * up, with bounds where a model has them."""

from __future__ import annotations

import dataclasses
import math
import struct
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from qwen3_fp8_ascend.errors import BlockFp8Error, describe


@dataclass(frozen=True)
class Swiglu:
    """silu(gate) * up, bounded in any of three places; all numbers are rounded to fp32.

    g = min(gate, gate_limit); s = min(g / (1 + exp(-alpha * g)), silu_limit); u = up within +-up_limit;
    the product is s * (u + beta). NaN stays NaN.
    Raises:
        BlockFp8Error: a limit or alpha that is not positive, or a number that fp32 does not have.
    Source: vLLM's `SiluAndMul`, `SiluAndMulWithClamp` and `SwigluStepAndMul`.
    """

    gate_limit: float = math.inf
    silu_limit: float = math.inf
    up_limit: float = math.inf
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            number = _as_fp32(given)
            limit, positive = field.name.endswith("_limit"), field.name != "beta"
            if math.isnan(number) or (positive and number <= 0) or (not limit and math.isinf(number)):
                raise BlockFp8Error(
                    f"{field.name} of an expert's activation is not a {'positive ' if positive else ''}number of fp32",
                    got=describe(given, 100),
                )
            object.__setattr__(self, field.name, number)

    @classmethod
    def clamped(cls, limit: float, alpha: float = 1.0, beta: float = 0.0) -> Swiglu:
        """What goes in is bounded: vLLM's `swiglu_limit` (DeepSeek-V4)."""
        return cls(gate_limit=limit, up_limit=limit, alpha=alpha, beta=beta)

    @classmethod
    def step(cls, limit: float) -> Swiglu:
        """silu is bounded, and not what goes into it: vLLM's `swiglustep` (Step-3.5)."""
        return cls(silu_limit=limit, up_limit=limit)

    @property
    def numbers(self) -> tuple[float, float, float, float, float]:
        """As an operator takes them."""
        return self.gate_limit, self.silu_limit, self.up_limit, self.alpha, self.beta

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The product, in the operands' dtype, which is to be fp32 or fp64. Shapes: any, alike."""
        if self == SILU:
            return silu(gate) * up
        gate = gate.clamp(max=self.gate_limit)
        bounded = (gate * torch.sigmoid(self.alpha * gate)).clamp(max=self.silu_limit)
        return bounded * (up.clamp(-self.up_limit, self.up_limit) + self.beta)


def _as_fp32(number: object) -> float:
    """The nearest fp32 number; NaN for what is none, or too large for it."""
    try:
        return float(struct.unpack("f", struct.pack("f", number))[0])
    except (struct.error, OverflowError):
        return math.nan


SILU = Swiglu()
"""silu(gate) * up without bounds: what almost all models compute."""
