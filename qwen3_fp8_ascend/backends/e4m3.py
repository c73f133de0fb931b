"""e4m3 by integer and fp32 arithmetic alone, for devices that can neither cast nor copy FP8 (Atlas A2 and A3).

Plain torch operations on whole tensors, so they run, trace and are captured in graphs on every device.
"""

from __future__ import annotations

import torch

from qwen3_fp8_ascend.format import AMAX_FLOOR, E4M3_MAX, Activation, ceil_div
from qwen3_fp8_ascend.reference import NAN_CODE, round_up_to_power_of_two

_BIAS_STEP = (127 - 7) << 23
"""fp32's exponent bias less e4m3's, in the exponent's place."""

_SUBNORMAL_UNIT = 2.0**-9


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Values of e4m3 codes.

    Shapes: codes (...) uint8 -> (...) fp32.
    Semantics: exact for every finite code; NaN codes come out as +-480, so look for them first. No fp32 subnormal
        occurs, since vector units may flush those.
    """
    wide = codes.to(torch.int32)
    magnitude = wide & 0x7F
    normal = ((magnitude << 20) + _BIAS_STEP).view(torch.float32)
    value = torch.where(magnitude < 8, magnitude.to(torch.float32) * _SUBNORMAL_UNIT, normal)
    return torch.where(wide > 0x7F, -value, value)


def quantize_values(
    x: torch.Tensor, block_k: int, activation: Activation = Activation.W8A8
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `reference.quantize_activation` makes of x, as fp32 values on the e4m3 grid instead of codes.

    Shapes: x (m, k) bf16/fp16/fp32 -> values (m, ceil(k / block_k), block_k) fp32, padded with zeros, scale
        (m, ceil(k / block_k)) fp32.
    Semantics: bit-identical to the specification, NaN groups included.
    """
    m, k = x.shape
    groups = ceil_div(k, block_k)
    grouped = torch.nn.functional.pad(x.float(), (0, groups * block_k - k)).view(m, groups, block_k)
    scale = grouped.abs().amax(-1).clamp_min(AMAX_FLOOR) / E4M3_MAX
    if activation is Activation.W8A8_UE8M0:
        scale = round_up_to_power_of_two(scale)
    scaled = (grouped / scale.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    return _round_to_grid(scaled), scale


def _round_to_grid(scaled: torch.Tensor) -> torch.Tensor:
    """Round values of at most 448 to e4m3, nearest even. `torch.round` is half to even, steps are powers of two."""
    exponent = (scaled.abs().view(torch.int32) >> 23).clamp_min(127 - 6)
    step = ((exponent - 3) << 23).view(torch.float32)
    inverse = ((2 * 127 + 3 - exponent) << 23).view(torch.float32)
    return torch.where(scaled.isnan(), scaled, torch.round(scaled * inverse) * step)


def encode(values: torch.Tensor) -> torch.Tensor:
    """Codes of values that lie on the e4m3 grid.

    Shapes: values (...) fp32 -> (...) uint8.
    Semantics: NaN becomes 0x7F; the sign of zero is kept.
    """
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude - _BIAS_STEP) >> 20
    subnormal = (values.abs() / _SUBNORMAL_UNIT).nan_to_num(0.0).clamp_max(8.0).to(torch.int32)
    code = torch.where(values.abs() < 8 * _SUBNORMAL_UNIT, subnormal, normal) | torch.where(bits < 0, 0x80, 0)
    return torch.where(values.isnan(), NAN_CODE, code).to(torch.uint8)
