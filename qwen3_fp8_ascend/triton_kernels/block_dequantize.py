"""Weights back to bf16, fp16 or fp32: from the checkpoint's codes, and from the packed lanes."""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.triton_kernels.lanes import LANE_BLOCK, decode_lane, unpack_lanes

BLOCK = tl.constexpr(LANE_BLOCK)


@triton.jit
def _mend_nan(value, lane):
    """Puts back the NaN of codes 0x7F and 0xFF, which `decode_lane` takes for +-480."""
    magnitude = (lane >> 8) & 0x7F
    return (value.to(tl.int16, bitcast=True) | (((magnitude + 1) >> 7) * 0x7F80)).to(tl.float16, bitcast=True)


@triton.jit
def block_dequantize_kernel(
    codes_ptr,
    scale_ptr,
    out_ptr,
    n,
    k_blocks,
    ROWS: tl.constexpr,
    KEEPS_SUBNORMALS: tl.constexpr,
    CORES: tl.constexpr,
):
    """code * scale of a plain row-major weight.

    Shapes: codes (n, 128 k_blocks) int8 view of e4m3, scale (ceil(n / 128), k_blocks) fp32
        -> out (n, 128 k_blocks), any floating type. ROWS divides 128.
    Semantics: `block_dequantize_specification`, bit for bit, NaN codes included.
    """
    for tile in range(tl.program_id(0), tl.cdiv(n, ROWS) * k_blocks, CORES):
        row_tile = tile // k_blocks
        k_block = tile % k_blocks
        row = row_tile * ROWS + tl.arange(0, ROWS)
        offset = row[:, None] * (k_blocks * BLOCK) + (k_block * BLOCK + tl.arange(0, BLOCK))[None, :]
        inside = row[:, None] < n
        lane = tl.load(codes_ptr + offset, mask=inside, other=0).to(tl.int16) << 8
        value = _mend_nan(decode_lane(lane, KEEPS_SUBNORMALS), lane).to(tl.float32)
        scale = tl.load(scale_ptr + (row_tile * ROWS // BLOCK) * k_blocks + k_block)
        out = value * scale
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def packed_dequantize_kernel(
    lanes_ptr,
    scale_ptr,
    out_ptr,
    n,
    k_blocks,
    groups,
    ROWS: tl.constexpr,
    KEEPS_SUBNORMALS: tl.constexpr,
    CORES: tl.constexpr,
):
    """code * scale of packed weights: what a prefill needs that multiplies with the stock matmul.

    Shapes: lanes (groups, k_blocks / 2, n, 128) int16, scale (groups, k_blocks, n) fp32 -> out (groups, n,
        128 k_blocks), any floating type. ROWS divides n.
    Semantics: `packed_dequantize_specification` of each group, bit for bit; each lane is read once.
    """
    row_tiles = n // ROWS
    pairs = k_blocks // 2
    for step in range(tl.program_id(0), row_tiles * pairs * groups, CORES):
        pair = step // row_tiles  # of all groups
        row = (step % row_tiles) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        lane = tl.load(lanes_ptr + (pair * n + row)[:, None] * BLOCK + column[None, :])
        even = decode_lane(lane << 8, KEEPS_SUBNORMALS).to(tl.float32)
        odd = decode_lane(lane, KEEPS_SUBNORMALS).to(tl.float32)
        even = even * tl.load(scale_ptr + 2 * pair * n + row)[:, None]
        odd = odd * tl.load(scale_ptr + (2 * pair + 1) * n + row)[:, None]
        out_row = (pair // pairs) * n + row
        to = out_ptr + out_row[:, None] * (k_blocks * BLOCK) + (2 * (pair % pairs) * BLOCK + column)[None, :]
        tl.store(to, even.to(out_ptr.dtype.element_ty))
        tl.store(to + BLOCK, odd.to(out_ptr.dtype.element_ty))


def block_dequantize_specification(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `block_dequantize_kernel` computes.

    Shapes: codes (n, k) int8, scale (ceil(n / 128), ceil(k / 128)) fp32 -> (n, k) `dtype`.
    Source: `qwen3_fp8_ascend.reference.dequantize_weight`.
    """
    return reference.dequantize_weight(codes.view(torch.float8_e4m3fn), scale, dtype=dtype)


def packed_dequantize_specification(lanes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `packed_dequantize_kernel` computes.

    Shapes: lanes (k_blocks / 2, n, 128) int16, scale (k_blocks, n) fp32 -> (n, 128 k_blocks) `dtype`.
    """
    values = unpack_lanes(lanes).view(torch.float8_e4m3fn).float()
    return (values * scale.T.repeat_interleave(LANE_BLOCK, dim=1)).to(dtype)
