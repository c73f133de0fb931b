"""y = x @ W.T with block scales: the weight as the checkpoint has it, exact products, fp32 sums.

The product of a K block is made by the tensor cores from operands that hold both factors exactly, accumulated in fp32,
scaled, and added up in fp32. FP8 operands would be faster, but Hopper adds their products with about 14 bits.

x                       operands                         scales
quantized (W8A8)        fp16, the values of the codes    token and block, then the weight's block
bf16, fp16 (W8A16)      that dtype                       the weight's block
fp32 (W8A16)            three bf16 that add up to it     the weight's block
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.format import BlockGrid
from qwen3_fp8_ascend.triton_kernels.nvidia.decode import decode
from qwen3_fp8_ascend.triton_kernels.nvidia.dependent import fetch_ahead, wait_for_the_launch_before

_UPPER_HALF = tl.constexpr(-65536)
_EXPONENT = tl.constexpr(0x7F800000)
_QUIET_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def upper_half(x):
    """The upper half of fp32 numbers, cut off, as fp32: what bf16 holds. NaN stays NaN, whatever its payload."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits & _UPPER_HALF, _QUIET_NAN).to(tl.float32, bitcast=True)


@triton.jit
def lower_part(x):
    """What `upper_half` cuts off, exact; nothing of an infinity, since inf - inf is none."""
    infinite = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) == _EXPONENT
    return tl.where(infinite, 0.0, x - upper_half(x))


@triton.jit
def product(x, w, W_FIRST: tl.constexpr, THREE: tl.constexpr, TYPE: tl.constexpr):
    """The product of one K block, fp32.

    Shapes: x (BLOCK_M, 128), w (BLOCK_N, 128) TYPE -> (BLOCK_N, BLOCK_M) if W_FIRST, else (BLOCK_M, BLOCK_N).
    Semantics: W_FIRST makes the tokens the short side of an MMA. THREE: x is fp32 and is cut into three bf16 numbers,
        the smallest of which are added first; 24 bits are three times eight.
    """
    if THREE:
        rest = lower_part(x)
        low = lower_part(rest).to(TYPE)
        middle, high = upper_half(rest).to(TYPE), upper_half(x).to(TYPE)
        if W_FIRST:
            out = tl.dot(w, tl.trans(high), tl.dot(w, tl.trans(middle), tl.dot(w, tl.trans(low))))
        else:
            out = tl.dot(high, tl.trans(w), tl.dot(middle, tl.trans(w), tl.dot(low, tl.trans(w))))
    elif W_FIRST:
        out = tl.dot(w, tl.trans(x.to(TYPE)))
    else:
        out = tl.dot(x.to(TYPE), tl.trans(w))
    return out


@triton.jit
def tile_product(
    x_at,
    token_there,
    x_scale_at,
    x_scale_step,
    codes_at,
    w_scale_at,
    first,
    end,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    W_FIRST: tl.constexpr,
    QUANTIZED: tl.constexpr,
    THREE: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    HARDWARE: tl.constexpr,
    TYPE: tl.constexpr,
    SCALES_EARLY: tl.constexpr,
):
    """A tile of x @ W.T over the K blocks from `first` to `end`: what the dense and the grouped kernel share.

    Shapes: x_at (BLOCK_M, 128) and codes_at (BLOCK_N, 128): where K block 0 of each row is; token_there (BLOCK_M,);
        x_scale_at (BLOCK_M,): where the scales of block 0 are, x_scale_step apart; w_scale_at: the tile's scales
        -> (BLOCK_M, BLOCK_N) fp32.
    SCALES_EARLY: a block's token scales are asked for a block before, and wait in registers; otherwise the sums wait
        for them.
    """
    column = tl.arange(0, 128)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if W_FIRST else (BLOCK_M, BLOCK_N), tl.float32)
    w_scale_next = tl.load(w_scale_at + first)
    x_scale_next = w_scale_next
    if QUANTIZED and SCALES_EARLY:
        x_scale_next = tl.load(x_scale_at + first * x_scale_step, mask=token_there, other=0.0)
    for block in range(first, end):
        w_scale, x_scale = w_scale_next, x_scale_next
        after = tl.minimum(block + 1, end - 1)
        w_scale_next = tl.load(w_scale_at + after)
        if QUANTIZED and SCALES_EARLY:
            x_scale_next = tl.load(x_scale_at + after * x_scale_step, mask=token_there, other=0.0)
        codes = tl.load(codes_at + block * 128)
        if EVEN_K:
            if EVEN_M:
                x = tl.load(x_at + block * 128)
            else:
                x = tl.load(x_at + block * 128, mask=token_there[:, None], other=0.0)
        else:
            inside = token_there[:, None] & (block * 128 + column < k)[None, :]
            x = tl.load(x_at + block * 128, mask=inside, other=0.0)
        part = product(x, decode(codes, HARDWARE, TYPE), W_FIRST, THREE, TYPE)
        if QUANTIZED:
            if not SCALES_EARLY:
                x_scale = tl.load(x_scale_at + block * x_scale_step, mask=token_there, other=0.0)
            # One scale after the other, as the specification has it: their product may leave fp32.
            part = part * (x_scale[None, :] if W_FIRST else x_scale[:, None])
        acc += part * w_scale
    return tl.trans(acc) if W_FIRST else acc


