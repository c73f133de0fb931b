"""Ascend C kernels on Atlas A2 and A3: weights decoded by the vector cores, multiplied by the cube.

The kernels are in csrc/ascend; `docs/ascendc.md` says how they work and what was measured. Up to `HAND_OVER_ROWS` rows
go to the fused kernel, more to one dequantized scratch and the stock matrix product.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import torch

from qwen3_fp8_ascend.backends.registry import Backend, PackedWeight
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, BlockSize, ShardGrid, ceil_div

LIBRARY = Path(__file__).parent.parent / "libqwen3_fp8_ascendc.so"
SUPPORTED_CHIPS = ("Ascend910B", "Ascend910_93")

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

MAX_GEMV_COLUMNS = 16384
MAX_COLUMNS = 65408
"""Largest k: the row stride of a matrix is a 16-bit field of the cube's load instruction."""

TILE = DEFAULT_BLOCK.n
FRACTAL = 16
SCALE_REPEATS = 8
DECODE_BIAS = 256.0
"""Packed codes decode to their value times 2^-8; the packed scales carry 2^8 (`kDecodeBias`)."""


def pack(weight: torch.Tensor, scale: torch.Tensor, grid: ShardGrid) -> tuple[torch.Tensor, ...]:
    """Lay a weight out in blocks of 128 x 128, two weights in each 16-bit lane.

    Shapes: weight (n, k) float8_e4m3fn, scale `grid.scale_shape` -> codes (tiles, k_blocks, 16384) uint8,
        scales (tiles, k_blocks, 8) fp32, spans (tiles, 8) int32.
    Semantics: a tile holds the rows of one scale block (zeros below a ragged one). Within a block the order is the
        cube's: strips of 16 columns, each 128 rows of 16. The first half of a block is in the low bytes of its
        16-bit lanes, the second half in the high ones. A scale is multiplied by 2^8 and repeated to 32 bytes.
        A span is the tile's first output and its number of outputs.
    Raises:
        BlockFp8Error: k is larger than the kernels address, or a scale overflows when multiplied by 2^8.
    """
    if grid.k > MAX_COLUMNS:
        raise BlockFp8Error("the weight has too many columns", expected=f"k <= {MAX_COLUMNS}", got=grid.k)
    spans = list(grid.spans())
    k_blocks = ceil_div(grid.k, grid.block.k)
    codes = weight.view(torch.uint8)
    rows = codes.new_zeros(len(spans), TILE, k_blocks * TILE)
    for tile, span in enumerate(spans):
        rows[tile, : span.rows, : grid.k] = codes[span.start : span.start + span.rows]
    strips = rows.view(len(spans), TILE, k_blocks, TILE // FRACTAL, FRACTAL).permute(0, 2, 3, 1, 4)
    halves = strips.reshape(len(spans), k_blocks, 2, TILE * TILE // 2)
    lanes = halves.transpose(2, 3).reshape(len(spans), k_blocks, TILE * TILE)
    biased = scale[[span.scale_row for span in spans]] * DECODE_BIAS
    if not bool(torch.isfinite(biased).all()):
        raise BlockFp8Error(
            "a block scale is too large for the Ascend C kernels",
            expected=f"scales below {torch.finfo(torch.float32).max / DECODE_BIAS:.3g}",
            got=float(scale.max()),
            fix="the checkpoint is damaged, or use another backend",
        )
    scales = biased.unsqueeze(-1).expand(-1, -1, SCALE_REPEATS).contiguous()
    table = torch.zeros(len(spans), 8, dtype=torch.int32)
    for tile, span in enumerate(spans):
        table[tile, 0], table[tile, 1] = span.start, span.rows
    return lanes.contiguous(), scales, table.to(weight.device)


def linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    if packed.n == 0 or packed.k == 0 or x.shape[0] == 0:
        out = x.new_zeros(x.shape[0], packed.n)
        return out if bias is None else out + bias.to(x.dtype)
    x = x.contiguous()
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    if x.shape[0] > HAND_OVER_ROWS:
        return _through_scratch(x, packed, bias, activation)
    if x.shape[0] == 1 and packed.k <= MAX_GEMV_COLUMNS and _single_row_kernel() == "gemv":
        kernel = torch.ops.qwen3_fp8_ascend.ascendc_block_gemv
    else:
        kernel = torch.ops.qwen3_fp8_ascend.ascendc_block_linear
    return kernel(x, *packed.tensors, bias, packed.n, activation == "dynamic")


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


def dequantize_packed(packed: PackedWeight, out: torch.Tensor) -> torch.Tensor:
    """Dequantize a packed weight into a given tensor, so that one scratch can serve every layer.

    Shapes: out (n, k) fp16, bf16 or fp32, contiguous.
    """
    torch.ops.qwen3_fp8_ascend.ascendc_block_dequantize_out(*packed.tensors, out)
    return out


def _through_scratch(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    weight = dequantize_packed(packed, _scratch(packed.n, packed.k, x.dtype, x.device))
    if activation == "dynamic":
        codes, scale = torch.ops.qwen3_fp8_ascend.ascendc_group_quantize(x)
        values = _code_values(x.device)[codes.int()]
        x = (values * scale.repeat_interleave(TILE, dim=1)[:, : packed.k]).to(x.dtype)
    out = x @ weight.T
    return out if bias is None else out + bias


_SCRATCH: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def _scratch(n: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One buffer a dtype and device, as large as the largest weight that asked for it.

    Layers on one stream use it one after another; growing it keeps the old one alive as long as it is in use.
    """
    buffer = _SCRATCH.get((dtype, device))
    if buffer is None or buffer.numel() < n * k:
        buffer = _SCRATCH[dtype, device] = torch.empty(n * k, dtype=dtype, device=device)
    return buffer[: n * k].view(n, k)


@functools.cache
def _code_values(device: torch.device) -> torch.Tensor:
    """The value of each of the 256 codes, fp32, for devices that cannot convert e4m3."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


def quantize_activation(x: torch.Tensor, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if block_k != DEFAULT_BLOCK.k:
        raise BlockFp8Error(
            "the Ascend C backend quantizes in groups of 128", expected=DEFAULT_BLOCK.k, got=block_k, fix="use 128"
        )
    if x.numel() == 0:
        groups = ceil_div(x.shape[1], block_k)
        scale = x.new_zeros(x.shape[0], groups, dtype=torch.float32)
        return x.new_empty(x.shape, dtype=torch.uint8).view(torch.float8_e4m3fn), scale
    codes, scale = torch.ops.qwen3_fp8_ascend.ascendc_group_quantize(x.contiguous())
    return codes.view(torch.float8_e4m3fn), scale


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, grid: ShardGrid, dtype: torch.dtype) -> torch.Tensor:
    if weight.numel() == 0:
        return weight.new_empty(weight.shape, dtype=dtype)
    tensors = pack(weight, scale, grid)
    return torch.ops.qwen3_fp8_ascend.ascendc_block_dequantize(*tensors, grid.n, grid.k, dtype)


@functools.cache
def unusable() -> str | None:
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    if not LIBRARY.exists():
        return "built without CANN: install again with ASCEND_HOME_PATH set (CANN 8.5 or newer)"
    try:
        import torch_npu

        if not torch_npu.npu.is_available():
            return "torch_npu sees no NPU"
        chip = torch_npu.npu.get_device_name()
    except (ImportError, OSError, RuntimeError) as error:
        return f"torch_npu does not load: {error}"
    if not chip.startswith(SUPPORTED_CHIPS):
        return f"built for Atlas A2 (Ascend910B*) and A3 (Ascend910_93*), this NPU is {chip}"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    return _decode_fault(torch.device("npu", torch_npu.npu.current_device()))


def _decode_fault(device: torch.device) -> str | None:
    """Decode and multiply every finite code once, since the kernels rely on fp16 subnormals being kept.

    That the vector unit and the cube keep them was not seen on hardware when this was written.
    """
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, torch.zeros_like(codes), codes).repeat(64).view(TILE, TILE)
    expected = codes.view(torch.float8_e4m3fn).float()
    weight = codes.to(device).view(torch.float8_e4m3fn)
    grid = ShardGrid((TILE,), TILE)
    one = torch.ones(1, 1, device=device)
    packed = PackedWeight("ascendc", grid, pack(weight, one, grid))
    identity = torch.eye(TILE, device=device)
    decoded = dequantize_weight(weight, one, grid, torch.float32).cpu()
    columns = [linear(rows, packed, None, "none").cpu() for rows in identity.split(HAND_OVER_ROWS)]
    for name, got in (("decoding", decoded), ("multiplying", torch.cat(columns).T)):
        wrong = int((got != expected).sum())
        if wrong:
            return f"{name} all codes on this NPU gives {wrong} wrong values of {expected.numel()}; please report it"
    return None


def unsupported(block: BlockSize) -> str | None:
    if block != DEFAULT_BLOCK:
        return f"works on blocks of {DEFAULT_BLOCK}, not of {block}"
    return None


BACKEND = Backend(
    name="ascendc",
    summary="Ascend C kernels on Atlas A2 and A3: decoding on vector cores, products on the cube",
    computes=frozenset({"w8a8", "w8a16"}),
    device_types=frozenset({"npu"}),
    unusable=unusable,
    pack=pack,
    linear=linear,
    quantize_activation=quantize_activation,
    dequantize_weight=dequantize_weight,
    unsupported=unsupported,
)
