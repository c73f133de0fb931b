"""Ascend C kernels on Atlas A2 and A3: weights decoded by the vector cores, multiplied by the cube.

The kernels are in csrc/ascend; `docs/ascendc.md` says how they work and what was measured. Up to `HAND_OVER_ROWS` rows
go to the fused kernel, which is exact, more to a scratch and the stock fp16 product (`prefill`). Of experts, so many on
average.
"""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path

import torch

from qwen3_fp8_ascend.backends import e4m3, grouped, prefill, soc
from qwen3_fp8_ascend.backends.operators import torch_operator
from qwen3_fp8_ascend.backends.registry import Backend, PackedWeight, default_block_only
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, Activation, BlockGrid, ceil_div

LIBRARY = Path(__file__).parent.parent / "libqwen3_fp8_ascendc.so"
SUPPORTED_GENERATIONS = ("A2", "A3")

HAND_OVER_ROWS = 64
"""Most rows of x for the fused kernel (`kMaxRows` in csrc/ascend/tiling.h).

The partial products of a block, 128 fp32 for each row, cross L2 twice, so the time grows with the rows; at 64 the
estimate meets that of the stock BF16 product (docs/ascendc.md). The scratch costs about as much as decoding and that
product together, hence less than two passes of 64 rows.
"""

SINGLE_ROW_VARIABLE = "QWEN3_FP8_ASCENDC_SINGLE_ROW"
SINGLE_ROW_KERNELS = ("linear", "gemv")
"""Kernels for one row of x, the default first.

"gemv" keeps the weights on the vector cores. The estimate prefers "linear" (docs/ascendc.md), but rests on assumed
latencies of L2 and of flags between cores, on which "gemv" does not depend: measure both where there is an NPU.
"""

MAX_GROUPED_ROWS = 4096
"""Most rows of x for a launch of the grouped kernel, whose workspace holds them as operands (`kMaxGroupedRows`)."""

MAX_GEMV_COLUMNS = 16384
MAX_COLUMNS = 65408
"""Largest k: the row stride of a matrix is a 16-bit field of the cube's load instruction."""

TILE = DEFAULT_BLOCK.n
FRACTAL = 16
SCALE_REPEATS = 8
ACTIVATIONS = {Activation.W8A8: 0, Activation.W8A16: 1, Activation.W8A8_UE8M0: 2}
"""What the operators and kernels call an activation (`Activation` in csrc/ascend/tiling.h)."""

DECODE_BIAS = 256.0
"""Packed codes decode to their value times 2^-8; the packed scales carry 2^8 (`kDecodeBias`)."""


