"""Launches of the Triton kernels: operands checked, padded to whole tiles, and cut for the device.

A launch allocates, computes shapes on the host and never waits for the device, so it can be captured in a CUDA or ACL
graph.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from qwen3_fp8_ascend.backends import triton_host
from qwen3_fp8_ascend.backends.operators import torch_operator
from qwen3_fp8_ascend.backends.triton.device import chip_of, cores_of, linear_options
from qwen3_fp8_ascend.backends.triton_host import ACTIVATIONS, INTERPRETED, check_group
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, Activation, BlockGrid, BlockSize, ceil_div
from qwen3_fp8_ascend.triton_kernels.configuration import LinearShape, check_index_range, linear_shape

KEEPS_SUBNORMALS_VARIABLE = "QWEN3_FP8_ASCEND_TRITON_SUBNORMALS"
"""1 or 0: whether the device's fp16 arithmetic keeps subnormals; unset, each device is asked once, when first used."""

BLOCK = DEFAULT_BLOCK.k

CODE_VALUES, SCALED, RESIDUAL, CODE_VALUES_UE8M0 = range(4)
"""Kinds of values, as in `triton_kernels.group_quantize`, which needs Triton to be imported."""


@functools.cache
def kernels() -> Any:
    """The kernel modules, imported when something is launched, since they need Triton."""

    from qwen3_fp8_ascend.triton_kernels import (
        block_dequantize,
        block_grouped_linear,
        block_linear,
        group_quantize,
        lanes,
    )

    return SimpleNamespace(
        quantize=group_quantize.group_quantize_kernel,
        values=group_quantize.group_values_kernel,
        dequantize=block_dequantize.block_dequantize_kernel,
        packed_dequantize=block_dequantize.packed_dequantize_kernel,
        linear=block_linear.block_linear_kernel,
        grouped_linear=block_grouped_linear.block_grouped_linear_kernel,
        pack_lanes=lanes.pack_lanes,
        dot_type=block_linear.tl.float32 if INTERPRETED else block_linear.tl.float16,
    )


