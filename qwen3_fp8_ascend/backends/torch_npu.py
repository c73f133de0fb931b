"""Block FP8 with torch_npu's own operators: no kernel of ours has to be built.

Ascend 950 (A5) multiplies e4m3 with 1x128 and 128x128 scales in one stock operator: the checkpoint's arithmetic, with
nothing re-quantized. Atlas A2 and A3 know no FP8; there weights stay at one byte too, but each linear decodes its
whole weight into a scratch (`prefill`, which also says what it rounds), which costs a decode step far more than a fused
kernel does. So on those chips this backend is used only when asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from qwen3_fp8_ascend.backends import e4m3, prefill, soc
from qwen3_fp8_ascend.backends.operators import check_packed, torch_operator
from qwen3_fp8_ascend.backends.registry import Backend, PackedWeight, default_block_only
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import AMAX_FLOOR, DEFAULT_BLOCK, E4M3_MAX, Activation, BlockGrid, ceil_div
from qwen3_fp8_ascend.reference import row_scales

_BLOCK = DEFAULT_BLOCK.k
MIN_SCALE = float(torch.tensor(AMAX_FLOOR, device="cpu") / E4M3_MAX)
"""`npu_dynamic_block_quant` bounds the scale from below where the specification bounds the maximum: the same number."""

DECODE_PIECE = 1 << 22
"""Weights decoded at a time: the fp32 and int32 temporaries of a piece take about 80 MB."""


NATIVE_OPERATORS = ("npu_dynamic_block_quant", "npu_quant_matmul", "npu_grouped_matmul")
"""What the path of A5 calls; torch_npu registers them for every chip."""


MAX_EXPERTS = 1024
"""Longest list of groups that `npu_grouped_matmul` takes."""

CUMULATIVE, BY_ROWS, ONE_RESULT = 0, 0, 3
"""For `npu_grouped_matmul`: group_list_type, group_type and split_item of what `ends` is."""

NATIVE, SCRATCH = "native", "scratch"
"""Layouts: for the chip's own block product, and for decoding into the scratch."""


def _operators() -> Any:
    return torch.ops.npu


def _has_fp8_matmul() -> bool:
    """Whether this process's NPU multiplies e4m3. Asked when weights are packed; from then on their layout tells."""
    generation = soc.current_generation()
    return generation is not None and generation.fp8_matmul


def unusable() -> str | None:
    if reason := soc.missing_npu():
        return reason
    absent = [name for name in NATIVE_OPERATORS if not hasattr(_operators(), name)] if _has_fp8_matmul() else []
    return f"this torch_npu has no {' and no '.join(absent)}: install a newer one" if absent else None


def pack(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, ...]:
    """Codes as bytes, in whole blocks of columns.

    Shapes: A5: codes (n', k'), every shard padded to whole blocks of rows, scale (n' / 128, k' / 128) fp32, and, only
        if that moved rows, their numbers (n,) int64. A2, A3: codes (n, k'), scales of rows (n, k' / 128) fp32, the
        powers of two that normalise the weight (2,) fp32.
    Raises:
        BlockFp8Error: the weight is too large for the scratch (A2, A3).
    """
    codes = weight.view(torch.uint8)
    k_padded = ceil_div(grid.k, _BLOCK) * _BLOCK
    codes = torch.nn.functional.pad(codes, (0, k_padded - grid.k)) if k_padded != grid.k else codes
    if not _has_fp8_matmul():
        if not prefill.fits(*codes.shape):
            raise BlockFp8Error(
                "the weight is too large for the scratch into which this backend decodes",
                expected=f"at most {prefill.MAX_WEIGHTS} weights in at most {prefill.MAX_COLUMNS} columns",
                got=f"{codes.shape[0]} x {codes.shape[1]}",
                fix="choose the backend `ascendc` or `triton`, or more ranks (--tensor-parallel-size)",
            )
        return codes.contiguous(), row_scales(scale, grid).contiguous(), prefill.powers_of_weight(scale)
    if all(width % _BLOCK == 0 for width in grid.widths):
        return codes.contiguous(), scale.contiguous()
    sizes = [span.rows for span in grid.spans()]
    padded = torch.cat(
        [torch.nn.functional.pad(part, (0, 0, 0, _BLOCK - part.shape[0])) for part in codes.split(sizes)]
    )
    kept = [tile * _BLOCK + row for tile, rows in enumerate(sizes) for row in range(rows)]
    return padded, scale.contiguous(), torch.tensor(kept, dtype=torch.int64, device=codes.device)


def linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    if packed.layout == NATIVE:
        codes, scale, *kept = packed.tensors
        return torch_npu_native_linear(x, codes, scale, kept[0] if kept else None, bias, activation.value)
    return torch_npu_scratch_linear(x, *packed.tensors, bias, activation.value)


@torch_operator(lambda x, codes, scale, kept, *_: x.new_empty(x.shape[0], (codes if kept is None else kept).shape[0]))
def torch_npu_native_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    kept: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    activation: str = Activation.W8A8.value,
) -> torch.Tensor:
    """W8A8 in the chip's own block-scaled product (A5).

    Shapes: x (m, k) bf16/fp16; codes, scale and kept as `pack` returns them, bias (n,) -> (m, n) in x.dtype.
    Raises:
        BlockFp8Error: operands that do not fit each other. The operators' own shape functions accept almost anything.
    Semantics: the product takes no bias beside FP8 operands with these scales, but gives fp32 on request: with a bias
        it does, so that the bias is added before the rounding. That costs 4 m n bytes more, written and read.
    Source: CANN's documentation of aclnnQuantMatmulV5, constraints of G-B quantization on Ascend 950.
    """
    _check_activation(x)
    _check_packed("npu_quant_matmul", codes, scale, x.shape[1], _BLOCK)
    x_codes, x_scale = _native_quantize(x, codes.shape[1], activation)
    out = _operators().npu_quant_matmul(
        x_codes,
        codes.view(torch.float8_e4m3fn).t(),
        scale.t(),
        pertoken_scale=x_scale,
        output_dtype=x.dtype if bias is None else torch.float32,
        group_sizes=[1, _BLOCK, _BLOCK],
    )
    out = out if kept is None else out.index_select(1, kept)
    return out if bias is None else (out + bias.float()).to(x.dtype)