def pack(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, ...]:
    """Lay a weight out in blocks of 128 x 128, two weights in each 16-bit lane.

    Shapes: weight (n, k) float8_e4m3fn, scale `grid.scale_shape` -> codes (tiles, k_blocks, 16384) uint8,
        scales (tiles, k_blocks, 8) fp32, spans (tiles, 8) int32.
    Semantics: a tile holds the rows of one scale block (zeros below a ragged one). Within a block the order is the
        cube's: strips of 16 columns, each 128 rows of 16. The first half of a block is in the low bytes of its
        16-bit lanes, the second half in the high ones. A scale is multiplied by 2^8 and repeated to 32 bytes.
        A span is the tile's first output, its number of outputs, and, as bits of fp32, the powers of two that
        normalise the weight for many rows and back.
    Raises:
        BlockFp8Error: k is larger than the kernels address.
    """
    if grid.k > MAX_COLUMNS:
        raise BlockFp8Error("the weight has too many columns", expected=f"k <= {MAX_COLUMNS}", got=grid.k)
    spans = list(grid.spans())
    k_blocks = ceil_div(grid.k, grid.block.k)
    codes = weight.view(torch.uint8)
    columns = k_blocks * TILE - grid.k
    parts = codes.split([span.rows for span in spans])
    rows = torch.stack([torch.nn.functional.pad(part, (0, columns, 0, TILE - part.shape[0])) for part in parts])
    strips = rows.view(len(spans), TILE, k_blocks, TILE // FRACTAL, FRACTAL).permute(0, 2, 3, 1, 4)
    halves = strips.reshape(len(spans), k_blocks, 2, TILE * TILE // 2)
    lanes = halves.transpose(2, 3).reshape(len(spans), k_blocks, TILE * TILE)
    scales = (scale * DECODE_BIAS).unsqueeze(-1).expand(-1, -1, SCALE_REPEATS).contiguous()
    rows_of_tiles = [[span.start, span.rows, 0, 0, 0, 0, 0, 0] for span in spans]
    table = torch.tensor(rows_of_tiles, dtype=torch.int32, device=weight.device).view(-1, 8)
    table[:, 2:4] = prefill.powers_of_weight(scale).view(torch.int32)
    return lanes.contiguous(), scales, table


pack_experts = functools.partial(grouped.pack_experts, pack)


def linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        bias = bias.float()
    return ascendc_linear(x, *packed.tensors, bias, packed.n, ACTIVATIONS[activation])


@torch_operator(lambda x, codes, scales, spans, bias, n, *_: x.new_empty(x.shape[0], n))
def ascendc_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    spans: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    activation: int,
) -> torch.Tensor:
    """The kernel that suits the number of rows.

    Shapes: x (m, k), codes, scales and spans as `pack` returns them, bias (n,) in x.dtype or fp32 -> (m, n) in x.dtype.
    Semantics: the bias is added to the fp32 sums before the rounding to x.dtype; beyond `HAND_OVER_ROWS` rows
        `prefill.multiply` says where.
    """
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    operators = torch.ops.qwen3_fp8_ascend
    m, k = x.shape
    if m > HAND_OVER_ROWS and prefill.fits(n, k):
        weight = prefill.scratch(n, k, x)
        shrink, grow = spans[0, 2:4].view(torch.float32)
        operators.ascendc_block_dequantize_out(codes, scales * shrink, spans, weight)
        operand, grow_rows = _operand(x, activation)
        return prefill.multiply(operand, weight, n, grow_rows * grow, bias, x.dtype)
    if m == 1 and k <= MAX_GEMV_COLUMNS and _single_row_kernel() == "gemv":
        return operators.ascendc_block_gemv(x, codes, scales, spans, bias, n, activation)
    rows = [
        operators.ascendc_block_linear(part, codes, scales, spans, bias, n, activation)
        for part in x.split(HAND_OVER_ROWS)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def grouped_linear(
    x: torch.Tensor, packed: PackedWeight, ends: torch.Tensor, activation: Activation, dtype: torch.dtype
) -> torch.Tensor:
    return ascendc_grouped_linear(x, *packed.grouped_tensors, ends, packed.n, ACTIVATIONS[activation], dtype)


@torch_operator(lambda x, codes, scales, spans, ends, n, activation, dtype: x.new_empty(x.shape[0], n, dtype=dtype))
def ascendc_grouped_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    spans: torch.Tensor,
    ends: torch.Tensor,
    n: int,
    activation: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The way that suits the number of rows, for rows sorted by expert.

    Shapes: x (m, k), codes, scales and spans as `pack_experts` returns them, ends (E,) int64 -> (m, n) `dtype`: x's, or
        fp32.
    Semantics: only the device knows how many rows an expert has, and nothing here asks. With more than `HAND_OVER_ROWS`
        on average the whole layer is decoded into a scratch, where it fits (`prefill`). Else an expert's rows go
        through its weight `HAND_OVER_ROWS` at a time, exactly. Beyond `MAX_GROUPED_ROWS` rows there are several
        launches, each of which finds its part of the list: an expert with rows in two of them is decoded for both.
    """
    if x.shape[0] > HAND_OVER_ROWS * ends.shape[0] and prefill.fits(ends.shape[0] * n, x.shape[1]):
        return _grouped_through_scratch(x.contiguous(), codes, scales, spans, ends, n, activation, dtype)
    x = x.to(dtype).contiguous()  # the kernel's results have the dtype of its activations
    out = []
    for first in range(0, x.shape[0], MAX_GROUPED_ROWS):
        part = x[first : first + MAX_GROUPED_ROWS]
        of_part = ends if part.shape[0] == x.shape[0] else ends.clamp(first, first + part.shape[0]) - first
        out.append(
            torch.ops.qwen3_fp8_ascend.ascendc_block_grouped_linear(part, codes, scales, spans, of_part, n, activation)
        )
    return out[0] if len(out) == 1 else torch.cat(out)


def _grouped_through_scratch(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    spans: torch.Tensor,
    ends: torch.Tensor,
    n: int,
    activation: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """All experts' weights, each normalised by its own power of two, in one scratch, and the stock grouped product."""
    experts, (m, k) = ends.shape[0], x.shape
    weights = prefill.scratch(experts * n, k, x)
    powers = spans[:, 0, 2:4].view(torch.float32)
    below = spans.clone()
    below[:, :, 0] += (torch.arange(experts, device=x.device, dtype=torch.int32) * n).unsqueeze(1)
    normalised = scales * powers[:, :1, None, None]
    torch.ops.qwen3_fp8_ascend.ascendc_block_dequantize_out(
        codes.flatten(0, 1), normalised.flatten(0, 1), below.flatten(0, 1), weights
    )
    operand, grow = _operand(x, activation)
    grow = grow * prefill.by_owner(powers[:, 1:], ends, m)
    return prefill.multiply_groups(operand, weights.view(experts, n, k), ends, grow, dtype)


@functools.cache
def _single_row_kernel() -> str:
    chosen = os.environ.get(SINGLE_ROW_VARIABLE, SINGLE_ROW_KERNELS[0])
    if chosen not in SINGLE_ROW_KERNELS:
        raise BlockFp8Error(
            "unknown kernel for one row",
            where=SINGLE_ROW_VARIABLE,
            expected=" or ".join(SINGLE_ROW_KERNELS),
            got=chosen,
        )
    return chosen


def _operand(x: torch.Tensor, activation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x, quantized if it is to be, as `prefill` takes it. Shapes: x (m, k) -> (m, k), (m, 1)."""
    if activation == ACTIVATIONS[Activation.W8A16]:
        return prefill.normalise_rows(x)
    codes, scale = torch.ops.qwen3_fp8_ascend.ascendc_group_quantize(x, activation)
    values = torch.nn.functional.pad(e4m3.decode(codes), (0, -x.shape[1] % TILE)).unflatten(1, (-1, TILE))
    operand, grow = prefill.normalise_groups(values, scale, x)
    return operand.narrow(1, 0, x.shape[1]), grow


def quantize_activation(x: torch.Tensor, block_k: int, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    if block_k != DEFAULT_BLOCK.k:
        raise BlockFp8Error(
            "the Ascend C backend quantizes in groups of 128", expected=DEFAULT_BLOCK.k, got=block_k, fix="use 128"
        )
    codes, scale = torch.ops.qwen3_fp8_ascend.ascendc_group_quantize(x.contiguous(), ACTIVATIONS[activation])
    return codes.view(torch.float8_e4m3fn), scale


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid, dtype: torch.dtype) -> torch.Tensor:
    tensors = pack(weight, scale, grid)
    return torch.ops.qwen3_fp8_ascend.ascendc_block_dequantize(*tensors, grid.n, grid.k, dtype)


@functools.cache
def unusable() -> str | None:
    if reason := soc.missing_npu():
        return reason
    if not LIBRARY.exists():
        return "built without CANN: install again with ASCEND_HOME_PATH set (CANN 8.5 or newer)"
    generation = soc.current_generation()
    if generation is None or generation.name not in SUPPORTED_GENERATIONS:
        return f"built for Atlas A2 (Ascend910B*) and A3 (Ascend910_93*), this NPU is {soc.device_name()}"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    npu = importlib.import_module("torch_npu").npu
    return _decode_fault(torch.device("npu", npu.current_device()))


def _decode_fault(device: torch.device) -> str | None:
    """Decode and multiply every finite code once, since the kernels rely on fp16 subnormals being kept.

    That the vector unit and the cube keep them was not seen on hardware when this was written.
    """
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    codes = torch.where((codes & 0x7F) == 0x7F, torch.zeros_like(codes), codes).repeat(64).view(TILE, TILE)
    expected = codes.view(torch.float8_e4m3fn).float()
    weight = codes.to(device).view(torch.float8_e4m3fn)
    grid = BlockGrid((TILE,), TILE)
    one = torch.ones(1, 1, device=device)
    packed = PackedWeight("ascendc", grid, pack(weight, one, grid))
    identity = torch.eye(TILE, device=device)
    decoded = dequantize_weight(weight, one, grid, torch.float32).cpu()
    columns = [linear(rows, packed, None, Activation.W8A16).cpu() for rows in identity.split(HAND_OVER_ROWS)]
    for name, got in (("decoding", decoded), ("multiplying", torch.cat(columns).T)):
        wrong = int((got != expected).sum())
        if wrong:
            return f"{name} all codes on this NPU gives {wrong} wrong values of {expected.numel()}; please report it"
    return None


def plan() -> tuple[tuple[str, str], ...]:
    return (
        ("m = 1", f"{_single_row_kernel()} kernel, exact"),
        (f"m <= {HAND_OVER_ROWS}", "fused kernel, exact: decoded on vector cores, multiplied by the cube"),
        (f"m > {HAND_OVER_ROWS}", prefill.PLAN),
    )


BACKEND = Backend(
    name="ascendc",
    summary="Ascend C kernels on Atlas A2 and A3: exact for decode, prefill through an fp16 scratch",
    computes=frozenset(Activation),
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
    plan=plan,
    max_scale=torch.finfo(torch.float32).max / DECODE_BIAS,
)
