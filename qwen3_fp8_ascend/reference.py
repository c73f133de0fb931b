"""THE SPECIFICATION: what every backend must compute, in plain torch, readable in one sitting.

Slow on purpose. A backend is right when it agrees with these functions: bit for bit in quantization and
dequantization, and in `block_linear` up to the order of fp32 additions.
"""

from __future__ import annotations

import math

import torch

from qwen3_fp8_ascend.format import AMAX_FLOOR, DEFAULT_BLOCK, E4M3_MAX, Activation, BlockGrid, ceil_div

NAN_CODE = 0x7F
"""The one NaN code that quantization produces, whatever the sign of the NaN."""


def quantize_activation(x: torch.Tensor, block_k: int = DEFAULT_BLOCK.k) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each group of `block_k` consecutive channels of a token to e4m3 with an fp32 scale.

    Shapes: x (..., k) bf16/fp16/fp32 -> codes (..., k) float8_e4m3fn, scale (..., ceil(k / block_k)) fp32.
    Semantics: scale = max(amax(|group|), 1e-10) / 448 by true division; code = round-to-nearest-even of
        x / scale (true division), clamped to +-448. A ragged last group uses the channels it has. A NaN
        makes its whole group NaN; an infinity makes the scale infinite, itself NaN and the rest zero.
    Source: ``native_per_token_group_quant_fp8`` of vLLM's tests: byte-identical for finite input in groups whose
        largest magnitude is at least 1e-10. Below, as in groups of zeros, bf16 and fp16 differ: that helper applies the
        floor in the dtype of x. vLLM's ``QuantFP8`` has a higher floor and is byte-identical from 1/512 on.
    """
    k = x.shape[-1]
    groups = ceil_div(k, block_k)
    block_k = min(block_k, max(1, k))  # a group wider than x is x, without padding it
    padded = torch.nn.functional.pad(x.float(), (0, groups * block_k - k))
    grouped = padded.unflatten(-1, (groups, block_k))
    scale = grouped.abs().amax(-1).clamp_min(AMAX_FLOOR) / E4M3_MAX
    scaled = (grouped / scale.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).masked_fill(scaled.isnan(), NAN_CODE)
    return codes.flatten(-2)[..., :k].contiguous().view(torch.float8_e4m3fn), scale


def row_scales(scale: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Repeat each row of block scales for the weight rows it belongs to.

    Shapes: scale `grid.scale_shape` -> (n, ceil(k / block.k)) fp32.
    """
    index = [span.scale_row for span in grid.spans() for _ in range(span.rows)]
    return scale.float().index_select(0, torch.tensor(index, dtype=torch.long, device=scale.device))


def dequantize_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    grid: BlockGrid | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Multiply e4m3 codes by their block's scale.

    Shapes: weight (n, k) float8_e4m3fn, scale `grid.scale_shape` -> (n, k) `dtype`; without a grid, one shard in
        blocks of 128 x 128.
    Semantics: code * scale in fp32, rounded once to `dtype` (nearest even).
    Source: transformers' fine-grained FP8 and compressed-tensors' ``FP8BlockDequantizer``.
    """
    grid = grid or BlockGrid((weight.shape[0],), weight.shape[1])
    scales = row_scales(scale, grid).repeat_interleave(grid.block.k, dim=1)[:, : grid.k]
    return (weight.float() * scales).to(dtype)


def block_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation = Activation.W8A8,
    grid: BlockGrid | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """y = x @ W.T with block scales; W8A8 quantizes x first, W8A16 does not.

    Shapes: x (..., k), weight (n, k) float8_e4m3fn, scale `grid.scale_shape` -> (..., n) in x.dtype; without a grid,
        one shard in blocks of 128 x 128.
    Semantics: per K block, the products of codes are exact and summed in fp32; the partial is multiplied by
        x_scale(m, kb) and w_scale(nb, kb) and added up in fp32; the bias is added in fp32; one cast to x.dtype.
        The bias comes before the cast so that an output is rounded once: to add it to a rounded sum costs a second
        rounding (relative error in bf16 1.65e-3 against 2.48e-3, and far more where the two cancel).
        `compute_dtype=torch.float64` gives the oracle that implementations are judged by
        (it returns float64, not x.dtype).
    Source: vLLM ``native_w8a8_block_matmul``, which has no bias; the bias as in vLLM's CPU operator
        ``fp8_scaled_mm_cpu``. vLLM's other block kernels add it to the rounded sum.
    """
    n, k = weight.shape
    grid = grid or BlockGrid((n,), k)
    block = grid.block
    w_scale = row_scales(scale, grid)
    rows = x.reshape(math.prod(x.shape[:-1]), k)
    if activation is Activation.W8A8:
        codes, x_scale = quantize_activation(rows, block.k)
        rows = codes
    else:
        x_scale = torch.ones(rows.shape[0], w_scale.shape[1], device=x.device)
    out = torch.zeros(rows.shape[0], n, dtype=compute_dtype, device=x.device)
    for kb in range(w_scale.shape[1]):
        ks = slice(kb * block.k, (kb + 1) * block.k)
        partial = rows[:, ks].to(compute_dtype) @ weight[:, ks].to(compute_dtype).T
        out += partial * x_scale[:, kb, None].to(compute_dtype) * w_scale[:, kb].to(compute_dtype)
    if bias is not None:
        out += bias.to(compute_dtype)
    if compute_dtype != torch.float64:
        out = out.to(x.dtype)
    return out.reshape(*x.shape[:-1], n)
