"""The specification as a backend: any device torch knows, one byte a weight, slow."""

from __future__ import annotations

import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends.registry import Backend, PackedWeight
from qwen3_fp8_ascend.format import ShardGrid


def _pack(weight: torch.Tensor, scale: torch.Tensor, grid: ShardGrid) -> tuple[torch.Tensor, ...]:
    return weight.clone(), scale.clone()


def _linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    weight, scale = packed.tensors
    grid = packed.grid
    return reference.block_linear(x, weight, scale, bias, activation=activation, widths=grid.widths, block=grid.block)


def _dequantize(weight: torch.Tensor, scale: torch.Tensor, grid: ShardGrid, dtype: torch.dtype) -> torch.Tensor:
    return reference.dequantize_weight(weight, scale, dtype, widths=grid.widths, block=grid.block)


BACKEND = Backend(
    name="reference",
    summary="the specification in plain torch; slow",
    computes=frozenset({"w8a8", "w8a16"}),
    device_types=frozenset({"cpu", "cuda"}),
    unusable=lambda: None,
    pack=_pack,
    linear=_linear,
    quantize_activation=reference.quantize_activation,
    dequantize_weight=_dequantize,
    by_name_only=lambda: "only when asked for by name: it is the slow specification",
)
