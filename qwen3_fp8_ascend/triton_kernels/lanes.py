"""The packed weight: two e4m3 codes in each 16-bit lane, and how a lane becomes fp16 values.

A lane of K-block pair p holds the code of block 2p in its low byte and that of block 2p + 1, same row and
column, in its high byte. One step of a kernel decodes one of the two: multiplied by 256 or by 1, a lane has the
wanted code in its high byte, so both cases are the same instructions with another scalar. Decoding both at once
would save the second read (which hits L2), but BiShengIR then no longer splits the work over the two vector
cores of an AI core, which costs more.
"""

# Kernels cannot be annotated for mypy: their arguments are what Triton makes of them.
# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

LANE_BLOCK = 128
"""Columns of a K block: the checkpoint format's own block."""

_CODE_MASK = tl.constexpr(-16512)  # 0xBF80: the sign, and the seven bits below the unused bit 14
_SIGN_MASK = tl.constexpr(-32768)
_EXPONENT_LIFT = tl.constexpr(8 << 10)  # fp16's bias is 15, e4m3's is 7
_SMALLEST_NORMAL_BITS = tl.constexpr(9 << 10)  # 2^-6, e4m3's smallest normal number, as fp16


@triton.jit
def decode_lane(lane, KEEPS_SUBNORMALS: tl.constexpr):
    """fp16 values of the e4m3 codes in the high byte of int16 lanes; the low byte may hold anything.

    Shapes: lane, any shape, int16 -> the same shape, fp16.
    Semantics: exact for every finite code; NaN codes become +-480 (they are refused when a weight is packed).
        KEEPS_SUBNORMALS: the code's bits, moved, are an fp16 number 256 times too small, which one product mends.
        But e4m3 subnormals pass through fp16 subnormals, so the vector unit must not flush those to zero.
        Otherwise no subnormal is ever formed: with c = 2^-6 and t the code read as if its leading mantissa bit were
        always there (so that t = c/2 (1 + m/8) for a subnormal code), |value| = 2t - max(t, c); exact in fp16.
        max() of two numbers of one sign is the integer maximum of their patterns, negative or not.
    """
    moved = lane >> 1
    signed = moved & _CODE_MASK
    if KEEPS_SUBNORMALS:
        value = signed.to(tl.float16, bitcast=True) * 256.0
    else:
        lifted = signed + _EXPONENT_LIFT
        larger = tl.maximum(lifted, (moved & _SIGN_MASK) | _SMALLEST_NORMAL_BITS)
        t = lifted.to(tl.float16, bitcast=True)
        # ascendnpu-ir 1.1.0 needs an operand of the cube to come from arithmetic, not from a bitcast.
        value = (t - larger.to(tl.float16, bitcast=True)) + t
    return value


@triton.jit
def half_selector(k_block):
    """The int16 factor that brings the code of `k_block` into the high byte of its pair's lane: 256 or 1."""
    return tl.full((1, 1), 256 - 255 * (k_block % 2), tl.int16)


def pack_lanes(codes: torch.Tensor) -> torch.Tensor:
    """Lay codes out as lanes; a tile of rows is contiguous within a pair of K blocks, so that one copy fetches it.

    Shapes: codes (n, k) int8, k a multiple of 256 -> (k / 256, n, 128) int16.
    """
    n, k = codes.shape
    pairs = codes.reshape(n, k // (2 * LANE_BLOCK), 2, LANE_BLOCK)
    # Not contiguous(): it leaves a tensor without elements strided, and torch before 2.12 refuses to view that.
    return pairs.permute(1, 0, 3, 2).clone(memory_format=torch.contiguous_format).view(torch.int16).squeeze(-1)


def unpack_lanes(lanes: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_lanes`.

    Shapes: lanes (k / 256, n, 128) int16 -> (n, k) int8.
    """
    pairs, n, _ = lanes.shape
    return lanes.unsqueeze(-1).view(torch.int8).permute(1, 0, 3, 2).reshape(n, pairs * 2 * LANE_BLOCK)


def decode_lane_specification(lane: torch.Tensor) -> torch.Tensor:
    """What `decode_lane` computes.

    Shapes: lane, any shape, int16 -> the same shape, fp32.
    """
    return (lane >> 8).to(torch.int8).view(torch.float8_e4m3fn).float()
