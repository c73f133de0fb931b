"""The backend for NVIDIA GPUs: how a weight is laid out, and the operators that torch sees."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qwen3_fp8_ascend.backends import grouped, operators
from qwen3_fp8_ascend.backends.nvidia import launch
from qwen3_fp8_ascend.backends.nvidia.device import chip_of, unusable
from qwen3_fp8_ascend.backends.nvidia.launch import BLOCK
from qwen3_fp8_ascend.backends.operators import torch_operator
from qwen3_fp8_ascend.backends.registry import Backend, PackedWeight, default_block_only
from qwen3_fp8_ascend.backends.triton_host import (
    ACTIVATIONS,
    INTERPRETED,
    check_current,
    check_group,
    check_operand,
)
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid, ceil_div


def pack(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, ...]:
    """The codes as they are, their scales, and which rows each scale row is for.

    Shapes: -> codes (n, 128 k_blocks) uint8, zero behind k, scale `grid.scale_shape` fp32, spans (scale rows, 2) int32.
    """
    check_current("the weight", weight.device)
    codes = torch.nn.functional.pad(weight.view(torch.uint8), (0, -grid.k % BLOCK))
    return codes.clone(memory_format=torch.contiguous_format), scale.clone(), launch.spans_of(grid, weight.device)


pack_experts = functools.partial(grouped.pack_experts, pack)


def check_packed(
    where: str, k: int, codes: torch.Tensor, w_scale: torch.Tensor, spans: torch.Tensor, groups: tuple[int, ...] = ()
) -> None:
    """Refuse operands that `pack`, or `pack_experts` for so many groups, did not make.

    Raises:
        BlockFp8Error: names the tensor, its form and the expected one.
    """
    n, scale_rows, k_blocks = codes.shape[-2], w_scale.shape[-2], ceil_div(k, BLOCK)
    operators.check_packed(
        where,
        "nvidia",
        codes=(codes, torch.uint8, (*groups, n, k_blocks * BLOCK)),
        w_scale=(w_scale, torch.float32, (*groups, scale_rows, k_blocks)),
        spans=(spans, torch.int32, (scale_rows, 2)),
    )


def _fake_quantize(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape
    return x.new_empty(m, k, dtype=torch.uint8), x.new_empty(m, ceil_div(k, BLOCK), dtype=torch.float32)


@torch_operator(_fake_quantize)
def nvidia_quantize_activation(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x (m, k) -> codes (m, k) uint8, scale (m, ceil(k / 128)) fp32."""
    check_operand("the activation", x, ACTIVATIONS, x.device)
    return launch.quantize(x, Activation(activation), codes=True)


def quantize_activation(x: torch.Tensor, block_k: int, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    check_group(block_k)
    codes, scale = nvidia_quantize_activation(x, activation.value)
    return codes.view(torch.float8_e4m3fn), scale


def _fake_dequantize(
    codes: torch.Tensor, scale: torch.Tensor, widths: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@torch_operator(_fake_dequantize)
def nvidia_dequantize_weight(
    codes: torch.Tensor, scale: torch.Tensor, widths: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """codes (n, k) uint8 of shards of these widths, times their scales: (n, k) `dtype`."""
    return launch.dequantize(codes, scale, BlockGrid(tuple(widths), codes.shape[1]), dtype)


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid, dtype: torch.dtype) -> torch.Tensor:
    if reason := default_block_only(grid.block):
        raise BlockFp8Error("the backend 'nvidia' cannot dequantize this weight", got=reason)
    out: torch.Tensor = nvidia_dequantize_weight(weight.view(torch.uint8), scale, grid.widths, dtype)
    return out


def fake_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    w_scale: torch.Tensor,
    spans: torch.Tensor,
    activation: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The form of a linear's result."""
    return x.new_empty(x.shape[0], codes.shape[0])


@torch_operator(fake_linear)
def nvidia_block_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    w_scale: torch.Tensor,
    spans: torch.Tensor,
    activation: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ W.T + bias of a packed weight, exact at any number of tokens.

    Shapes: x (m, k), codes, w_scale and spans as `pack` returns them, bias (n,) -> (m, n) in x.dtype.
    activation: an `Activation`'s value.
    """
    check_operand("the activation", x, ACTIVATIONS, codes.device)
    check_packed("nvidia_block_linear", x.shape[1], codes, w_scale, spans)
    return launch.linear(x, codes, w_scale, spans, Activation(activation), bias)


def _fake_grouped_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    w_scale: torch.Tensor,
    spans: torch.Tensor,
    ends: torch.Tensor,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[1], dtype=dtype)


@torch_operator(_fake_grouped_linear)
def nvidia_block_grouped_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    w_scale: torch.Tensor,
    spans: torch.Tensor,
    ends: torch.Tensor,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x @ W.T of packed experts, each for its own rows, which are sorted by expert.

    Shapes: x (m, k), codes and w_scale as `pack_experts` returns them, spans (scale rows, 2), ends (E,) int64
        -> (m, n) `dtype`: x's, or fp32.
    Semantics: only the device knows how many rows an expert has, and nothing here asks.
    """
    check_operand("the activation", x, ACTIVATIONS, codes.device)
    grouped.check_ends(ends, x.shape[0])
    check_packed("nvidia_block_grouped_linear", x.shape[1], codes, w_scale, spans, (ends.shape[0],))
    return launch.grouped_linear(x, codes, w_scale, spans, ends, Activation(activation), dtype)


def linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    return nvidia_block_linear(x, *packed.tensors, activation.value, bias)


def grouped_linear(
    x: torch.Tensor, packed: PackedWeight, ends: torch.Tensor, activation: Activation, dtype: torch.dtype
) -> torch.Tensor:
    codes, w_scale, spans = packed.grouped_tensors
    return nvidia_block_grouped_linear(x, codes, w_scale, spans[0], ends, activation.value, dtype)


def detail() -> str:
    """The line of the table of shapes in use."""
    device = torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
    return chip_of(device).name


BACKEND = Backend(
    name="nvidia",
    summary="Triton kernels for NVIDIA GPUs: the checkpoint's bytes, exact at any number of tokens",
    computes=frozenset(Activation),
    device_types=frozenset({"cuda", "cpu"} if INTERPRETED else {"cuda"}),
    unusable=unusable,
    pack=pack,
    linear=linear,
    quantize_activation=quantize_activation,
    dequantize_weight=dequantize_weight,
    pack_experts=pack_experts,
    grouped_linear=grouped_linear,
    unsupported=default_block_only,
    detail=detail,
    plan=lambda: (("any", "fused kernel, exact"),),
)