def _native_quantize(x: torch.Tensor, columns: int, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes (m, columns), zeros behind x's own, and scales (m, columns / 128).

    The chip's operator knows no scales that are powers of two; those codes are made by plain torch operations.
    """
    padded = torch.nn.functional.pad(x, (0, columns - x.shape[1])) if x.shape[1] != columns else x
    if Activation(activation) is Activation.W8A8_UE8M0:
        return quantize_activation(padded, _BLOCK, Activation.W8A8_UE8M0)
    codes, scale = _operators().npu_dynamic_block_quant(
        padded.contiguous(),
        min_scale=MIN_SCALE,
        dst_type=torch.float8_e4m3fn,
        row_block_size=1,
        col_block_size=_BLOCK,
    )
    return codes, scale


def pack_experts(
    weights: Iterable[torch.Tensor], scales: torch.Tensor, grid: BlockGrid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as bytes, every shard in whole blocks of rows, and the scales as they are.

    Shapes: -> codes (E, n', k') uint8, scale (E, n' / 128, k' / 128) fp32.
    Raises:
        BlockFp8Error: the chip has no FP8 product (A2, A3), or there are too many experts for the grouped one.
    """
    if not _has_fp8_matmul():
        raise BlockFp8Error(
            "this backend serves experts on Ascend 950 alone",
            expected="a chip that multiplies e4m3",
            got=soc.device_name(),
            fix="choose the backend `ascendc`",
        )
    experts, blocks = scales.shape[0], scales.shape[1]
    if experts > MAX_EXPERTS:
        raise BlockFp8Error("too many experts for npu_grouped_matmul", expected=f"at most {MAX_EXPERTS}", got=experts)
    codes = torch.zeros(experts, blocks * _BLOCK, scales.shape[2] * _BLOCK, dtype=torch.uint8, device=scales.device)
    for expert, weight in enumerate(weights):
        of_rows = weight.view(torch.uint8)
        for padded, rows in zip(_shards(codes[expert], grid.widths, 0), of_rows.split(grid.widths), strict=True):
            padded[:, : grid.k] = rows
    return codes, scales.contiguous()


def _shards(padded: torch.Tensor, widths: Sequence[int], dim: int) -> list[torch.Tensor]:
    """The shards' own rows (or columns) of what holds every shard in whole blocks."""
    out, start = [], 0
    for width in widths:
        out.append(padded.narrow(dim, start, width))
        start += ceil_div(width, _BLOCK) * _BLOCK
    return out


def grouped_linear(
    x: torch.Tensor, packed: PackedWeight, ends: torch.Tensor, activation: Activation, dtype: torch.dtype
) -> torch.Tensor:
    return torch_npu_native_grouped_linear(
        x, *packed.grouped_tensors, ends, list(packed.grid.widths), dtype, activation.value
    )


@torch_operator(lambda x, codes, scale, ends, widths, dtype, *_: x.new_empty(x.shape[0], sum(widths), dtype=dtype))
def torch_npu_native_grouped_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    ends: torch.Tensor,
    widths: Sequence[int],
    dtype: torch.dtype,
    activation: str = Activation.W8A8.value,
) -> torch.Tensor:
    """W8A8 of rows sorted by expert in the chip's own grouped block-scaled product (A5).

    Shapes: x (m, k) bf16/fp16; codes and scale as `pack_experts` returns them, ends (E,) int64, widths of the shards
        -> (m, sum of widths) `dtype`: x's, or fp32. Rows behind the last end are not written.
    Raises:
        BlockFp8Error: operands that do not fit each other. The operator's own shape function accepts almost anything.
    Semantics: the operator knows 1x128 and 128x128 scales by their shapes. A weight that is transposed, as the
        checkpoint's is, comes as a strided view, and its scales likewise, as for `npu_quant_matmul`: the documentation
        has them as (E, n / 128, k / 128) then, which is how they lie in memory. No NPU has confirmed that reading.
    Source: CANN's documentation of aclnnGroupedMatmulV5, constraints of G-B quantization on Ascend 950.
    """
    _check_activation(x)
    _check_packed("npu_grouped_matmul", codes[0], scale[0], x.shape[1], _BLOCK)
    blocks = sum(ceil_div(width, _BLOCK) for width in widths)
    if codes.shape[:2] != (scale.shape[0], blocks * _BLOCK) or ends.shape != scale.shape[:1]:
        raise BlockFp8Error(
            "the experts' codes, scales and list of rows do not fit each other",
            where="npu_grouped_matmul",
            expected=f"codes (E, {blocks * _BLOCK}, k'), scale (E, {blocks}, k' / 128), ends (E,)",
            got=f"{tuple(codes.shape)}, {tuple(scale.shape)}, {tuple(ends.shape)}",
            fix="pass the tensors of ops.pack_experts(..., backend='torch_npu')",
        )
    x_codes, x_scale = _native_quantize(x, codes.shape[2], activation)
    (out,) = _operators().npu_grouped_matmul(
        [x_codes],
        [codes.view(torch.float8_e4m3fn).transpose(1, 2)],
        scale=[scale.transpose(1, 2)],
        per_token_scale=[x_scale],
        group_list=ends,
        split_item=ONE_RESULT,
        group_type=BY_ROWS,
        group_list_type=CUMULATIVE,
        output_dtype=dtype,
    )
    if out.shape[1] == sum(widths):
        return out
    return torch.cat(_shards(out, widths, 1), dim=1)


