"""The specification as a backend: any device torch knows, one byte a weight, slow."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends import grouped
from qwen3_fp8_ascend.backends.registry import Backend, PackedWeight
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid
from qwen3_fp8_ascend.glu import Glu


def pack(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, ...]:
    return weight.clone(), scale.clone()


def linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    weight, scale = packed.tensors
    return reference.block_linear(x, weight, scale, bias, activation=activation, grid=packed.grid)


def pack_experts(
    weights: Iterable[torch.Tensor], scales: torch.Tensor, grid: BlockGrid
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([weight.view(torch.uint8) for weight in weights]).view(torch.float8_e4m3fn), scales.clone()


def grouped_linear(
    x: torch.Tensor, packed: PackedWeight, ends: torch.Tensor, activation: Activation, dtype: torch.dtype
) -> torch.Tensor:
    weights, scales = packed.grouped_tensors
    grouped.check_ends(ends, x.shape[0])
    return reference.grouped_linear(x.to(dtype), weights, scales, ends, activation=activation, grid=packed.grid)


def block_experts(
    x: torch.Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation,
    glu: Glu,
) -> torch.Tensor:
    outside = (topk_ids < -1) | (topk_ids >= w13.groups)
    if x.device.type == "cpu" and bool(outside.any()):
        raise BlockFp8Error(
            "a token is sent to an expert that there is not",
            expected=f"ids from 0 to {w13.groups - 1}, or -1 for none",
            got=int(topk_ids[outside][0]),
        )
    (w13_codes, w13_scale), (w2_codes, w2_scale) = w13.grouped_tensors, w2.grouped_tensors
    return reference.block_experts(
        x,
        w13_codes,
        w13_scale,
        w2_codes,
        w2_scale,
        topk_weights,
        topk_ids,
        activation=activation,
        glu=glu,
        block=w13.grid.block,
    )


BACKEND = Backend(
    name="reference",
    summary="the specification in plain torch; slow",
    computes=frozenset(Activation),
    device_types=frozenset({"cpu", "cuda"}),
    unusable=lambda: None,
    pack=pack,
    linear=linear,
    quantize_activation=reference.quantize_activation,
    dequantize_weight=reference.dequantize_weight,
    pack_experts=pack_experts,
    grouped_linear=grouped_linear,
    block_experts=block_experts,
    by_name_only=lambda: "only when asked for by name: it is the slow specification",
)
