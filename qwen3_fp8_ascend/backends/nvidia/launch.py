"""Launches: operands checked, the shape chosen, one kernel for a quantization and one for a linear.

A launch allocates, computes shapes on the host and does not wait for the device, so it can be captured in a graph.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch

from qwen3_fp8_ascend.backends.nvidia.counters import counters
from qwen3_fp8_ascend.backends.nvidia.device import chip_of, cores_of
from qwen3_fp8_ascend.backends.triton_host import INTERPRETED, check_current
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, Activation, BlockGrid, ceil_div
from qwen3_fp8_ascend.triton_kernels.nvidia import shapes

BLOCK = DEFAULT_BLOCK.k
DEQUANTIZED_ROWS = 32


@functools.cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch that may begin before the one before it has ended, where the device has such launches."""
    return {"DEPENDENT": True, "launch_pdl": True} if chip_of(device).dependent else {"DEPENDENT": False}


@functools.cache
def kernels() -> Any:
    """The kernels, imported when something is launched, since they need Triton."""
    from qwen3_fp8_ascend.triton_kernels.nvidia import dequantize, grouped_linear, linear, quantize

    types = {torch.float16: linear.tl.float16, torch.bfloat16: linear.tl.bfloat16, torch.float32: linear.tl.bfloat16}
    return SimpleNamespace(
        quantize=quantize.quantize_kernel,
        dequantize=dequantize.dequantize_kernel,
        linear=linear.linear_kernel,
        grouped_linear=grouped_linear.grouped_linear_kernel,
        # numpy knows no bf16, and multiplies fp16 without fp32 sums.
        types=dict.fromkeys(types, linear.tl.float32) if INTERPRETED else types,
    )


def spans_of(grid: BlockGrid, device: torch.device) -> torch.Tensor:
    """First row and end of the rows of each scale row: (scale rows, 2) int32.

    Made on the device: a copy from the host cannot be captured in a graph.
    """
    found, row = [], 0
    for width in grid.widths:
        first = torch.arange(row, row + width, BLOCK, dtype=torch.int32, device=device)
        row += width
        found.append(torch.stack((first, (first + BLOCK).clamp_(max=row)), 1))
    return torch.cat(found)


def is_whole(n: int, scale_rows: int) -> bool:
    """Whether all scale rows have 128 rows of the weight: no shard ends within a block."""
    return n == scale_rows * BLOCK


