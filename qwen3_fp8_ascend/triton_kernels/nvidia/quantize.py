"""Activations in groups of 128 channels: to e4m3 codes, or to the values of those codes in fp16.

The arithmetic is that of `triton_kernels.group_quantize`. The linears take values: a tile of them goes to the tensor
cores as it is, while codes would be converted again by every tile of the weight. Nothing is padded, and x may have any
stride from token to token, so that quantization is one launch.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.triton_kernels.group_quantize import _divide_and_clamp, _e4m3_code, _e4m3_scale, _e4m3_value
from qwen3_fp8_ascend.triton_kernels.nvidia.dependent import (
    wait_before_a_launch_of_ours,
    wait_for_the_launch_before,
)

GROUP = tl.constexpr(128)


@triton.jit(do_not_specialize=["m", "scale_token", "scale_block"])
def quantize_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    m,
    k,
    x_stride,
    out_stride,
    k_blocks,
    scale_token,
    scale_block,
    CODES: tl.constexpr,
    UE8M0: tl.constexpr,
    GROUPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Quantize GROUPS groups a program.

    Shapes: x (m, k) bf16/fp16/fp32, rows x_stride apart -> out (m, k) uint8 codes if CODES, else
        (m, 128 k_blocks) fp16 values, zero behind k; rows out_stride apart. scale fp32: that of token t and block b at
        t * scale_token + b * scale_block.
    Semantics: `quantize_specification`, bit for bit. DEPENDENT: see `dependent`; behind values comes a linear of ours.
    """
    if DEPENDENT:
        if CODES:
            wait_for_the_launch_before()
        else:
            wait_before_a_launch_of_ours()
    index = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)  # 2^31 groups are more than a GPU holds
    block = index % k_blocks
    token = (index // k_blocks).to(tl.int64)
    column = block[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = (token < m)[:, None]
    x = tl.load(x_ptr + token[:, None] * x_stride + column, mask=there & (column < k), other=0.0).to(tl.float32)
    scale = _e4m3_scale(x, UE8M0)
    scaled = _divide_and_clamp(x, scale)
    to = out_ptr + token[:, None] * out_stride + column
    if CODES:
        tl.store(to, _e4m3_code(scaled).to(tl.uint8), mask=there & (column < k))
    else:
        tl.store(to, _e4m3_value(scaled).to(tl.float16), mask=there)
    tl.store(scale_ptr + token * scale_token + block * scale_block, scale, mask=token < m)


def quantize_specification(x: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_kernel` computes: codes (m, k) e4m3, scale (m, ceil(k / 128)) fp32.

    Source: `qwen3_fp8_ascend.reference.quantize_activation`.
    """
    return reference.quantize_activation(x, GROUP.value, activation)
