"""The Triton linear that was decided against, for comparison with `triton_kernels.block_linear` (docs/triton.md).

Both scales go into the activation, which is rounded to fp16 again, and the cube adds up over all of K: less traffic,
more error.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from qwen3_fp8_ascend.triton_kernels.lanes import LANE_BLOCK, decode_lane, half_selector, unpack_lanes

BLOCK = tl.constexpr(LANE_BLOCK)


@triton.jit
def block_linear_folded_kernel(
    a_ptr,
    a_scale_ptr,
    lanes_ptr,
    w_scale_ptr,
    out_ptr,
    m,
    n,
    k_blocks,
    BLOCK_M: tl.constexpr,
    KEEPS_SUBNORMALS: tl.constexpr,
    DOT: tl.constexpr,
    CORES: tl.constexpr,
):
    """a @ W.T with the scales folded into the activation: less traffic, more error. For comparison.

    Shapes: as `block_linear_kernel` with SPLIT_K = 1 and BLOCK_N = 128; each tile of 128 rows has one scale.
    Semantics: `block_linear_folded_specification`. a_scale and w_scale of at most about 1, so that what is
        rounded to fp16 stays in range.
    """
    n_tiles = n // BLOCK
    column = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), (m // BLOCK_M) * n_tiles, CORES):
        m_row = (tile // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        n_row = (tile % n_tiles) * BLOCK + column
        acc = tl.zeros((BLOCK_M, BLOCK), tl.float32)
        for k_block in range(0, k_blocks):
            lane = tl.load(lanes_ptr + ((k_block // 2) * n + n_row)[:, None] * BLOCK + column[None, :])
            w = decode_lane(lane * half_selector(k_block), KEEPS_SUBNORMALS)
            a = tl.load(a_ptr + m_row[:, None] * (k_blocks * BLOCK) + (column + k_block * BLOCK)[None, :])
            a_scale = tl.load(a_scale_ptr + k_block * m + m_row)
            w_scale = tl.load(w_scale_ptr + k_block * n + (tile % n_tiles) * BLOCK)
            scaled = (a.to(tl.float32) * a_scale[:, None]) * w_scale
            acc = tl.dot(scaled.to(tl.float16).to(DOT), tl.trans(w.to(DOT)), acc)
        tl.store(out_ptr + m_row[:, None] * n + n_row[None, :], acc.to(out_ptr.dtype.element_ty))


def block_linear_folded_specification(
    a: torch.Tensor, a_scale: torch.Tensor, lanes: torch.Tensor, w_scale: torch.Tensor
) -> torch.Tensor:
    """What `block_linear_folded_kernel` computes, in fp64 after the one rounding to fp16.

    Shapes: as the kernel's -> (m, n) fp64.
    """
    w = unpack_lanes(lanes).view(torch.float8_e4m3fn).double()
    k_blocks, n = w_scale.shape
    out = torch.zeros(a.shape[0], n, dtype=torch.float64, device=a.device)
    for k_block in range(k_blocks):
        k = slice(k_block * LANE_BLOCK, (k_block + 1) * LANE_BLOCK)
        for first in range(0, n, LANE_BLOCK):
            rows = slice(first, first + LANE_BLOCK)
            scaled = ((a[:, k].float() * a_scale[k_block][:, None]) * w_scale[k_block, first]).to(torch.float16)
            out[:, rows] += scaled.double() @ w[rows, k].T
    return out