def quantize(x: torch.Tensor, activation: Activation, codes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of an activation, or their values as the linears want them.

    Shapes: x (m, k) -> codes (m, k) uint8 and scale (m, k_blocks) fp32, or values (m, 128 k_blocks) fp16 and scale
        (k_blocks, m) fp32.
    """
    (m, k), k_blocks = x.shape, ceil_div(x.shape[1], BLOCK)
    if codes:
        out = torch.empty(m, k, dtype=torch.uint8, device=x.device)
        scale = torch.empty(m, k_blocks, dtype=torch.float32, device=x.device)
        return _quantize_into(x, activation, out, scale, (k_blocks, 1))
    out = torch.empty(m, k_blocks * BLOCK, dtype=torch.float16, device=x.device)
    return _quantize_into(x, activation, out, torch.empty(k_blocks, m, dtype=torch.float32, device=x.device), (1, m))


def quantize_aligned(x: torch.Tensor, activation: Activation, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes with room for more tokens, whose codes and scales are zero.

    Shapes: x (m, k), 128 divides k -> codes (rows, k) uint8, scale (k_blocks, rows) fp32; rows >= m.
    """
    (m, k), k_blocks = x.shape, x.shape[1] // BLOCK
    out = torch.empty(rows, k, dtype=torch.uint8, device=x.device)
    scale = torch.empty(k_blocks, rows, dtype=torch.float32, device=x.device)
    out[m:].zero_()
    scale[:, m:].zero_()
    return _quantize_into(x, activation, out, scale, (1, rows))


def _quantize_into(
    x: torch.Tensor, activation: Activation, out: torch.Tensor, scale: torch.Tensor, strides: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch; strides are those of the scales from token to token and from block to block."""
    (m, k), k_blocks = x.shape, ceil_div(x.shape[1], BLOCK)
    groups, warps = (8, 4) if INTERPRETED else shapes.quantize_shape(m * k_blocks)
    kernels().quantize[(ceil_div(m * k_blocks, groups),)](
        x,
        out,
        scale,
        m,
        k,
        x.stride(0),
        out.stride(0),
        k_blocks,
        *strides,
        CODES=out.dtype == torch.uint8,
        UE8M0=activation is Activation.W8A8_UE8M0,
        GROUPS=groups,
        **dependent_launch(x.device),
        num_warps=warps,
    )
    return out, scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor, grid: BlockGrid, dtype: torch.dtype) -> torch.Tensor:
    """codes (n, k) uint8 times their scales: (n, k) `dtype`."""
    check_current("the weight", codes.device)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    scale_rows, k_blocks = grid.scale_shape
    kernels().dequantize[(scale_rows * (BLOCK // DEQUANTIZED_ROWS), k_blocks)](
        codes,
        scale,
        spans_of(grid, codes.device),
        out,
        grid.k,
        k_blocks,
        HARDWARE=chip_of(codes.device).hardware,
        BLOCK_N=DEQUANTIZED_ROWS,
    )
    return out


def _operands(x: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """x as the kernels multiply it, its scales (x itself if there are none), and the arguments that say which."""
    quantized = activation is not Activation.W8A16
    values, scale = quantize(x, activation, codes=False) if quantized else (x, x)
    arguments = {
        "QUANTIZED": quantized,
        "THREE": values.dtype == torch.float32,
        "EVEN_K": values.shape[1] % BLOCK == 0,
        "HARDWARE": chip_of(x.device).hardware,
        "TYPE": kernels().types[values.dtype],
    } | dependent_launch(x.device)
    return values, scale, arguments


def resources(tile: shapes.Tile) -> dict[str, int]:
    """What a program of the tile may take."""
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    return {"num_warps": tile.warps, "num_stages": tile.stages} | limit


@functools.lru_cache(4096)
def _cut(
    m: int, scale_rows: int, n: int, k_blocks: int, device: torch.device, itemsize: int, quantized: bool
) -> shapes.Cut:
    """The table's cut: 12 microseconds of the host to find, in every call that is not in a graph."""
    return shapes.cut_for(m, scale_rows, n, k_blocks, chip_of(device), cores_of(device), itemsize, quantized)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    w_scale: torch.Tensor,
    spans: torch.Tensor,
    activation: Activation,
    bias: torch.Tensor | None,
    cut: shapes.Cut | None = None,
) -> torch.Tensor:
    """x @ W.T + bias.

    Shapes: x (m, k), codes (n, 128 k_blocks) uint8, w_scale (scale rows, k_blocks) fp32, spans (scale rows, 2) int32,
        bias (n,) -> (m, n) in x.dtype. cut: instead of the table's.
    """
    m, (n, (scale_rows, k_blocks)), device = x.shape[0], (codes.shape[0], w_scale.shape), x.device
    values, x_scale, operands = _operands(x, activation)
    cut = cut or _cut(m, scale_rows, n, k_blocks, device, values.itemsize, operands["QUANTIZED"])
    tile, whole = cut.tile, is_whole(n, scale_rows)
    tiles = ceil_div(m, tile.block_m) * scale_rows * (BLOCK // tile.block_n)
    # The interpreter truncates where a device rounds, so it writes fp32.
    out = torch.empty(m, n, dtype=torch.float32 if INTERPRETED else x.dtype, device=device)
    if cut.split_k > 1:
        parts = torch.empty(tiles * cut.split_k * tile.block_m * tile.block_n, dtype=torch.float32, device=device)
        count = counters(tiles, device)
    else:
        parts, count = out, spans  # neither is touched
    kernels().linear[(tiles, cut.split_k)](
        values,
        x_scale,
        codes,
        w_scale,
        spans,
        out if bias is None else bias,
        parts,
        count,
        out,
        m,
        n,
        values.shape[1],
        k_blocks,
        values.stride(0),
        m,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SPLIT_K=cut.split_k,
        W_FIRST=tile.w_first,
        HAS_BIAS=bias is not None,
        WHOLE=whole,
        EVEN_M=m % tile.block_m == 0,
        AHEAD=tile.ahead if whole and tile.ahead <= k_blocks else 0,
        SCALES_EARLY=tile.scales_early,
        **operands,
        **resources(tile),
    )
    return out.to(x.dtype)


def grouped_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    w_scale: torch.Tensor,
    spans: torch.Tensor,
    ends: torch.Tensor,
    activation: Activation,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x @ W.T of each expert for its own rows.

    Shapes: x (m, k), codes (E, n, 128 k_blocks) uint8, w_scale (E, scale rows, k_blocks) fp32, spans (scale rows, 2)
        int32, ends (E,) int64 -> (m, n) `dtype`. Rows behind the last end are not written.
    """
    m, device = x.shape[0], x.device
    (experts, n, _), (_, scale_rows, k_blocks) = codes.shape, w_scale.shape
    values, x_scale, operands = _operands(x, activation)
    # As many tokens in a tile as an expert has on average; one with more takes several passes. K is not split, so the
    # tile is that of weights with enough rows not to need it.
    rows = ceil_div(m, experts)
    tile = shapes.tile_for(rows, shapes.WIDE, chip_of(device), values.itemsize, operands["QUANTIZED"])
    n_tiles = scale_rows * (BLOCK // tile.block_n)
    passes = m // tile.block_m + min(experts, m)  # passes that are not full are one an expert at most
    out = torch.empty(m, n, dtype=torch.float32 if INTERPRETED else dtype, device=device)
    kernels().grouped_linear[(n_tiles * passes,)](
        values,
        x_scale,
        codes,
        w_scale,
        spans,
        ends,
        out,
        m,
        n,
        values.shape[1],
        k_blocks,
        experts,
        scale_rows,
        n_tiles,
        values.stride(0),
        m,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        GROUPS=1 << (experts - 1).bit_length(),
        W_FIRST=tile.w_first,
        WHOLE=is_whole(n, scale_rows),
        SCALES_EARLY=tile.scales_early,
        **operands,
        **resources(tile),
    )
    return out.to(dtype)
