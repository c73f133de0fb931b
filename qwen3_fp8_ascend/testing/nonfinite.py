"""NaN and infinities by bit pattern, and activations that hold one: what every backend must treat as specified.

Which NaN an operation makes differs from chip to chip (x86: 0xFFC00000, NVIDIA: 0x7FFFFFFF), and arithmetic on
patterns that is right for one of them may overflow for another. No hypothesis here: the environments in which the
device kernels are tested do not have it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, Activation

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class NonFinite:
    """A bit pattern of a dtype that is NaN or infinite."""

    dtype: torch.dtype
    name: str
    pattern: int

    @property
    def is_nan(self) -> bool:
        return bool(self.value().isnan())

    def value(self) -> torch.Tensor:
        """A tensor of one element that holds the pattern."""
        width = torch.iinfo(BITS[self.dtype]).bits
        signed = self.pattern - (1 << width) if self.pattern >> (width - 1) else self.pattern
        return torch.tensor([signed], dtype=BITS[self.dtype]).view(self.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-{self.name}-{self.pattern:X}"


def _patterns(dtype: torch.dtype) -> list[NonFinite]:
    """The same cases for each dtype. All bits of the exponent are set; the mantissa's top bit makes a NaN quiet."""
    width = torch.iinfo(BITS[dtype]).bits
    mantissa = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[dtype]
    infinity = (1 << (width - 1)) - (1 << mantissa)
    quiet = 1 << (mantissa - 1)
    magnitudes = {
        "quiet": infinity | quiet,
        "quiet-payload": infinity | quiet | 1,
        "quiet-half": infinity | quiet | quiet >> 1,
        "quiet-all": infinity | 2 * quiet - 1,
        "signalling": infinity | 1,
        "signalling-half": infinity | quiet >> 1,
        "signalling-all": infinity | quiet - 1,
        "infinity": infinity,
    }
    if dtype == torch.float32:
        # Where adding half a unit of e4m3's last place leaves int32, and a NaN whose upper half is a bf16 one.
        magnitudes |= {"overflow": 0x7FF80000, "below-overflow": 0x7FF7FFFF, "upper-half": 0x7FC10000}
    if dtype == torch.float16:
        magnitudes |= {"overflow": 0x7FC1, "below-overflow": 0x7FC0}  # the same for 16-bit lanes
    out = []
    for name, magnitude in magnitudes.items():
        out += [NonFinite(dtype, name, magnitude), NonFinite(dtype, f"negative-{name}", magnitude | 1 << (width - 1))]
    return out


NON_FINITE = tuple(case for dtype in BITS for case in _patterns(dtype))
NANS = tuple(case for case in NON_FINITE if case.is_nan)
INFINITIES = tuple(case for case in NON_FINITE if not case.is_nan)

POISONED_ROWS = (1, 2, 4)
"""Rows of `activation` that hold the pattern: in a whole group, in the ragged last one, as all of a group."""


def activation(case: NonFinite, k: int = 300) -> torch.Tensor:
    """Ordinary activations with the pattern in three of the six rows.

    Shapes: -> (6, k) in the case's dtype; k > 256.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, k, generator=generator).to(case.dtype)
    x[1, 130] = x[2, k - 1] = case.value()[0]
    x[4, :128] = case.value()[0]
    # An assignment of a Python number or a cast may quieten a NaN; one tensor into another of its dtype does not.
    assert torch.equal(x.view(BITS[case.dtype])[1, 130], case.value().view(BITS[case.dtype])[0])
    return x


def wrong_quantization(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, activation: Activation = Activation.W8A8
) -> list[str]:
    """What a quantization of `activation` gets wrong; empty if nothing.

    Shapes: x (m, k), codes (m, k) uint8 or e4m3, scale (m, ceil(k / 128)) fp32.
    Semantics: codes as the specification's; scales too, but that any NaN equals any NaN.
    """
    want_codes, want_scale = reference.quantize_activation(x, activation=activation)
    codes, want_codes = codes.view(torch.uint8), want_codes.view(torch.uint8)
    out = []
    if not torch.equal(codes, want_codes):
        row, column = (codes != want_codes).nonzero()[0].tolist()
        got, want = int(codes[row, column]), int(want_codes[row, column])
        out.append(f"code {got:#04x} at ({row}, {column}), expected {want:#04x}")
    if not same_numbers(scale, want_scale):
        out.append(f"scales {scale.tolist()}, expected {want_scale.tolist()}")
    # The specification itself: a group with a NaN is NaN throughout, in codes and scale.
    poisoned = [any(x[row, start : start + DEFAULT_BLOCK.k].isnan()) for row, start in ((1, 128), (2, 256), (4, 0))]
    if any(poisoned):
        parts = (codes[1, 128:256], codes[2, 256:], codes[4, :128])
        if not (all(poisoned) and all((part == reference.NAN_CODE).all() for part in parts)):
            out.append("a group with a NaN has a code that is not NaN")
        if not scale[(1, 2, 4), (1, 2, 0)].isnan().all():
            out.append("a group with a NaN has a scale that is not NaN")
    return out


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal numbers, and NaN where the other is NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def wrong_linear(case: NonFinite, out: torch.Tensor, oracle: torch.Tensor) -> list[str]:
    """What a linear of `activation` gets wrong in its non-finite results; empty if nothing.

    Shapes: out and oracle (6, n); the oracle in fp64.
    Semantics: NaN and infinities of either sign stand where the oracle has them, and nowhere else.
    """
    assert not oracle[list(POISONED_ROWS)].isfinite().any(), "the case poisons no row"
    assert oracle[[0, 3, 5]].isfinite().all()
    differs = [kind(out) != kind(oracle) for kind in (torch.isnan, torch.isposinf, torch.isneginf)]
    wrong = torch.stack(differs).any(0)
    return [
        f"{float(out[r, c])} at ({r}, {c}), expected {float(oracle[r, c])}" for r, c in wrong.nonzero()[:3].tolist()
    ]
