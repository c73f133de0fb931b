"""Activations: groups of 128 channels to e4m3 codes, to the values of those codes, or to scaled fp16.

The linear kernels take fp16 values, not codes: the cube then reads activations straight from memory, and no
vector core decodes them again for every weight tile. e4m3 values are exact in fp16.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.triton_kernels.lanes import LANE_BLOCK

GROUP = tl.constexpr(LANE_BLOCK)
_E4M3_MAX = tl.constexpr(448.0)
_AMAX_FLOOR = tl.constexpr(1e-10)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_MANTISSA_BITS = tl.constexpr(0x7FFFFF)
_LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
_FP16_MAX = tl.constexpr(65504.0)

CODE_VALUES = tl.constexpr(0)
"""`group_values_kernel`: round to e4m3 (w8a8)."""
SCALED = tl.constexpr(1)
"""`group_values_kernel`: divide by a power of two and keep fp16's eleven bits (w8a16)."""
RESIDUAL = tl.constexpr(2)
"""`group_values_kernel`: what SCALED lost, in fp16 too, for fp32 activations."""
CODE_VALUES_UE8M0 = tl.constexpr(3)
"""`group_values_kernel`: as CODE_VALUES, with scales that are powers of two (w8a8-ue8m0)."""


@triton.jit
def _maximum(x, y):
    # Without PropagateNan.ALL the Ascend back end spends seven operations on this.
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _minimum(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _amax(x):
    """The largest magnitude in each row, (rows, 128) fp32 -> (rows,) fp32; NaN if there is one.

    Patterns of magnitudes are ordered as the magnitudes are, NaN above infinity; tl.max on floats drops NaN.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3_scale(x, UE8M0: tl.constexpr):
    """The scale of each row of x, (rows, 128) fp32 -> (rows,) fp32; UE8M0: rounded up to a power of two.

    Any bit of the mantissa carries into the exponent. An infinity takes part as the largest float, which becomes
    infinity. A NaN may become anything, and comes back by the maximum of both. (As an integer, the minimum is what
    ascendnpu-ir 1.1.0 cannot compile.)
    """
    amax = _amax(x)
    scale = tl.div_rn(_maximum(amax, _AMAX_FLOOR), tl.full(amax.shape, _E4M3_MAX, tl.float32))
    if UE8M0:
        bits = _minimum(scale, _LARGEST_FLOAT).to(tl.int32, bitcast=True)
        scale = _maximum(((bits + _MANTISSA_BITS) & _INFINITY_BITS).to(tl.float32, bitcast=True), scale)
    return scale


@triton.jit
def _divide_and_clamp(x, scale):
    scaled = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    return _minimum(_maximum(scaled, -_E4M3_MAX), _E4M3_MAX)


@triton.jit
def _e4m3_code(y):
    """Codes of fp32 numbers within +-448 as int32 of 0...255, round to nearest even, NaN -> 0x7F; no selects.

    A normal code is the fp32 pattern rounded at its third mantissa bit and rebiased. A subnormal one is
    |y| * 512 rounded to an integer, which adding 2^14 leaves in the low bits. Each is the smaller of the two
    exactly where it is right, given that the first is held at 8 or more. Patterns of NaN go up to 0x7FFFFFFF, where
    that rounding would leave int32: infinity, which cannot occur otherwise, stands for all of them.
    """
    bits = y.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, _INFINITY_BITS)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    # 126 is the largest finite code; infinity's pattern lands above it.
    code = tl.minimum(tl.minimum(subnormal, tl.maximum(normal, 8)), 127) | ((bits >> 24) & 0x80)
    return code - (((code + 1) >> 8) << 7)  # 0xFF, a NaN whose sign was set, becomes 0x7F


@triton.jit
def _e4m3_value(y):
    """fp32 numbers within +-448 rounded to the e4m3 grid, to nearest even: the grid's step is added and taken off.

    1.5 * 2^(e + 20), e being y's exponent held at -6 or more, has 2^(e - 3), e4m3's step there, as its last bit.
    """
    exponent = _maximum(tl.abs(y), 0.015625).to(tl.int32, bitcast=True) & 0x7F800000
    magic = (exponent + ((20 << 23) + (1 << 22))).to(tl.float32, bitcast=True)
    return (y + magic) - magic


@triton.jit
def group_quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, groups, UE8M0: tl.constexpr, ROWS: tl.constexpr, CORES: tl.constexpr
):
    """codes and scales of x, a contiguous tensor seen as (groups, 128).

    Shapes: x (groups, 128) bf16/fp16/fp32 -> codes (groups, 128) int8 view of e4m3, scale (groups,) fp32.
    Semantics: `group_quantize_specification`, bit for bit.
    """
    for tile in range(tl.program_id(0), tl.cdiv(groups, ROWS), CORES):
        row = tile * ROWS + tl.arange(0, ROWS)
        offset = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = row[:, None] < groups
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        scale = _e4m3_scale(x, UE8M0)
        code = _e4m3_code(_divide_and_clamp(x, scale))
        tl.store(codes_ptr + offset, code.to(tl.int8), mask=inside)
        tl.store(scale_ptr + row, scale, mask=row < groups)


@triton.jit
def group_values_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    m,
    m_padded,
    x_blocks,
    k_blocks,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    CORES: tl.constexpr,
):
    """What the linear kernels multiply: fp16 values and their scales, zero in the padding.

    Shapes: x (m, 128 x_blocks) contiguous -> values (m_padded, 128 k_blocks) fp16,
        scale (k_blocks, m_padded) fp32. ROWS divides m_padded; x_blocks <= k_blocks.
    Semantics: `group_values_specification`, bit for bit.
    """
    row_tiles = m_padded // ROWS
    for tile in range(tl.program_id(0), row_tiles * k_blocks, CORES):
        k_block = tile // row_tiles
        row = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
        column = k_block * GROUP + tl.arange(0, GROUP)
        rows_here = tl.where(k_block < x_blocks, m, 0)
        x = tl.load(
            x_ptr + row[:, None] * (x_blocks * GROUP) + column[None, :], mask=row[:, None] < rows_here, other=0.0
        ).to(tl.float32)
        if (KIND == CODE_VALUES) | (KIND == CODE_VALUES_UE8M0):
            scale = _e4m3_scale(x, KIND == CODE_VALUES_UE8M0)
            value = _e4m3_value(_divide_and_clamp(x, scale))
        else:
            # The largest magnitude lands in [2^14, 2^15); 2^-100 keeps the reciprocal of the scale finite.
            amax = _maximum(_amax(x), 7.888609052210118e-31)
            exponent = amax.to(tl.int32, bitcast=True) & 0x7F800000
            scale = (exponent - (14 << 23)).to(tl.float32, bitcast=True)
            reciprocal = (((254 << 23) - exponent) + (14 << 23)).to(tl.float32, bitcast=True)
            value = x * reciprocal[:, None]
            if KIND == RESIDUAL:
                # What SCALED keeps of an infinity is all of it: inf - inf would make NaN of the sum of the two.
                value = _minimum(_maximum(value, -_FP16_MAX), _FP16_MAX)
                value = value - value.to(tl.float16).to(tl.float32)
        tl.store(values_ptr + row[:, None] * (k_blocks * GROUP) + column[None, :], value.to(tl.float16))
        tl.store(scale_ptr + k_block * m_padded + row, scale)


def group_quantize_specification(x: torch.Tensor, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """What `group_quantize_kernel` computes.

    Shapes: x (groups, 128) -> codes (groups, 128) int8, scale (groups,) fp32.
    Source: `qwen3_fp8_ascend.reference.quantize_activation`.
    """
    codes, scale = reference.quantize_activation(x, LANE_BLOCK, Activation.W8A8_UE8M0 if ue8m0 else Activation.W8A8)
    return codes.view(torch.int8), scale.flatten()


def group_values_specification(
    x: torch.Tensor, m_padded: int, k_blocks: int, kind: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `group_values_kernel` computes.

    Shapes: x (m, k), k a multiple of 128 -> values (m_padded, 128 k_blocks) fp16, scale (k_blocks, m_padded) fp32.
    """
    m, k = x.shape
    rows = torch.nn.functional.pad(x.float(), (0, k_blocks * LANE_BLOCK - k, 0, m_padded - m))
    if kind in (CODE_VALUES.value, CODE_VALUES_UE8M0.value):
        activation = Activation.W8A8 if kind == CODE_VALUES.value else Activation.W8A8_UE8M0
        codes, scale = reference.quantize_activation(rows, LANE_BLOCK, activation)
        values = codes.to(torch.float16)
    else:
        groups = rows.unflatten(-1, (k_blocks, LANE_BLOCK))
        amax = groups.abs().amax(-1).clamp_min(2.0**-100)
        exponent = torch.where(amax.isfinite(), torch.frexp(amax).exponent - 1, 128)
        scale = torch.exp2(exponent.float() - 14)
        exact = groups / scale[..., None]
        kept = exact.to(torch.float16)
        lost = torch.where(exact.isinf(), 0.0, exact - kept.float())
        values = (kept if kind == SCALED.value else lost.to(torch.float16)).flatten(1)
    return values, (scale).T.contiguous()
