"""y = a @ W.T with block scales, the weight decoded from lanes on the vector cores and multiplied on the cube.

Each K block's product leaves the cube, is scaled in fp32 and added up in fp32. What was decided against, scales that
are folded into the activation, is benchmarks/triton_folded.py; the numbers are in docs/triton.md.
Every tensor is padded to whole tiles, so the kernel has no mask.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from qwen3_fp8_ascend.triton_kernels.lanes import LANE_BLOCK, decode_lane, half_selector, unpack_lanes

BLOCK = tl.constexpr(LANE_BLOCK)


@triton.jit
def block_linear_kernel(
    a_ptr,
    a_scale_ptr,
    lanes_ptr,
    w_scale_ptr,
    out_ptr,
    m,
    n,
    k_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    KEEPS_SUBNORMALS: tl.constexpr,
    DOT: tl.constexpr,
    CORES: tl.constexpr,
):
    """Partial sums of a @ W.T over SPLIT_K stretches of K, exact but for the fp32 additions.

    Shapes: a (m, 128 k_blocks) fp16, a_scale (k_blocks, m) fp32, lanes (k_blocks / 2, n, 128) int16,
        w_scale (k_blocks, n) fp32 -> out (SPLIT_K, m, n), any floating type.
        BLOCK_M divides m, BLOCK_N divides n.
    Semantics: `block_linear_specification`. Rows have scales of their own, so that merged shards of any width
        need no padding between them. DOT is the operands' type in the cube; e4m3 values are exact in fp16.
    """
    n_tiles = n // BLOCK_N
    blocks_per_split = tl.cdiv(k_blocks, SPLIT_K)
    column = tl.arange(0, BLOCK)
    for step in range(tl.program_id(0), (m // BLOCK_M) * n_tiles * SPLIT_K, CORES):
        split = step % SPLIT_K
        tile = step // SPLIT_K
        m_row = (tile // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        n_row = (tile % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        first = split * blocks_per_split
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k_block in range(first, tl.minimum(first + blocks_per_split, k_blocks)):
            lane = tl.load(lanes_ptr + ((k_block // 2) * n + n_row)[:, None] * BLOCK + column[None, :])
            w = decode_lane(lane * half_selector(k_block), KEEPS_SUBNORMALS)
            a = tl.load(a_ptr + m_row[:, None] * (k_blocks * BLOCK) + (column + k_block * BLOCK)[None, :])
            a_scale = tl.load(a_scale_ptr + k_block * m + m_row)
            w_scale = tl.load(w_scale_ptr + k_block * n + n_row)
            acc += (tl.dot(a.to(DOT), tl.trans(w.to(DOT))) * a_scale[:, None]) * w_scale[None, :]
        to = out_ptr + (split * m + m_row)[:, None] * n + n_row[None, :]
        tl.store(to, acc.to(out_ptr.dtype.element_ty))


def block_linear_specification(
    a: torch.Tensor, a_scale: torch.Tensor, lanes: torch.Tensor, w_scale: torch.Tensor, split_k: int
) -> torch.Tensor:
    """What `block_linear_kernel` computes, in fp64.

    Shapes: as the kernel's -> (split_k, m, n) fp64.
    """
    w = unpack_lanes(lanes).view(torch.float8_e4m3fn).double()
    k_blocks, n = w_scale.shape
    out = torch.zeros(split_k, a.shape[0], n, dtype=torch.float64, device=a.device)
    blocks_per_split = -(-k_blocks // split_k)
    for k_block in range(k_blocks):
        k = slice(k_block * LANE_BLOCK, (k_block + 1) * LANE_BLOCK)
        scales = a_scale[k_block].double()[:, None] * w_scale[k_block].double()
        out[k_block // blocks_per_split] += (a[:, k].double() @ w[:, k].T) * scales
    return out
