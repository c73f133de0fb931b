"""y = x @ W.T with block scales, each expert's weight for its own rows of x, in one launch."""

# mypy: disallow-untyped-defs=False

import itertools

import torch
import triton
import triton.language as tl

from qwen3_fp8_ascend.format import BlockGrid
from qwen3_fp8_ascend.triton_kernels.nvidia.dependent import wait_for_the_launch_before
from qwen3_fp8_ascend.triton_kernels.nvidia.linear import linear_specification, tile_product, weight_rows


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["m", "x_scale_step"])
def grouped_linear_kernel(
    x_ptr,
    x_scale_ptr,
    codes_ptr,
    w_scale_ptr,
    spans_ptr,
    ends_ptr,
    out_ptr,
    m,
    n,
    k,
    k_blocks,
    groups,
    scale_rows,
    n_tiles,
    x_stride,
    x_scale_step,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    W_FIRST: tl.constexpr,
    QUANTIZED: tl.constexpr,
    THREE: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_K: tl.constexpr,
    HARDWARE: tl.constexpr,
    TYPE: tl.constexpr,
    SCALES_EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Rows [ends[g - 1], ends[g]) of x, times the weight of group g.

    Grid: (n_tiles x passes,): a pass is up to BLOCK_M rows of one group. How many there are is known on the device
        alone: the host starts as many as there can be, m / BLOCK_M and one a group, and those too many end at once.
    Shapes: x, x_scale and spans as `linear_kernel`'s; codes (groups, n, 128 k_blocks) uint8, w_scale
        (groups, scale rows, k_blocks) fp32, ends (groups,) int64 -> out (m, n), any floating type. GROUPS: a power of
        two of at least `groups`.
    Semantics: `grouped_linear_specification`. Rows behind the last end are not written. A list that decreases, or goes
        beyond m, is cut so that nothing outside the operands is touched. K is not split, so a row's sum is the same
        wherever the others go. DEPENDENT: see `dependent`.
    """
    if DEPENDENT:
        wait_for_the_launch_before()
    n_tile = tl.program_id(0) % n_tiles
    pass_ = tl.program_id(0) // n_tiles
    group = tl.arange(0, GROUPS)
    there = group < groups
    ends = tl.minimum(tl.maximum(tl.load(ends_ptr + group, mask=there, other=0), 0), m).to(tl.int32)
    before = tl.load(ends_ptr + group - 1, mask=there & (group > 0), other=0)
    ends = tl.associative_scan(ends, 0, _larger)
    starts = tl.associative_scan(tl.minimum(tl.maximum(before, 0), m).to(tl.int32), 0, _larger)
    passes = tl.where(there, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    passed = tl.cumsum(passes, 0)
    mine = tl.sum((passed <= pass_).to(tl.int32), 0)  # groups whose passes all come before this one
    if mine < groups:
        chosen = group == mine
        end = tl.sum(tl.where(chosen, ends, 0), 0)
        token = tl.sum(tl.where(chosen, starts + (pass_ - passed + passes) * BLOCK_M, 0), 0) + tl.arange(0, BLOCK_M)
        span = n_tile // (128 // BLOCK_N)
        n_row, n_end, codes_row = weight_rows(spans_ptr, n_tile, n, BLOCK_N, WHOLE)
        column = tl.arange(0, 128)
        of_group = codes_ptr + tl.cast(mine, tl.int64) * n * (k_blocks * 128)
        acc = tile_product(
            x_ptr + token.to(tl.int64)[:, None] * x_stride + column[None, :],
            token < end,
            x_scale_ptr + token,
            x_scale_step,
            of_group + codes_row.to(tl.int64)[:, None] * (k_blocks * 128) + column[None, :],
            w_scale_ptr + (tl.cast(mine, tl.int64) * scale_rows + span) * k_blocks,
            0,
            k_blocks,
            k,
            BLOCK_M,
            BLOCK_N,
            W_FIRST,
            QUANTIZED,
            THREE,
            False,
            EVEN_K,
            HARDWARE,
            TYPE,
            SCALES_EARLY,
        )
        to = out_ptr + token.to(tl.int64)[:, None] * n + n_row[None, :]
        tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=(token < end)[:, None] & (n_row < n_end)[None, :])


def grouped_linear_specification(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    codes: torch.Tensor,
    w_scale: torch.Tensor,
    ends: torch.Tensor,
    grid: BlockGrid,
) -> torch.Tensor:
    """What `grouped_linear_kernel` computes, in fp64; zero behind the last end.

    Shapes: as the kernel's -> (m, n) fp64.
    """
    out = torch.zeros(x.shape[0], grid.n, dtype=torch.float64, device=x.device)
    for group, (first, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        scale = None if x_scale is None else x_scale[:, first:end]
        out[first:end] = linear_specification(x[first:end], scale, codes[group], w_scale[group], grid)
    return out
