"""What the operators of the CPU library return, by shape and dtype: their fake implementations.

Each function's parameters have the names of the operator's own, which is how a library of another version is noticed.
"""

from __future__ import annotations

import inspect

import torch

from qwen3_fp8_ascend.format import ceil_div

_OPS = torch.ops.qwen3_fp8_ascend


def register() -> None:
    """Give the loaded library's operators their fake implementations.

    Raises:
        RuntimeError: the library has no such operator, or one with other operands.
    """
    operators = (
        block_linear,
        grouped_linear,
        glu_product,
        block_experts,
        quantize_activation,
        dequantize_weight,
        pack,
    )
    for function in operators:
        name = f"cpu_{function.__name__}"
        torch.library.register_fake(f"qwen3_fp8_ascend::{name}", function)
        takes = [argument.name for argument in getattr(_OPS, name).default._schema.arguments]
        if takes != list(inspect.signature(function).parameters):
            raise RuntimeError(f"{name} takes {', '.join(takes)}")


def _same_device(first: torch.Tensor, *others: torch.Tensor) -> None:
    """One tensor on the meta device among others sends a call here: unchecked, the result would be arbitrary."""
    devices = {t.device for t in (first, *others)}
    torch._check(len(devices) == 1, lambda: f"tensors are on different devices: {sorted(map(str, devices))}")


def block_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    panels: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    block_k: int,
    quantization: int,
) -> torch.Tensor:
    others = [codes, scales, panels] if bias is None else [codes, scales, panels, bias]
    _same_device(x, *others)
    torch._check(x.dim() == 2 and x.shape[1] == k, lambda: f"x must have shape (m, {k}), got {tuple(x.shape)}")
    torch._check(bias is None or bias.shape == (n,), lambda: f"bias must have {n} elements")
    return x.new_empty((x.shape[0], n))


def grouped_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    panels: torch.Tensor,
    ends: torch.Tensor,
    n: int,
    k: int,
    block_k: int,
    quantization: int,
) -> torch.Tensor:
    _same_device(x, codes, scales, panels, ends)
    torch._check(x.dim() == 2 and x.shape[1] == k, lambda: f"x must have shape (m, {k}), got {tuple(x.shape)}")
    return x.new_empty((x.shape[0], n))


def glu_product(
    x: torch.Tensor, gate_limit: float, act_limit: float, up_limit: float, alpha: float, cubic: float, beta: float
) -> torch.Tensor:
    torch._check(x.dim() == 2, lambda: f"x must have 2 dimensions, got {x.dim()}")
    return x.new_empty((x.shape[0], x.shape[1] // 2))


def block_experts(
    x: torch.Tensor,
    w13_codes: torch.Tensor,
    w13_scales: torch.Tensor,
    w13_panels: torch.Tensor,
    w2_codes: torch.Tensor,
    w2_scales: torch.Tensor,
    w2_panels: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    intermediate: int,
    block_k: int,
    quantization: int,
    gate_limit: float,
    act_limit: float,
    up_limit: float,
    alpha: float,
    cubic: float,
    beta: float,
) -> torch.Tensor:
    _same_device(x, w13_codes, w13_scales, w13_panels, w2_codes, w2_scales, w2_panels, topk_weights, topk_ids)
    torch._check(x.dim() == 2, lambda: f"x must have 2 dimensions, got {x.dim()}")
    return x.new_empty(x.shape)


def quantize_activation(x: torch.Tensor, block_k: int, quantization: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch._check(x.dim() == 2, lambda: f"x must have 2 dimensions, got {x.dim()}")
    torch._check(block_k >= 1, lambda: f"block_k must be positive, got {block_k}")
    groups = ceil_div(x.shape[1], block_k)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0], groups), dtype=torch.float32)


def dequantize_weight(
    weight: torch.Tensor, scales: torch.Tensor, scale_rows: torch.Tensor, block_k: int, dtype: torch.dtype
) -> torch.Tensor:
    _same_device(weight, scales, scale_rows)
    torch._check(weight.dim() == 2, lambda: f"weight must have 2 dimensions, got {weight.dim()}")
    return weight.new_empty(weight.shape, dtype=dtype)


def pack(weight: torch.Tensor, panels: torch.Tensor, codes: torch.Tensor) -> None:
    _same_device(weight, panels, codes)
