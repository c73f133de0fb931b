"""The Triton backend: how a weight is laid out, and which launches a linear is."""

from __future__ import annotations

import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends import prefill
from qwen3_fp8_ascend.backends.operators import torch_operator
from qwen3_fp8_ascend.backends.registry import Backend, PackedWeight
from qwen3_fp8_ascend.backends.triton.device import (
    INTERPRETED,
    chip_of,
    cores_of,
    current_device_type,
    unusable,
)
from qwen3_fp8_ascend.backends.triton.launch import (
    ACTIVATIONS,
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
    launch_linear,
    launch_packed_dequantize,
    quantize_activation,
)
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, Activation, BlockGrid, BlockSize, ceil_div
from qwen3_fp8_ascend.triton_kernels.configuration import (
    N_ALIGNMENT,
    check_index_range,
    linear_shape,
)

CODE_KINDS = {Activation.W8A8: CODE_VALUES, Activation.W8A8_UE8M0: CODE_VALUES_UE8M0}
"""The kind of values that x becomes where it is quantized."""

HAND_OVER_ROWS = 64
"""On an NPU, most rows of x for the fused kernel. From 64 rows on the prediction for it is slower than the stock BF16
product (docs/triton.md), since partial products cross L2 with the rows, while the scratch costs one decode."""


def unsupported(block: BlockSize) -> str | None:
    if block != DEFAULT_BLOCK:
        return f"its kernels are written for blocks of {DEFAULT_BLOCK}, not {block}"
    return None


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


def _check_packed(lanes: torch.Tensor, w_scale: torch.Tensor, k: int) -> None:
    """Refuse operands of the operator that `pack` did not make."""
    pairs = ceil_div(k, 2 * BLOCK)
    n = w_scale.shape[-1]
    shapes = {"lanes": (pairs, n, BLOCK), "w_scale": (2 * pairs, n)}
    for (what, shape), tensor, dtype in zip(
        shapes.items(), (lanes, w_scale), (torch.int16, torch.float32), strict=True
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous() or n % N_ALIGNMENT:
            raise BlockFp8Error(
                f"{what} is not a packed weight's",
                where="triton_block_linear",
                expected=f"contiguous {dtype} {shape}, rows a multiple of {N_ALIGNMENT}",
                got=f"{'' if tensor.is_contiguous() else 'strided '}{tensor.dtype} {tuple(tensor.shape)}",
                fix="pass the tensors of ops.pack_weight(..., backend='triton') for this k",
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
    if (kind := CODE_KINDS.get(Activation(activation))) is not None:
        m, k_blocks = x.shape[0], ceil_div(x.shape[1], BLOCK)
        row_tile = chip_of(x.device.type).value_rows
        values, scale = group_values(x, kind, k_blocks, ceil_div(m, row_tile) * row_tile)
        operand, grow = prefill.normalise_groups(values[:m].unflatten(1, (k_blocks, BLOCK)), scale.T[:m], x)
    else:
        operand, grow = prefill.normalise_rows(x)
    return prefill.multiply(operand, weight, n, grow * powers[1], bias, x.dtype)


def _fake_linear(
    x: torch.Tensor,
    lanes: torch.Tensor,
    w_scale: torch.Tensor,
    powers: torch.Tensor,
    n: int,
    activation: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], n)


@torch_operator(_fake_linear)
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
    # fp16 cannot hold fp32 activations: what it loses is multiplied separately.
    kind, exact = CODE_KINDS.get(Activation(activation)), x.dtype == torch.float32
    kinds = (kind,) if kind is not None else (SCALED, RESIDUAL) if exact else (SCALED,)
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


def linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    return triton_block_linear(x, *packed.tensors, packed.n, activation.value, bias)


def plan() -> tuple[tuple[str, str], ...]:
    if current_device_type() != "npu":
        return (("any", "fused kernel, exact"),)
    return (
        (f"m <= {HAND_OVER_ROWS}", "fused kernel, exact"),
        (f"m > {HAND_OVER_ROWS}", prefill.PLAN),
    )


BACKEND = Backend(
    name="triton",
    summary="Triton kernels for Ascend A2/A3/A5 and NVIDIA; never run on an NPU so far",
    computes=frozenset(Activation),
    device_types=frozenset({"npu", "cuda", "cpu"} if INTERPRETED else {"npu", "cuda"}),
    unusable=unusable,
    pack=pack,
    linear=linear,
    quantize_activation=quantize_activation,
    dequantize_weight=dequantize_weight,
    unsupported=unsupported,
    plan=plan,
)