def check_operand(what: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Refuse what the kernels cannot read, or address.

    Raises:
        BlockFp8Error: as `triton_host.check_operand` and `check_index_range`.
    """
    triton_host.check_operand(what, tensor, dtypes, device)
    check_index_range(what, tensor.numel())


def as_int8(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.int8)


def _fake_quantize(x: torch.Tensor, block_k: int, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape
    return x.new_empty(m, k, dtype=torch.int8), x.new_empty(m, ceil_div(k, block_k), dtype=torch.float32)


@torch_operator(_fake_quantize)
def triton_quantize_activation(x: torch.Tensor, block_k: int, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as int8 (m, k), and scales; the shapes otherwise are those of `Backend.quantize_activation`."""
    check_operand("the activation", x, ACTIVATIONS, x.device)
    check_group(block_k)
    m, k = x.shape
    groups = ceil_div(k, BLOCK)
    padded = torch.nn.functional.pad(x, (0, groups * BLOCK - k)).contiguous()
    check_index_range("the activation", padded.numel())
    codes = torch.empty(padded.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, groups, dtype=torch.float32, device=x.device)
    if m * groups:
        rows = chip_of(x.device.type).quantize_rows
        cores = min(cores_of(x.device.type, x.device.index)[1], ceil_div(m * groups, rows))
        ue8m0 = activation == Activation.W8A8_UE8M0.value
        kernels().quantize[(cores,)](padded, codes, scale, m * groups, UE8M0=ue8m0, ROWS=rows, CORES=cores)
    return codes[:, :k].clone(memory_format=torch.contiguous_format), scale


def quantize_activation(x: torch.Tensor, block_k: int, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = triton_quantize_activation(x, block_k, activation.value)
    return codes.view(torch.float8_e4m3fn), scale


@torch_operator(lambda codes, scale, widths, block_n, block_k, dtype: codes.new_empty(codes.shape, dtype=dtype))
def triton_dequantize_weight(
    codes: torch.Tensor, scale: torch.Tensor, widths: Sequence[int], block_n: int, block_k: int, dtype: torch.dtype
) -> torch.Tensor:
    """codes (n, k) int8 of the grid that the widths and the block make, times their scales."""
    grid = BlockGrid(tuple(widths), codes.shape[1], BlockSize(block_n, block_k))
    check_operand("the weight", codes, (torch.int8,), codes.device)
    check_operand("the weight's scale", scale, (torch.float32,), codes.device)
    k_blocks = ceil_div(grid.k, BLOCK)
    padded = torch.nn.functional.pad(codes, (0, k_blocks * BLOCK - grid.k)).contiguous()
    check_index_range("the weight", padded.numel())
    out = torch.empty(padded.shape, dtype=dtype, device=codes.device)
    chip, device = chip_of(codes.device.type), codes.device
    vector_cores = cores_of(device.type, device.index)[1]
    row = scale_row = 0
    for width, scale_rows in zip(grid.widths, grid.scale_rows, strict=True):
        tiles = ceil_div(width, chip.dequantize_rows) * k_blocks
        if tiles:
            cores = min(vector_cores, tiles)
            kernels().dequantize[(cores,)](
                padded[row : row + width],
                scale[scale_row : scale_row + scale_rows].contiguous(),
                out[row : row + width],
                width,
                k_blocks,
                ROWS=chip.dequantize_rows,
                KEEPS_SUBNORMALS=keeps_subnormals(device.type, device.index),
                CORES=cores,
            )
        row += width
        scale_row += scale_rows
    return out[:, : grid.k].clone(memory_format=torch.contiguous_format)


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid, dtype: torch.dtype) -> torch.Tensor:
    out: torch.Tensor = triton_dequantize_weight(as_int8(weight), scale, grid.widths, *grid.block, dtype)
    return out


def launch_packed_dequantize(lanes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Write the values of a packed weight, or of a layer of experts', into a scratch.

    Shapes: lanes and scale as `pack` or `pack_experts` returns them, out ([E,] n_padded, k_padded), bf16, fp16 or fp32,
        contiguous.
    Semantics: code * scale, rounded once to out's dtype.
    """
    pairs, n, _ = lanes.shape[-3:]
    groups = lanes.shape[0] if lanes.dim() == 4 else 1
    chip, device = chip_of(lanes.device.type), lanes.device
    cores = min(cores_of(device.type, device.index)[1], n // chip.packed_rows * pairs * groups)
    kernels().packed_dequantize[(cores,)](
        lanes,
        scale,
        out,
        n,
        2 * pairs,
        groups,
        ROWS=chip.packed_rows,
        KEEPS_SUBNORMALS=keeps_subnormals(device.type, device.index),
        CORES=cores,
    )


def group_values(x: torch.Tensor, kind: int, k_blocks: int, m_padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp16 values and scales of an activation, padded as the linear kernel wants them."""
    m, k = x.shape
    chip = chip_of(x.device.type)
    padded = torch.nn.functional.pad(x, (0, -k % BLOCK)).contiguous()
    values = torch.empty(m_padded, k_blocks * BLOCK, dtype=torch.float16, device=x.device)
    scale = torch.empty(k_blocks, m_padded, dtype=torch.float32, device=x.device)
    check_index_range("the activation", values.numel())
    rows = chip.value_rows
    cores = min(cores_of(x.device.type, x.device.index)[1], m_padded // rows * k_blocks)
    kernels().values[(cores,)](
        padded, values, scale, m, m_padded, padded.shape[1] // BLOCK, k_blocks, KIND=kind, ROWS=rows, CORES=cores
    )
    return values, scale


def launch_linear(
    values: torch.Tensor,
    a_scale: torch.Tensor,
    lanes: torch.Tensor,
    w_scale: torch.Tensor,
    cut: LinearShape,
    dtype: torch.dtype,
    subnormals: bool,
) -> torch.Tensor:
    """Partial sums of x @ W.T over `cut.split_k` stretches of K.

    Shapes: values, a_scale, lanes and w_scale as the kernel's -> (split_k, m_padded, n_padded), in `dtype` if that is
        all there is to add up, else in fp32.
    """
    k_blocks, n = w_scale.shape
    # The interpreter truncates where a device rounds, so it writes fp32.
    stored = torch.float32 if cut.split_k > 1 or INTERPRETED else dtype
    check_index_range("the output", cut.split_k * cut.m_padded * n)
    out = torch.empty(cut.split_k, cut.m_padded, n, dtype=stored, device=values.device)
    device = values.device
    tiles = cut.m_padded // cut.block_m * (n // cut.block_n) * cut.split_k
    cores = min(cores_of(device.type, device.index)[0], tiles)
    kernels().linear[(cores,)](
        values,
        a_scale,
        lanes,
        w_scale,
        out,
        cut.m_padded,
        n,
        k_blocks,
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        SPLIT_K=cut.split_k,
        KEEPS_SUBNORMALS=subnormals,
        DOT=kernels().dot_type,
        CORES=cores,
        **linear_options(chip_of(device.type), device.type),
    )
    return out


def launch_grouped_linear(
    values: torch.Tensor,
    a_scale: torch.Tensor,
    lanes: torch.Tensor,
    w_scale: torch.Tensor,
    ends: torch.Tensor,
    m: int,
    cut: LinearShape,
    dtype: torch.dtype,
    subnormals: bool,
) -> torch.Tensor:
    """x @ W.T of each expert for its own rows.

    Shapes: values, a_scale, lanes, w_scale and ends as the kernel's -> (m, n_padded) `dtype`. Rows behind the last end
        are not written.
    """
    groups, k_blocks, n = w_scale.shape
    stored = torch.float32 if INTERPRETED else dtype  # as `launch_linear`
    check_index_range("the output", cut.m_padded * n)
    out = torch.empty(m, n, dtype=stored, device=values.device)
    device = values.device
    # Passes that do not fill a tile are one a group at most.
    tiles = (m // cut.block_m + min(groups, m)) * (n // cut.block_n)
    cores = min(cores_of(device.type, device.index)[0], tiles)
    kernels().grouped_linear[(cores,)](
        values,
        a_scale,
        lanes,
        w_scale,
        ends,
        out,
        m,
        cut.m_padded,
        n,
        k_blocks,
        groups,
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        KEEPS_SUBNORMALS=subnormals,
        DOT=kernels().dot_type,
        CORES=cores,
        **linear_options(chip_of(device.type), device.type),
    )
    return out


@functools.cache
def keeps_subnormals(device_type: str, index: int | None) -> bool:
    """Whether this device decodes e4m3 subnormals exactly in the cheaper form.

    What a device is known to do is in its configuration; otherwise the cheaper form decodes all codes on it once,
    through the cube as well, and is used only if every one comes out right. The variable
    `QWEN3_FP8_ASCEND_TRITON_SUBNORMALS` decides instead of either.
    """
    forced = os.environ.get(KEEPS_SUBNORMALS_VARIABLE)
    if forced is not None:
        if forced not in ("0", "1"):
            raise BlockFp8Error(f"{KEEPS_SUBNORMALS_VARIABLE} is 0 or 1", got=repr(forced))
        return forced == "1"
    known = chip_of(device_type).keeps_subnormals
    if known is not None:
        return known
    return probe_subnormals(torch.device(device_type if index is None else f"{device_type}:{index}"))


def probe_subnormals(device: torch.device) -> bool:
    """Multiply all finite codes by 1 with the cheaper form, in both halves of the lanes, and compare on the host."""
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    codes[(codes & 0x7F) == 0x7F] = 0
    weight = codes.view(torch.int8).repeat(2 * BLOCK, 1)  # (256, 256): each row holds every code once
    values = torch.eye(2 * BLOCK, dtype=torch.float16, device=device)
    ones = torch.ones(2, 2 * BLOCK, device=device)
    lanes = kernels().pack_lanes(weight).to(device)
    chip = chip_of(device.type)
    cut = linear_shape(2 * BLOCK, 2 * BLOCK, 2, cores_of(device.type, device.index)[0], chip, True)
    out = launch_linear(values, ones, lanes, ones, cut, torch.float32, subnormals=True)
    return torch.equal(out[0].cpu(), codes.view(torch.float8_e4m3fn).float()[:, None].expand(-1, 2 * BLOCK))
