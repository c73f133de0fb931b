"""Weights back to bf16, fp16 or fp32."""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.format import BlockGrid
from qwen3_fp8_ascend.triton_kernels.nvidia.decode import decode_nan


@triton.jit
def dequantize_kernel(
    codes_ptr, scale_ptr, spans_ptr, out_ptr, k, k_blocks, HARDWARE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """code * scale of a row-major weight; a program has BLOCK_N rows of one block.

    Shapes: codes (n, k) uint8, scale (scale rows, k_blocks) fp32, spans (scale rows, 2) int32: first row and end of the
        rows of a scale row -> out (n, k), any floating type. BLOCK_N divides 128.
    Semantics: `dequantize_specification`, bit for bit, NaN codes included.
    """
    k_block = tl.program_id(1)
    span = tl.program_id(0) // (128 // BLOCK_N)
    first = tl.load(spans_ptr + 2 * span) + tl.program_id(0) % (128 // BLOCK_N) * BLOCK_N
    row = first + tl.arange(0, BLOCK_N)
    column = k_block * 128 + tl.arange(0, 128)
    inside = (row < tl.load(spans_ptr + 2 * span + 1))[:, None] & (column < k)[None, :]
    offset = row.to(tl.int64)[:, None] * k + column[None, :]
    value = decode_nan(tl.load(codes_ptr + offset, mask=inside, other=0), HARDWARE)
    out = value * tl.load(scale_ptr + span * k_blocks + k_block)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)


def dequantize_specification(
    codes: torch.Tensor, scale: torch.Tensor, grid: BlockGrid, dtype: torch.dtype
) -> torch.Tensor:
    """What `dequantize_kernel` computes.

    Source: `qwen3_fp8_ascend.reference.dequantize_weight`.
    """
    return reference.dequantize_weight(codes.view(torch.float8_e4m3fn), scale, grid, dtype)
