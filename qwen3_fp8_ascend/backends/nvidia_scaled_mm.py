"""The backend `nvidia` with many tokens handed to torch's block-scaled FP8 product: faster, not exact, by name only.

torch gives that product to cuBLAS, on compute capability 9.0. Hopper's tensor cores add FP8 products with about 14
bits, so 43 to 70 % of the bf16 results equal the rounded oracle, where exact kernels give 99.98 %; at 512 tokens it is
2.3 times as fast on an H100, the quantization included. `judges.judge_scaled_mm` is its bound. What the product does
not take goes through the exact kernels: up to `HAND_OVER_ROWS` tokens, where those are as fast; W8A16; fp16 and fp32; a
bias, which would be added to a rounded sum; shards or columns that are not whole blocks; experts.
"""

from __future__ import annotations

import dataclasses

import torch

from qwen3_fp8_ascend.backends import nvidia
from qwen3_fp8_ascend.backends.nvidia import launch
from qwen3_fp8_ascend.backends.nvidia.backend import check_packed, fake_linear
from qwen3_fp8_ascend.backends.operators import torch_operator
from qwen3_fp8_ascend.backends.registry import PackedWeight
from qwen3_fp8_ascend.backends.triton_host import ACTIVATIONS, check_operand
from qwen3_fp8_ascend.format import Activation, ceil_div

HAND_OVER_ROWS = 64
"""Most tokens for the exact kernel."""

ALIGNMENT = 16
"""cuBLAS reads scales and results in pieces of 16 bytes: tokens are filled up to a multiple."""

PLAN = "torch's block-scaled FP8 product, where it takes the operands: sums of about 14 bits"
"""For the backend's `plan`: what becomes of more tokens."""


def unusable() -> str | None:
    """The reason why torch has no such product here, or None."""
    if reason := nvidia.BACKEND.unusable():
        return reason
    if not hasattr(torch.nn.functional, "scaled_mm"):
        return f"torch {torch.__version__} has no scaled_mm"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "torch has a block-scaled FP8 product on compute capability 9.0 alone"
    return None


def takes(x: torch.Tensor, n: int, scale_rows: int, activation: Activation, bias: torch.Tensor | None) -> bool:
    """Whether the product is made by torch."""
    whole = launch.is_whole(n, scale_rows) and x.shape[1] % launch.BLOCK == 0
    quantized = activation is not Activation.W8A16
    return x.shape[0] > HAND_OVER_ROWS and whole and quantized and x.dtype == torch.bfloat16 and bias is None


def product(codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """torch's product.

    Shapes: codes (m, k) e4m3, scale (m, k_blocks) fp32 with the tokens side by side, weight (n, k) e4m3, w_scale
        (n / 128, k_blocks) fp32 -> (m, n) bf16.
    """
    kinds = torch.nn.functional.ScalingType
    out: torch.Tensor = torch.nn.functional.scaled_mm(
        codes,
        weight.t(),
        scale,
        kinds.BlockWise1x128,
        w_scale.t(),
        kinds.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return out


@torch_operator(fake_linear)
def nvidia_scaled_mm_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    w_scale: torch.Tensor,
    spans: torch.Tensor,
    activation: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ W.T + bias of a packed weight, by torch where `takes` says so.

    Shapes: as `nvidia_block_linear`.
    """
    check_operand("the activation", x, ACTIVATIONS, codes.device)
    check_packed("nvidia_scaled_mm_linear", x.shape[1], codes, w_scale, spans)
    how = Activation(activation)
    if not takes(x, codes.shape[0], w_scale.shape[0], how, bias):
        return launch.linear(x, codes, w_scale, spans, how, bias)
    m = x.shape[0]
    quantized, scale = launch.quantize_aligned(x, how, ceil_div(m, ALIGNMENT) * ALIGNMENT)
    out = product(quantized.view(torch.float8_e4m3fn), scale.t(), codes.view(torch.float8_e4m3fn), w_scale)
    return out[:m] if m % ALIGNMENT == 0 else out[:m].clone(memory_format=torch.contiguous_format)


def linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    return nvidia_scaled_mm_linear(x, *packed.tensors, activation.value, bias)


BACKEND = dataclasses.replace(
    nvidia.BACKEND,
    name="nvidia_scaled_mm",
    summary="as nvidia, with torch's block-scaled FP8 product for many tokens: faster, not exact",
    device_types=frozenset({"cuda"}),
    unusable=unusable,
    linear=linear,
    by_name_only=lambda: "only when asked for by name: its product for many tokens is not exact",
    plan=lambda: ((f"m <= {HAND_OVER_ROWS}", "fused kernel, exact"), (f"m > {HAND_OVER_ROWS}", PLAN)),
)
