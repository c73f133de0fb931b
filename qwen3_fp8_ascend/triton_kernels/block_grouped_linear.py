"""y = a @ W.T with block scales, each expert's weight for its own rows of a, in one launch.

`block_linear_kernel`'s tile over one flat index of (expert, tile). Who has how many rows is known on the device alone:
every program walks the list of ends and takes its share of the tiles, so the host asks for nothing and the grid is
fixed. Rows of different experts stand close together: a tile reads beyond its expert's last row, and does not write
there.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from qwen3_fp8_ascend.triton_kernels.block_linear import block_linear_specification
from qwen3_fp8_ascend.triton_kernels.lanes import LANE_BLOCK, decode_lane, half_selector

BLOCK = tl.constexpr(LANE_BLOCK)


@triton.jit
def block_grouped_linear_kernel(
    a_ptr,
    a_scale_ptr,
    lanes_ptr,
    w_scale_ptr,
    ends_ptr,
    out_ptr,
    m,
    m_padded,
    n,
    k_blocks,
    groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEEPS_SUBNORMALS: tl.constexpr,
    DOT: tl.constexpr,
    CORES: tl.constexpr,
):
    """Rows [ends[g - 1], ends[g]) of a, times the weight of group g.

    Shapes: a (m_padded, 128 k_blocks) fp16, a_scale (k_blocks, m_padded) fp32, lanes (groups, k_blocks / 2, n, 128)
        int16, w_scale (groups, k_blocks, n) fp32, ends (groups,) int64 -> out (m, n), any floating type.
        BLOCK_N divides n; m_padded >= m + BLOCK_M - 1.
    Semantics: `block_grouped_linear_specification`. Rows behind the last end are not written. A list that decreases, or
        goes beyond m, is cut so that nothing outside the operands is touched.
        A group's weight may begin anywhere in 64 bits; offsets within one group's are 32 bits wide.
    """
    n_tiles = n // BLOCK_N
    column = tl.arange(0, BLOCK)
    core = tl.program_id(0)
    passed = 0  # tiles of the groups before
    end = 0
    for group in range(0, groups):
        first = end
        end = tl.minimum(tl.maximum(tl.load(ends_ptr + group).to(tl.int32), first), m)
        tiles = tl.cdiv(end - first, BLOCK_M) * n_tiles
        group_lanes = lanes_ptr + tl.cast(group, tl.int64) * ((k_blocks // 2) * n * BLOCK)
        group_scale = w_scale_ptr + tl.cast(group, tl.int64) * (k_blocks * n)
        # Tiles go round the cores without a seam between groups. A step counts the tiles of all groups: upstream Triton
        # 3.6 takes a variable of the outer loop that only bounds the inner one for dead, and every group would begin
        # at the first core (its pass `tritongpu-remove-layout-conversions`; right in 3.9 and in triton-ascend 3.2).
        for step in range(passed + (core + CORES - passed % CORES) % CORES, passed + tiles, CORES):
            tile = step - passed
            m_row = first + (tile // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
            n_row = (tile % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k_block in range(0, k_blocks):
                lane = tl.load(group_lanes + ((k_block // 2) * n + n_row)[:, None] * BLOCK + column[None, :])
                w = decode_lane(lane * half_selector(k_block), KEEPS_SUBNORMALS)
                a = tl.load(a_ptr + m_row[:, None] * (k_blocks * BLOCK) + (column + k_block * BLOCK)[None, :])
                a_scale = tl.load(a_scale_ptr + k_block * m_padded + m_row)
                w_scale = tl.load(group_scale + k_block * n + n_row)
                acc += (tl.dot(a.to(DOT), tl.trans(w.to(DOT))) * a_scale[:, None]) * w_scale[None, :]
            to = out_ptr + m_row[:, None] * n + n_row[None, :]
            tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=m_row[:, None] < end)
        passed += tiles


def block_grouped_linear_specification(
    a: torch.Tensor, a_scale: torch.Tensor, lanes: torch.Tensor, w_scale: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """What `block_grouped_linear_kernel` computes, in fp64; zero behind the last end.

    Shapes: as the kernel's -> (m_padded, n) fp64.
    """
    out = torch.zeros(a.shape[0], w_scale.shape[-1], dtype=torch.float64, device=a.device)
    first = 0
    for group, end in enumerate(ends.tolist()):
        rows = slice(first, end)
        scales = a_scale[:, rows].contiguous()
        out[rows] = block_linear_specification(a[rows], scales, lanes[group], w_scale[group], 1)[0]
        first = end
    return out
