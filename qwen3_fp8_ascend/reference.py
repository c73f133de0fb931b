"""THE SPECIFICATION: what every backend must compute, in plain torch, readable in one sitting.

Slow on purpose. A backend is right when it agrees with these functions: bit for bit in quantization and
dequantization, and in the linears up to the order of fp32 additions.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch

from qwen3_fp8_ascend.format import AMAX_FLOOR, DEFAULT_BLOCK, E4M3_MAX, Activation, BlockGrid, BlockSize, ceil_div
from qwen3_fp8_ascend.glu import SILU, Glu

NAN_CODE = 0x7F
"""The one NaN code that quantization produces, whatever the sign of the NaN."""


def quantize_activation(
    x: torch.Tensor, block_k: int = DEFAULT_BLOCK.k, activation: Activation = Activation.W8A8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each group of `block_k` consecutive channels of a token to e4m3 with an fp32 scale.

    Shapes: x (..., k) bf16/fp16/fp32 -> codes (..., k) float8_e4m3fn, scale (..., ceil(k / block_k)) fp32.
    Semantics: scale = max(amax(|group|), 1e-10) / 448 by true division, in W8A8_UE8M0 then rounded up to a power of
        two (`round_up_to_power_of_two`); code = round-to-nearest-even of x / scale (true division), clamped to +-448.
        A ragged last group uses the channels it has. A NaN makes its whole group NaN; an infinity makes the scale
        infinite, itself NaN and the rest zero.
    Source: ``native_per_token_group_quant_fp8`` of vLLM's tests: byte-identical for finite input in groups whose
        largest magnitude is at least 1e-10. Below, as in groups of zeros, bf16 and fp16 differ: that helper applies the
        floor in the dtype of x. vLLM's ``QuantFP8`` has a higher floor and is byte-identical from 1/512 on.
        ue8m0: the same place of vLLM with ``use_ue8m0`` (``exp2(ceil(log2(scale)))`` after the floor), its logarithm
        taken exactly, as DeepGEMM's ``ceil_to_ue8m0`` does by bits. Floors differ there too: DeepGEMM's is 1e-4, that
        of vLLM's CUDA kernel is 1e-10 for the scale instead of the maximum.
    """
    k = x.shape[-1]
    groups = ceil_div(k, block_k)
    block_k = min(block_k, max(1, k))  # a group wider than x is x, without padding it
    padded = torch.nn.functional.pad(x.float(), (0, groups * block_k - k))
    grouped = padded.unflatten(-1, (groups, block_k))
    amax = grouped.abs().amax(-1).clamp_min(AMAX_FLOOR)
    scale = amax / torch.full_like(amax, E4M3_MAX)  # on CUDA torch multiplies by the reciprocal of a plain number
    if activation is Activation.W8A8_UE8M0:
        scale = round_up_to_power_of_two(scale)
    scaled = (grouped / scale.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).masked_fill(scaled.isnan(), NAN_CODE)
    return codes.flatten(-2)[..., :k].contiguous().view(torch.float8_e4m3fn), scale


def round_up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below a scale, by its bits: logarithms of a device need not be exact.

    Shapes: scale, any shape, fp32, normal positive numbers up to 2^127 -> the same shape. Infinity and NaN stay.
    Source: the numbers of e8m0 in the OCP Microscaling specification 1.0, 5.4.1, but its 2^-127.
    """
    mantissa = (1 << 23) - 1
    up = (scale.view(torch.int32) + mantissa) & ~mantissa  # carries into the exponent unless the mantissa is zero
    return torch.where(scale.isnan(), scale, up.view(torch.float32))


def scales_as_fp32(scale: torch.Tensor) -> torch.Tensor:
    """A checkpoint's scales as fp32, which holds all of them exactly.

    Shapes: scale, any shape, fp32, bf16 or float8_e8m0fnu -> the same shape.
    Semantics: byte b of e8m0 is 2^(b - 127), 0xFF NaN. Made by bits, since a device without FP8 casts none; 2^-127 is
        subnormal in fp32.
    """
    if scale.dtype != torch.float8_e8m0fnu:
        return scale.float()
    exponent = scale.view(torch.uint8).to(torch.int32)
    bits = torch.where(exponent == 0, 1 << 22, torch.where(exponent == 0xFF, 0x7FC00000, exponent << 23))
    return bits.to(torch.int32).view(torch.float32)


def row_scales(scale: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Repeat each row of block scales for the weight rows it belongs to.

    Shapes: scale `grid.scale_shape` -> (n, ceil(k / block.k)) fp32.
    """
    index = [span.scale_row for span in grid.spans() for _ in range(span.rows)]
    return scales_as_fp32(scale).index_select(0, torch.tensor(index, dtype=torch.long, device=scale.device))


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
    if activation is not Activation.W8A16:
        codes, x_scale = quantize_activation(rows, block.k, activation)
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


