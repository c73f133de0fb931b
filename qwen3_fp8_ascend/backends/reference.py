"""The specification as a backend: any device torch knows, one byte a weight, slow."""

from __future__ import annotations

import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends.registry import Backend, PackedWeight
from qwen3_fp8_ascend.format import Activation, BlockGrid


def _pack(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, ...]:
    return weight.clone(), scale.clone()


def _linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    weight, scale = packed.tensors
    return reference.block_linear(x, weight, scale, bias, activation=activation, grid=packed.grid)


BACKEND = Backend(
    name="reference",
    summary="the specification in plain torch; slow",
    computes=frozenset(Activation),
    device_types=frozenset({"cpu", "cuda"}),
    unusable=lambda: None,
    pack=_pack,
    linear=_linear,
    quantize_activation=reference.quantize_activation,
    dequantize_weight=reference.dequantize_weight,
    by_name_only=lambda: "only when asked for by name: it is the slow specification",
)
