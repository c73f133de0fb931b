"""e4m3 codes to the 16-bit floats that the tensor cores multiply."""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

_FP16_MAGNITUDE = tl.constexpr(0x3F80)


@triton.jit
def decode(codes, HARDWARE: tl.constexpr, TYPE: tl.constexpr):
    """Values of e4m3 codes.

    Shapes: codes, any shape, uint8 -> the same shape, TYPE: fp16, bf16 or fp32, each of which holds every value.
    Semantics: exact for every finite code. HARDWARE: by the conversion of compute capability 8.9 and later, NaN codes
        become NaN. Otherwise the code's bits, moved, are an fp16 number 256 times too small, which one product mends;
        e4m3's subnormals pass through fp16's, which PTX keeps. NaN codes become +-480 (weights that hold one are
        refused when they are packed; `decode_nan` mends them).
    """
    if HARDWARE:
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        wide = codes.to(tl.int16)
        moved = ((wide << 7) & _FP16_MAGNITUDE) | ((wide & 0x80) << 8)
        value = moved.to(tl.float16, bitcast=True) * 256.0
    # To bf16 by way of fp32: for the direct way compute capability 9.0 has an instruction that converts one number at a
    # time at a quarter of the rate, which would take as long as the weight takes to arrive.
    return value if tl.float16 == TYPE else value.to(tl.float32).to(TYPE)


@triton.jit
def decode_nan(codes, HARDWARE: tl.constexpr):
    """`decode` to fp32 with NaN for NaN codes in either form."""
    value = decode(codes, HARDWARE, tl.float32)
    if not HARDWARE:
        value = tl.where((codes & 0x7F) == 0x7F, float("nan"), value)
    return value


def decode_specification(codes: torch.Tensor) -> torch.Tensor:
    """What `decode` computes, but for NaN codes without the hardware.

    Shapes: codes, any shape, uint8 -> the same shape, fp32.
    """
    return codes.view(torch.float8_e4m3fn).float()
