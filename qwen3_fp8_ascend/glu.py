"""What an expert computes between its two linears: act(gate) * up, with bounds where a model has them."""

from __future__ import annotations

import dataclasses
import math
import struct
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from qwen3_fp8_ascend.errors import BlockFp8Error, describe


@dataclass(frozen=True)
class Glu:
    """act(gate) * up, where act is silu or near it, bounded in any of three places; all numbers are rounded to fp32.

    g = min(gate, gate_limit); a = min(g / (1 + exp(-alpha * (g + cubic * g^3))), act_limit); u = up within +-up_limit;
    the product is a * (u + beta). NaN stays NaN.
    Raises:
        BlockFp8Error: a limit or alpha that is not positive, a negative cubic, or a number that fp32 does not have.
    Source: vLLM's `SiluAndMul`, `SiluAndMulWithClamp`, `SwigluStepAndMul`, and `GeluAndMul` with tanh.
    """

    gate_limit: float = math.inf
    act_limit: float = math.inf
    up_limit: float = math.inf
    alpha: float = 1.0
    cubic: float = 0.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            number = _as_fp32(given)
            limit, positive = field.name.endswith("_limit"), field.name not in ("cubic", "beta")
            refused = math.isnan(number) or (math.isinf(number) and not limit)
            if refused or (positive and number <= 0) or (field.name == "cubic" and number < 0):
                raise BlockFp8Error(
                    f"{field.name} of an expert's activation is not a {'positive ' if positive else ''}number of fp32",
                    got=describe(given, 100),
                )
            object.__setattr__(self, field.name, number)

    @classmethod
    def clamped(cls, limit: float, alpha: float = 1.0, beta: float = 0.0) -> Glu:
        """What goes in is bounded: vLLM's `swiglu_limit` (DeepSeek-V4)."""
        return cls(gate_limit=limit, up_limit=limit, alpha=alpha, beta=beta)

    @classmethod
    def step(cls, limit: float) -> Glu:
        """silu is bounded, and not what goes into it: vLLM's `swiglustep` (Step-3.5)."""
        return cls(act_limit=limit, up_limit=limit)

    @property
    def numbers(self) -> tuple[float, float, float, float, float, float]:
        """As an operator takes them."""
        return self.gate_limit, self.act_limit, self.up_limit, self.alpha, self.cubic, self.beta

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The product, in the operands' dtype, which is to be fp32 or fp64. Shapes: any, alike."""
        if self == SILU:
            return silu(gate) * up
        gate = gate.clamp(max=self.gate_limit)
        inner = gate + self.cubic * gate**3 if self.cubic else gate
        act = (gate * torch.sigmoid(self.alpha * inner)).clamp(max=self.act_limit)
        return act * (up.clamp(-self.up_limit, self.up_limit) + self.beta)


def _as_fp32(number: object) -> float:
    """The nearest fp32 number; NaN for what is none, or too large for it."""
    try:
        return float(struct.unpack("f", struct.pack("f", number))[0])
    except (struct.error, OverflowError):
        return math.nan


SILU = Glu()
"""silu(gate) * up without bounds: what almost all models compute."""

GELU_TANH = Glu(alpha=2 * math.sqrt(2 / math.pi), cubic=0.044715)
"""GELU in its approximation by tanh, x / 2 * (1 + tanh(z)), which is x / (1 + exp(-2 z)): Gemma 4."""