def grouped_linear(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    ends: torch.Tensor,
    *,
    activation: Activation = Activation.W8A8,
    grid: BlockGrid | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`block_linear` of each expert for its own rows of x, which are sorted by expert.

    Shapes: x (m, k), weights (E, n, k) float8_e4m3fn, scales (E, *grid.scale_shape), ends (E,) int64
        -> (m, n) in x.dtype.
    Semantics: rows [ends[e - 1], ends[e]) of x are expert e's, the first expert's from 0 on. Rows behind the last end
        are nobody's, and what is in their outputs is not specified (here: zeros).
    Source: the grouped matrix product of inference engines: ``npu_grouped_matmul`` with a cumulative group list.
    """
    out = torch.zeros(x.shape[0], weights.shape[1], device=x.device, dtype=x.dtype)
    out = out.double() if compute_dtype == torch.float64 else out
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        out[start:end] = block_linear(
            x[start:end],
            weights[expert],
            scales[expert],
            activation=activation,
            grid=grid,
            compute_dtype=compute_dtype,
        )
    return out


def block_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: Activation = Activation.W8A8,
    glu: Glu = SILU,
    block: BlockSize = DEFAULT_BLOCK,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """A layer of experts behind its router: each token's weighted sum over the experts that it is sent to.

    Shapes: x (m, hidden), w13 (E, 2 * intermediate, hidden) with the gate's rows first, w2 (E, hidden, intermediate),
        both float8_e4m3fn; gate, up and down have block grids of their own, so w13_scale is
        (E, 2 * ceil(intermediate / block.n), ceil(hidden / block.k)); topk_weights (m, top_k) fp32, topk_ids (m, top_k)
        -> (m, hidden) in x.dtype.
    Semantics: two linears of this file with silu between. h = x.dtype(block_linear(x, w13));
        a = x.dtype(glu(gate, up)), computed in fp32: silu(gate) * up, unless the model has another activation;
        y = block_linear(a, w2) in fp32, not rounded;
        out = x.dtype(the sum of weight * y in fp32, in the order of the slots). An id of -1 adds nothing, an expert
        that is named twice adds twice. Weights are used as they are: normalising and scaling them is the router's.
        `compute_dtype=torch.float64` gives the oracle, which rounds h and a as well and returns float64.
    Source: vLLM's Triton experts (``fused_experts_impl`` with block FP8), which round y * weight once more, to bf16.
    """
    experts, hidden, half = w2.shape
    gate_up, down = BlockGrid((half, half), hidden, block), BlockGrid((hidden,), half, block)
    y = torch.zeros(*topk_ids.shape, hidden, device=x.device, dtype=compute_dtype)
    linear = functools.partial(block_linear, activation=activation, compute_dtype=compute_dtype)
    for expert in range(experts):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        h = linear(x[token], w13[expert], w13_scale[expert], grid=gate_up).to(x.dtype)
        gate, up = h.to(compute_dtype).split(half, dim=1)
        a = glu(gate, up).to(x.dtype)
        # As fp32, a has the same codes, and what comes out is not rounded.
        y[token, slot] = linear(a.float(), w2[expert], w2_scale[expert], grid=down)
    out = torch.zeros(x.shape[0], hidden, device=x.device, dtype=compute_dtype)
    for slot_weights, slot_ids, slot_y in zip(topk_weights.T, topk_ids.T, y.unbind(1), strict=True):
        chosen = slot_ids >= 0
        out[chosen] += slot_weights[chosen, None].to(compute_dtype) * slot_y[chosen]
    return out if compute_dtype == torch.float64 else out.to(x.dtype)