@torch_operator(lambda x, codes, *_: x.new_empty(x.shape[0], codes.shape[0]))
def torch_npu_scratch_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    powers: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = Activation.W8A8.value,
) -> torch.Tensor:
    """W8A8 by decoding the weight into the scratch, then the stock product.

    Shapes: x (m, k), codes (n, k') uint8, scales (n, k' / 128) fp32, powers (2,) fp32, bias (n,) -> (m, n) in x.dtype.
    Raises:
        BlockFp8Error: operands that do not fit each other.
    Semantics: both operands are rounded to fp16 once, after normalisation (`prefill`).
    """
    _check_packed("torch_npu_scratch_linear", codes, scales, x.shape[1], 1)
    rows, columns = codes.shape
    weight = prefill.scratch(rows, columns, x)
    step = max(1, DECODE_PIECE // columns)
    normalised = scales * powers[0]
    for part, scale, target in zip(codes.split(step), normalised.split(step), weight.split(step), strict=True):
        target.copy_((e4m3.decode(part).unflatten(1, (-1, _BLOCK)) * scale.unsqueeze(-1)).flatten(1))
    operand, grow = prefill.normalise_groups(*e4m3.quantize_values(x, _BLOCK, Activation(activation)), x)
    return prefill.multiply(operand, weight, rows, grow * powers[1], bias, x.dtype)


def quantize_activation(x: torch.Tensor, block_k: int, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    k = x.shape[1]
    values, scale = e4m3.quantize_values(x, block_k, activation)
    codes = e4m3.encode(values).flatten(1).narrow(1, 0, k).contiguous()
    return codes.view(torch.float8_e4m3fn), scale


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid, dtype: torch.dtype) -> torch.Tensor:
    scales = row_scales(scale, grid).repeat_interleave(grid.block.k, dim=1).narrow(1, 0, grid.k)
    return (e4m3.decode(weight.view(torch.uint8)) * scales).to(dtype)


def _check_packed(where: str, codes: torch.Tensor, scale: torch.Tensor, k: int, rows: int) -> None:
    """Refuse operands that `pack` did not make for this k, by shapes and dtypes alone; a scale covers `rows` rows."""
    blocks = ceil_div(k, _BLOCK)
    check_packed(
        where,
        "torch_npu",
        codes=(codes, torch.uint8, (scale.shape[0] * rows, blocks * _BLOCK)),
        scale=(scale, torch.float32, (scale.shape[0], blocks)),
    )


def _check_activation(x: torch.Tensor) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise BlockFp8Error(
            "the NPU's FP8 product takes 16-bit activations only",
            expected="bfloat16 or float16",
            got=x.dtype,
            fix="serve with --dtype bfloat16, or choose the backend `triton`",
        )


def by_name_only() -> str | None:
    if _has_fp8_matmul():
        return None
    return "only when asked for by name: without FP8 in the chip it decodes every weight for every step"


def plan() -> tuple[tuple[str, str], ...]:
    if _has_fp8_matmul():
        return (("any", "npu_dynamic_block_quant, npu_quant_matmul with 1x128 and 128x128 scales"),)
    return (("any", prefill.PLAN),)


BACKEND = Backend(
    name="torch_npu",
    summary="torch_npu's operators: the FP8 product of Ascend 950, exact; on A2 and A3 an fp16 scratch for any rows",
    computes=frozenset({Activation.W8A8, Activation.W8A8_UE8M0}),
    device_types=frozenset({"npu"}),
    unusable=unusable,
    pack=pack,
    linear=linear,
    quantize_activation=quantize_activation,
    dequantize_weight=dequantize_weight,
    pack_experts=pack_experts,
    grouped_linear=grouped_linear,
    unsupported=default_block_only,
    detail=lambda: soc.device_name() or "",
    by_name_only=by_name_only,
    layout=lambda: NATIVE if _has_fp8_matmul() else SCRATCH,
    plan=plan,
)
