"""The Triton backend: how a weight is laid out, and which launches a linear is."""

from __future__ import annotations

import functools

import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends import grouped, prefill
from qwen3_fp8_ascend.backends.operators import check_packed, torch_operator
from qwen3_fp8_ascend.backends.registry import Backend, PackedWeight, default_block_only
from qwen3_fp8_ascend.backends.triton.device import chip_of, cores_of, current_device_type, unusable
from qwen3_fp8_ascend.backends.triton.launch import (
    BLOCK,
    CODE_VALUES,
    CODE_VALUES_UE8M0,
    RESIDUAL,
    SCALED,
    as_int8,
    check_operand,
    dequantize_weight,
    group_values,
    keeps_subnormals,
    kernels,
    launch_grouped_linear,
    launch_linear,
    launch_packed_dequantize,
    quantize_activation,
)
from qwen3_fp8_ascend.backends.triton_host import ACTIVATIONS, INTERPRETED
from qwen3_fp8_ascend.format import Activation, BlockGrid, ceil_div
from qwen3_fp8_ascend.triton_kernels.configuration import N_ALIGNMENT, check_index_range, grouped_shape, linear_shape

CODE_KINDS = {Activation.W8A8: CODE_VALUES, Activation.W8A8_UE8M0: CODE_VALUES_UE8M0}
"""The kind of values that x becomes where it is quantized."""

HAND_OVER_ROWS = 64
"""On an NPU, most rows of x for the fused kernel. From 64 rows on the prediction for it is slower than the stock BF16
product (docs/triton.md), since partial products cross L2 with the rows, while the scratch costs one decode. Of
experts, so many on average."""


def pack(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, ...]:
    """Lanes and row scales, padded with zeros to whole tiles; and, at load, the question about subnormals.

    Shapes: -> lanes (k_padded / 256, n_padded, 128) int16, scales (k_padded / 128, n_padded) fp32, the powers of two
        that normalise the weight for many rows (2,) fp32.
    """
    codes = as_int8(weight)
    check_operand("the weight", codes, (torch.int8,), weight.device)
    check_operand("the weight's scale", scale, (torch.float32,), weight.device)
    n_pad = -grid.n % N_ALIGNMENT
    k_pad = -grid.k % (2 * BLOCK)
    check_index_range("the packed weight", (grid.n + n_pad) * (grid.k + k_pad))
    lanes = kernels().pack_lanes(torch.nn.functional.pad(codes, (0, k_pad, 0, n_pad)))
    rows = reference.row_scales(scale, grid).T
    scales = torch.nn.functional.pad(rows, (0, n_pad, 0, 2 * lanes.shape[0] - rows.shape[0])).contiguous()
    keeps_subnormals(weight.device.type, weight.device.index)
    return lanes, scales, prefill.powers_of_weight(scale)


pack_experts = functools.partial(grouped.pack_experts, pack)


def _check_packed(
    lanes: torch.Tensor, w_scale: torch.Tensor, k: int, groups: tuple[int, ...] = (), where: str = "triton_block_linear"
) -> None:
    """Refuse operands of the operator that `pack`, or `pack_experts` for so many groups, did not make."""
    pairs, n = ceil_div(k, 2 * BLOCK), ceil_div(w_scale.shape[-1], N_ALIGNMENT) * N_ALIGNMENT
    check_packed(
        where,
        "triton",
        lanes=(lanes, torch.int16, (*groups, pairs, n, BLOCK)),
        w_scale=(w_scale, torch.float32, (*groups, 2 * pairs, n)),
    )


