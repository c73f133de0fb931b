"""y = a @ W.T with block scales, the weight decoded from lanes on the vector cores and multiplied on the cube.

Two ways to apply the scales. Exact: each K block's product leaves the cube, is scaled in fp32 and added up in fp32.
Folded: both scales go into the activation, which is rounded to fp16 again, and the cube adds up over all of K.
Every tensor is padded to whole tiles, so neither kernel has a mask. Which is used when: docs/triton.md.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from qwen3_fp8_ascend.triton_kernels.lanes import (
    LANE_BLOCK,
    decode_lane,
    decode_lane_specification,
    half_selector,
)

BLOCK = tl.constexpr(LANE_BLOCK)


@triton.jit
def block_linear_kernel(
    a_ptr,
    a_scale_ptr,
    lanes_ptr,
    w_scale_ptr,
    out_ptr,
    m_tiles,
    n_tiles,
    k_blocks,
    BLOCK_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    FOLDED: tl.constexpr,
    KEEPS_SUBNORMALS: tl.constexpr,
    DOT: tl.constexpr,
    CORES: tl.constexpr,
):
    """Partial sums of a @ W.T over SPLIT_K stretches of K.

    Shapes: a (BLOCK_M m_tiles, 128 k_blocks) fp16, a_scale (k_blocks, BLOCK_M m_tiles) fp32,
        lanes (n_tiles, k_blocks / 2, 128, 128) int16, w_scale (n_tiles, k_blocks) fp32
        -> out (SPLIT_K, BLOCK_M m_tiles, 128 n_tiles), any floating type.
    Semantics: `block_linear_specification`; DOT is the operands' type in the cube. FOLDED wants a_scale and
        w_scale of at most about 1, so that what it rounds to fp16 stays in range.
    """
    m = m_tiles * BLOCK_M
    n = n_tiles * BLOCK
    k = k_blocks * BLOCK
    blocks_per_split = tl.cdiv(k_blocks, SPLIT_K)
    column = tl.arange(0, BLOCK)
    for step in range(tl.program_id(0), m_tiles * n_tiles * SPLIT_K, CORES):
        split = step % SPLIT_K
        tile = step // SPLIT_K
        m_tile = tile // n_tiles
        n_tile = tile % n_tiles
        row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        first = split * blocks_per_split
        acc = tl.zeros((BLOCK_M, BLOCK), tl.float32)
        for k_block in range(first, tl.minimum(first + blocks_per_split, k_blocks)):
            lane = tl.load(
                lanes_ptr
                + (n_tile * (k_blocks // 2) + k_block // 2) * (BLOCK * BLOCK)
                + column[:, None] * BLOCK
                + column[None, :]
            )
            w = decode_lane(lane * half_selector(k_block), KEEPS_SUBNORMALS)
            a = tl.load(a_ptr + row[:, None] * k + (k_block * BLOCK + column)[None, :])
            a_scale = tl.load(a_scale_ptr + k_block * m + row)
            w_scale = tl.load(w_scale_ptr + n_tile * k_blocks + k_block)
            if FOLDED:
                scaled = (a.to(tl.float32) * a_scale[:, None]) * w_scale
                acc = tl.dot(scaled.to(tl.float16).to(DOT), tl.trans(w.to(DOT)), acc)
            else:
                acc += (tl.dot(a.to(DOT), tl.trans(w.to(DOT))) * a_scale[:, None]) * w_scale
        tl.store(
            out_ptr + (split * m + row)[:, None] * n + (n_tile * BLOCK + column)[None, :],
            acc.to(out_ptr.dtype.element_ty),
        )


def block_linear_specification(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    lanes: torch.Tensor,
    w_scale: torch.Tensor,
    split_k: int,
    folded: bool,
) -> torch.Tensor:
    """What `block_linear_kernel` computes, in fp64; a kernel may differ by its fp32 additions alone.

    Shapes: as the kernel's -> (split_k, m, n) fp64.
    """
    n_tiles, pairs = lanes.shape[:2]
    m, k_blocks = a.shape[0], 2 * pairs
    out = torch.zeros(split_k, m, n_tiles * LANE_BLOCK, dtype=torch.float64)
    blocks_per_split = -(-k_blocks // split_k)
    for k_block in range(k_blocks):
        lane = lanes[:, k_block // 2].reshape(-1, LANE_BLOCK)
        w = decode_lane_specification(lane if k_block % 2 else lane << 8)
        x = a[:, k_block * LANE_BLOCK : (k_block + 1) * LANE_BLOCK].float()
        rows, columns = a_scale[k_block][:, None], w_scale[:, k_block].repeat_interleave(LANE_BLOCK)
        for n_tile in range(n_tiles):
            at = slice(n_tile * LANE_BLOCK, (n_tile + 1) * LANE_BLOCK)
            if folded:
                part = ((x * rows) * w_scale[n_tile, k_block]).to(torch.float16).double() @ w[at].double().T
            else:
                part = (x.double() @ w[at].double().T) * rows.double() * columns[at].double()
            out[k_block // blocks_per_split, :, at] += part
    return out