@triton.jit
def weight_rows(spans_ptr, n_tile, n, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr):
    """A tile's rows of the weight, the end of those that it owns, and from where each is read: always from within."""
    span = n_tile // (128 // BLOCK_N)
    first = n_tile * BLOCK_N if WHOLE else tl.load(spans_ptr + 2 * span) + n_tile % (128 // BLOCK_N) * BLOCK_N
    n_end = n if WHOLE else tl.load(spans_ptr + 2 * span + 1)
    n_row = first + tl.arange(0, BLOCK_N)
    return n_row, n_end, (n_row if WHOLE else tl.minimum(n_row, n - 1))


@triton.jit(do_not_specialize=["m", "x_scale_step"])
def linear_kernel(
    x_ptr,
    x_scale_ptr,
    codes_ptr,
    w_scale_ptr,
    spans_ptr,
    bias_ptr,
    parts_ptr,
    counters_ptr,
    out_ptr,
    m,
    n,
    k,
    k_blocks,
    x_stride,
    x_scale_step,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    W_FIRST: tl.constexpr,
    QUANTIZED: tl.constexpr,
    THREE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    HARDWARE: tl.constexpr,
    TYPE: tl.constexpr,
    SCALES_EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One tile of y in one of SPLIT_K stretches of K; the last program of a tile to finish adds its stretches up.

    Grid: (tiles of tokens x tiles of weight rows, SPLIT_K); tiles of tokens vary fastest, so that the programs that
        run at once share tiles of the weight.
    Shapes: x (m, k) in QUANTIZED fp16 values (m, 128 k_blocks), rows x_stride apart; x_scale (k_blocks, m) fp32, rows
        x_scale_step apart; codes (n, 128 k_blocks) uint8, w_scale (scale rows, k_blocks) fp32; spans (scale rows, 2)
        int32, first row and end of each scale row's rows; bias (n,), any floating type; parts
        (tiles, SPLIT_K, BLOCK_M, BLOCK_N) fp32 and counters (tiles,) int32, zero, for SPLIT_K > 1 -> out (m, n), any
        floating type. BLOCK_N divides 128.
    Semantics: `linear_specification`, up to the order of fp32 additions, which is the same in every run: stretches are
        added from the first to the last, whichever program does it. Counters are zero again at the end.
        WHOLE: every shard is a multiple of 128 rows, so that spans need not be looked at. EVEN_M, EVEN_K: BLOCK_M
        divides m, 128 divides k. DEPENDENT: see `dependent`. AHEAD: K blocks of the weight that L2 is asked for before
        the launch before this one has ended, at most k_blocks; 0 without WHOLE.
    """
    m_tiles = tl.cdiv(m, BLOCK_M)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n_tile = tile // m_tiles
    span = n_tile // (128 // BLOCK_N)
    per_split = tl.cdiv(k_blocks, SPLIT_K)
    first = split * per_split
    if DEPENDENT:
        if AHEAD > 0:
            fetch_ahead(codes_ptr, n_tile * BLOCK_N, first, k_blocks, BLOCK_N, AHEAD)
        wait_for_the_launch_before()
    n_row, n_end, codes_row = weight_rows(spans_ptr, n_tile, n, BLOCK_N, WHOLE)
    token = tile % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, 128)
    x_at = x_ptr + token.to(tl.int64)[:, None] * x_stride + column[None, :]
    codes_at = codes_ptr + codes_row.to(tl.int64)[:, None] * (k_blocks * 128) + column[None, :]
    w_scale_at = w_scale_ptr + span * k_blocks
    end = tl.minimum(first + per_split, k_blocks)
    acc = tile_product(
        x_at,
        token < m,
        x_scale_ptr + token,
        x_scale_step,
        codes_at,
        w_scale_at,
        first,
        end,
        k,
        BLOCK_M,
        BLOCK_N,
        W_FIRST,
        QUANTIZED,
        THREE,
        EVEN_M,
        EVEN_K,
        HARDWARE,
        TYPE,
        SCALES_EARLY,
    )
    inside = (token < m)[:, None] & (n_row < n_end)[None, :]
    to = out_ptr + token.to(tl.int64)[:, None] * n + n_row[None, :]
    if SPLIT_K == 1:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n_row, mask=n_row < n_end, other=0.0).to(tl.float32)[None, :]
        tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = parts_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N)
        part += tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(part + split * (BLOCK_M * BLOCK_N), acc, mask=inside)
        tl.debug_barrier()  # all threads' stores come before the one thread's count
        done = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
        if done == SPLIT_K - 1:
            # Not by the first-level cache, which may hold what was there before.
            total = tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT_K):
                total += tl.load(part + other * (BLOCK_M * BLOCK_N), mask=inside, other=0.0, cache_modifier=".cg")
            if HAS_BIAS:
                total += tl.load(bias_ptr + n_row, mask=n_row < n_end, other=0.0).to(tl.float32)[None, :]
            tl.store(to, total.to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(counters_ptr + tile, 0)


def linear_specification(
    x: torch.Tensor, x_scale: torch.Tensor | None, codes: torch.Tensor, w_scale: torch.Tensor, grid: BlockGrid
) -> torch.Tensor:
    """What `linear_kernel` computes, in fp64 and without a bias.

    Shapes: x (m, k), x_scale (k_blocks, m) or None, codes (n, 128 k_blocks) uint8, w_scale `grid.scale_shape`
        -> (m, n) fp64.
    """
    rows = reference.row_scales(w_scale, grid).double()
    weight = codes.view(torch.float8_e4m3fn).double()
    out = torch.zeros(x.shape[0], grid.n, dtype=torch.float64, device=x.device)
    for block in range(rows.shape[1]):
        columns = slice(128 * block, min(128 * (block + 1), x.shape[1]))
        part = (x[:, columns].double() @ weight[:, columns].T) * rows[:, block]
        out += part if x_scale is None else part * x_scale[block].double()[:, None]
    return out
