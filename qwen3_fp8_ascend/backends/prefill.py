"""Many rows on a chip whose matrix unit knows no FP8: the weight decoded once into a scratch, then the stock product.

From some number of rows on, decoding each weight once and multiplying with the stock product beats any fused kernel
(docs/ascendc.md). It is not exact as the fused kernels are: the product takes 16-bit operands.

**Numbers.** Both operands are rounded to fp16 once, after a division by powers of two that brings the largest magnitude
below 1: one power for the whole weight, found when it is packed, and one for each row of x. The product is rounded to
fp16, multiplied by the two powers in fp32, which is exact, and rounded to x.dtype after the bias is added. Operands in
bf16 would cost as much and lose eight times as much: it has 8 significant bits, fp16 11. fp32 activations go the same
way in fp32.

*Overflow.* The normalised weight is at most 0.875 (448 of 512), the normalised activation at most 1, so a sum over k of
their products is at most 0.875 k, in any order: below fp16's 65504 for k up to `MAX_COLUMNS`.
*Small values.* fp16's subnormals end at 2^-24, so an operand keeps a relative 2^-11 or an absolute 2^-25 of its
normalised form, whichever is larger: what is 2^14 times smaller than the largest of its row (of its weight) loses
precision, what is 2^25 times smaller is lost. The product likewise. `judges.PREFILL_FP16` is what follows for results.
*Range.* Exact powers need the largest magnitudes of the row and of the weight to have a product below 2^126; beyond,
a row's results are infinite or NaN. A row with a NaN gives NaN; one with an infinity, infinities of the weights' signs,
but NaN for a weight that is lost.

**Memory.** The scratch is allocated by each call and freed when it returns. PyTorch's allocators give a freed block
back to the stream that used it, or to the graph's own pool while one is captured. So the layers of a stream use one
block in turn, and layers on another stream, with which vLLM-Ascend can overlap them, never get it before it is free
there. Nothing here outlives a call.
"""

from __future__ import annotations

import torch

MAX_WEIGHTS = 1 << 29
"""Elements, 1 GB in the scratch. Larger weights (output heads) keep to the fused kernel: they are asked for few rows,
and the largest linear of a 32B model has half as many."""

MAX_COLUMNS = 65504 * 8 // 7 // 128 * 128
"""Largest k for which no sum of normalised products can overflow fp16, in whole blocks: 74752."""

PLAN = "decoded into a scratch, then the stock fp16 product: rounds its operands, and is slower than BF16 (predicted)"
"""For a backend's `plan`: what becomes of rows beyond its hand-over."""

_FP32_BIAS, _FP32_MANTISSA = 127, 23

_CODE_BITS = 9
"""Magnitudes of e4m3 are below 2^9."""


def fits(rows: int, columns: int) -> bool:
    """Whether a weight of that shape, padding included, may use a scratch at all."""
    return rows * columns <= MAX_WEIGHTS and columns <= MAX_COLUMNS


def scratch_bytes(rows: int, columns: int) -> int:
    """Bytes that a call takes for a weight of that shape, with activations of 16 bits."""
    return rows * columns * torch.float16.itemsize


def scratch(rows: int, columns: int, x: torch.Tensor) -> torch.Tensor:
    """Memory for the normalised weight that x is multiplied with, for the length of one call.

    Shapes: -> (rows, columns) contiguous, not initialised, in the dtype in which the product takes its operands.
    """
    return torch.empty(rows, columns, dtype=operand_dtype(x.dtype), device=x.device)


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of both operands for activations of a dtype."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def powers_of_weight(scale: torch.Tensor) -> torch.Tensor:
    """The power of two that normalises a weight, and its inverse; computed on the scales' device, without waiting.

    Shapes: scale, any shape, fp32, finite and not negative -> (2,) fp32.
    Semantics: |code * scale| * powers[0] <= 0.875 for every code; powers[0] * powers[1] == 1. A weight without scales
        counts as zero.
    """
    largest = scale.amax().view(1) if scale.numel() else scale.new_zeros(1)
    return torch.cat(_powers(largest, _CODE_BITS))