def through_scratch(
    x: torch.Tensor,
    lanes: torch.Tensor,
    w_scale: torch.Tensor,
    powers: torch.Tensor,
    n: int,
    activation: str,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Decode the weight into a scratch, then the stock product; `prefill` says what is rounded."""
    pairs, rows, _ = lanes.shape
    weight = prefill.scratch(rows, 2 * pairs * BLOCK, x)
    launch_packed_dequantize(lanes, w_scale * powers[0], weight)
    operand, grow = _normalised_operand(x, activation)
    return prefill.multiply(operand, weight, n, grow * powers[1], bias, x.dtype)


def _normalised_operand(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x, quantized first if `activation` says so, as operand of the stock product: (m, k' >= k), (m, 1)."""
    kind = CODE_KINDS.get(Activation(activation))
    if kind is None:
        return prefill.normalise_rows(x)
    m, k_blocks = x.shape[0], ceil_div(x.shape[1], BLOCK)
    row_tile = chip_of(x.device.type).value_rows
    values, scale = group_values(x, kind, k_blocks, ceil_div(m, row_tile) * row_tile)
    return prefill.normalise_groups(values[:m].unflatten(1, (k_blocks, BLOCK)), scale.T[:m], x)


@torch_operator(lambda x, lanes, w_scale, powers, n, *_: x.new_empty(x.shape[0], n))
def triton_block_linear(
    x: torch.Tensor,
    lanes: torch.Tensor,
    w_scale: torch.Tensor,
    powers: torch.Tensor,
    n: int,
    activation: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ W.T + bias of a packed weight.

    Shapes: x (m, k), lanes, w_scale and powers as `pack` returns them, bias (n,) -> (m, n) in x.dtype.
    activation: an `Activation`'s value.
    """
    check_operand("the activation", x, ACTIVATIONS, lanes.device)
    _check_packed(lanes, w_scale, x.shape[1])
    m = x.shape[0]
    k_blocks, n_padded = w_scale.shape
    device = lanes.device
    if device.type == "npu" and m > HAND_OVER_ROWS and k_blocks and prefill.fits(n_padded, k_blocks * BLOCK):
        return through_scratch(x, lanes, w_scale, powers, n, activation, bias)
    subnormals = keeps_subnormals(device.type, device.index)
    cores = cores_of(device.type, device.index)[0]
    cut = linear_shape(m, n_padded, k_blocks, cores, chip_of(device.type), subnormals)
    kinds = _operand_kinds(x, activation)
    # Sums that a bias is still added to are not rounded before: then the kernel writes fp32.
    stored = x.dtype if bias is None else torch.float32
    total: torch.Tensor | None = None
    for kind in kinds:
        values, a_scale = group_values(x, kind, k_blocks, cut.m_padded)
        out = launch_linear(values, a_scale, lanes, w_scale, cut, stored, subnormals)
        part = out[0] if cut.split_k == 1 else out.sum(0)
        total = part if total is None else total + part
    assert total is not None
    total = total[:m, :n]
    if bias is not None:
        total = total + bias.float()
    return total.to(x.dtype).clone(memory_format=torch.contiguous_format)


def _operand_kinds(x: torch.Tensor, activation: str) -> tuple[int, ...]:
    """The fp16 operands whose products add up to that of x; fp16 cannot hold all that unquantized fp32 does."""
    if (kind := CODE_KINDS.get(Activation(activation))) is not None:
        return (kind,)
    return (SCALED, RESIDUAL) if x.dtype == torch.float32 else (SCALED,)


def grouped_through_scratch(
    x: torch.Tensor,
    lanes: torch.Tensor,
    w_scale: torch.Tensor,
    powers: torch.Tensor,
    ends: torch.Tensor,
    n: int,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """All experts' weights, each normalised by its own power of two, in one scratch, and the stock grouped product."""
    experts, pairs, rows, _ = lanes.shape
    weights = prefill.scratch(experts * rows, 2 * pairs * BLOCK, x).view(experts, rows, 2 * pairs * BLOCK)
    launch_packed_dequantize(lanes, w_scale * powers[:, :1, None], weights)
    operand, grow = _normalised_operand(x, activation)
    operand = torch.nn.functional.pad(operand, (0, weights.shape[2] - operand.shape[1]))
    grow = grow * prefill.by_owner(powers[:, 1:], ends, x.shape[0])
    return prefill.multiply_groups(operand, weights, ends, grow, dtype)[:, :n].contiguous()


@torch_operator(lambda x, lanes, w_scale, powers, ends, n, activation, dtype: x.new_empty(x.shape[0], n, dtype=dtype))
def triton_block_grouped_linear(
    x: torch.Tensor,
    lanes: torch.Tensor,
    w_scale: torch.Tensor,
    powers: torch.Tensor,
    ends: torch.Tensor,
    n: int,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x @ W.T of packed experts, each for its own rows, which are sorted by expert.

    Shapes: x (m, k), lanes, w_scale and powers as `pack_experts` returns them, ends (E,) int64 -> (m, n) `dtype`: x's,
        or fp32.
    Semantics: only the device knows how many rows an expert has, and nothing here asks. On an NPU, with more than
        `HAND_OVER_ROWS` on average, the whole layer is decoded into a scratch, where it fits (`prefill`).
    """
    check_operand("the activation", x, ACTIVATIONS, lanes.device)
    grouped.check_ends(ends, x.shape[0])
    experts = ends.shape[0]
    _check_packed(lanes, w_scale, x.shape[1], (experts,), "triton_block_grouped_linear")
    m = x.shape[0]
    _, k_blocks, n_padded = w_scale.shape
    device = lanes.device
    many = m > HAND_OVER_ROWS * experts
    if device.type == "npu" and many and prefill.fits(experts * n_padded, k_blocks * BLOCK):
        return grouped_through_scratch(x, lanes, w_scale, powers, ends, n, activation, dtype)
    subnormals = keeps_subnormals(device.type, device.index)
    cut = grouped_shape(m, experts, chip_of(device.type), subnormals)
    kinds = _operand_kinds(x, activation)
    stored = dtype if len(kinds) == 1 else torch.float32
    total: torch.Tensor | None = None
    for kind in kinds:
        values, a_scale = group_values(x, kind, k_blocks, cut.m_padded)
        part = launch_grouped_linear(values, a_scale, lanes, w_scale, ends, m, cut, stored, subnormals)
        total = part if total is None else total + part
    assert total is not None
    return total[:, :n].to(dtype).contiguous()


def linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    return triton_block_linear(x, *packed.tensors, packed.n, activation.value, bias)


def grouped_linear(
    x: torch.Tensor, packed: PackedWeight, ends: torch.Tensor, activation: Activation, dtype: torch.dtype
) -> torch.Tensor:
    return triton_block_grouped_linear(x, *packed.grouped_tensors, ends, packed.n, activation.value, dtype)


def plan() -> tuple[tuple[str, str], ...]:
    if current_device_type() != "npu":
        return (("any", "fused kernel, exact"),)
    return (
        (f"m <= {HAND_OVER_ROWS}", "fused kernel, exact"),
        (f"m > {HAND_OVER_ROWS}", prefill.PLAN),
    )


BACKEND = Backend(
    name="triton",
    summary="Triton kernels for Ascend A2/A3/A5, which run on NVIDIA too; never run on an NPU so far",
    computes=frozenset(Activation),
    device_types=frozenset({"npu", "cuda", "cpu"} if INTERPRETED else {"npu", "cuda"}),
    unusable=unusable,
    pack=pack,
    linear=linear,
    quantize_activation=quantize_activation,
    dequantize_weight=dequantize_weight,
    pack_experts=pack_experts,
    grouped_linear=grouped_linear,
    unsupported=default_block_only,
    plan=plan,
)