def normalise_groups(values: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An activation that was quantized, as operand of the product.

    Shapes: values (m, g, block), e4m3's in a floating dtype, scale (m, g) fp32 -> operand (m, g * block) in x's operand
        dtype, at most 0.875, and what its rows have to be multiplied by, (m, 1) fp32.
    """
    shrink, grow = _powers(scale.amax(1, keepdim=True), _CODE_BITS)
    return (values * (scale * shrink).unsqueeze(-1)).flatten(1).to(operand_dtype(x.dtype)), grow


def normalise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An activation that stays as it is (W8A16), as operand of the product.

    Shapes: x (m, k) -> operand (m, k) in its operand dtype, at most 1, and what its rows have to be multiplied by,
        (m, 1) fp32.
    """
    shrink, grow = _powers(x.abs().amax(1, keepdim=True).float(), 0)
    return (x * shrink).to(operand_dtype(x.dtype)), grow


def multiply(
    operand: torch.Tensor,
    weight: torch.Tensor,
    n: int,
    grow: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The stock product of normalised operands, taken back to size.

    Shapes: operand (m, k), weight (n' >= n, k' >= k), zeros beyond k, grow (m, 1) fp32, the powers of both operands,
        bias (n,) -> (m, n) `dtype`, contiguous.
    Semantics: dtype(grow * product + bias) with fp32 in between.
    """
    columns = weight.shape[1]
    padded = (
        operand if operand.shape[1] == columns else torch.nn.functional.pad(operand, (0, columns - operand.shape[1]))
    )
    product = stock_product(padded, weight.narrow(0, 0, n))
    if bias is None and dtype == torch.bfloat16:
        # Multiplied by a power of two after the rounding instead of before: the same number, and 2 bytes an element
        # of traffic less each way. bf16 has fp32's exponents.
        return product.to(dtype).mul_(grow.to(dtype))
    out = product * grow
    return (out if bias is None else out + bias.float()).to(dtype)


def stock_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ W.T, summed in fp32 and rounded to the operands' dtype: the chip's own operator, in its own order.

    Shapes: x (m, k), weight (n, k) -> (m, n), all of one dtype.
    """
    return torch.nn.functional.linear(x, weight)


def multiply_groups(
    operand: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor, grow: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`multiply` of each expert for its own rows, which are sorted by expert.

    Shapes: operand (m, k), weights (E, n, k), ends (E,) int64, grow (m, 1) fp32 -> (m, n) `dtype`. Rows behind the last
        end are nobody's, and are anything.
    Semantics: dtype(grow * product) with fp32 in between.
    """
    return (stock_grouped_product(operand, weights, ends) * grow).to(dtype)


def by_owner(powers: torch.Tensor, ends: torch.Tensor, rows: int) -> torch.Tensor:
    """Each row's expert's value. Shapes: powers (E, 1), ends (E,) -> (rows, 1); rows of nobody get the last one's."""
    owner = torch.searchsorted(ends, torch.arange(rows, device=ends.device), right=True)
    return powers.index_select(0, owner.clamp_(max=ends.shape[0] - 1))


def stock_grouped_product(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`stock_product` of each expert for its own rows: the chip's own operator.

    Shapes: x (m, k), weights (E, n, k), ends (E,) int64 -> (m, n), all but ends of one dtype.
    Source: CANN's documentation of aclnnGroupedMatmulV5: groups of rows, a cumulative list, transposed weights.
    """
    (out,) = torch.ops.npu.npu_grouped_matmul(
        [x], [weights.transpose(1, 2)], group_list=ends, split_item=3, group_type=0, group_list_type=0
    )
    product: torch.Tensor = out
    return product


def _powers(largest: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The power of two by which numbers of up to `largest` * 2^bits come below 1, and its inverse.

    Shapes: largest, any shape, fp32, not negative -> two of that shape, fp32.
    Semantics: exponents are moved as integers, since exp2 and log2 of a device need not be exact. Both powers are
        normal numbers: zero, subnormals, infinities and NaN count as the nearest exponent that allows that.
    """
    lift = bits + 1  # largest is below twice its power of two
    exponent = ((largest.view(torch.int32) >> _FP32_MANTISSA) & 0xFF).clamp(1, 2 * _FP32_BIAS - 1 - lift)
    shrink = (2 * _FP32_BIAS - lift - exponent) << _FP32_MANTISSA
    return shrink.view(torch.float32), ((exponent + lift) << _FP32_MANTISSA).view(torch.float32)
