"""Many rows on a chip whose matrix unit knows no FP8: one scratch for all layers, then the stock matrix product.

From some number of rows on, decoding each weight once and multiplying with the stock product beats any fused kernel
(docs/ascendc.md). The decoded weight goes into one buffer a device, as large as the largest weight that uses it, which
every layer overwrites in turn: layers of one device run one after another on one stream. It is allocated when weights
are packed, before any graph is captured, and is part of the memory that vLLM profiles.
"""

from __future__ import annotations

import torch

from qwen3_fp8_ascend.errors import BlockFp8Error

SCRATCH_LIMIT = 1 << 30
"""Bytes, at two a weight. Larger weights (output heads) keep to the fused kernel: they are asked for few rows, and
the largest linear of a 32B model takes 0.5 GB."""

RESERVED_ITEMSIZE = 2
"""Served models run in bf16 or fp16; an fp32 activation lets the scratch grow when first used."""

_scratch: dict[torch.device, torch.Tensor] = {}


def fits(elements: int) -> bool:
    """Whether a weight of that many elements may use the scratch at all."""
    return elements * RESERVED_ITEMSIZE <= SCRATCH_LIMIT


def reserve(elements: int, device: torch.device) -> None:
    """See to it that a weight of that many elements has room; called when weights are packed."""
    if fits(elements):
        _at_least(elements * RESERVED_ITEMSIZE, device)


def scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The first part of the device's scratch as a matrix; what is in it belongs to whoever wrote last.

    Shapes: -> (rows, columns) `dtype`, contiguous.
    Raises:
        BlockFp8Error: it would have to grow while a graph is captured.
    """
    size = rows * columns * dtype.itemsize
    return _at_least(size, device).narrow(0, 0, size).view(dtype).view(rows, columns)


def reserved_bytes(device: torch.device) -> int:
    """Size of a device's scratch."""
    return _scratch[device].numel() if device in _scratch else 0


def multiply(x: torch.Tensor, weight: torch.Tensor, n: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The stock matrix product with a weight that may be padded.

    Shapes: x (m, k), weight (n' >= n, k' >= k), zeros beyond k, bias (n,) -> (m, n) contiguous.
    Semantics: the bias is rounded to x.dtype and goes into the product, which adds it to its fp32 sums.
    """
    columns = weight.shape[1]
    padded = x if x.shape[1] == columns else torch.nn.functional.pad(x, (0, columns - x.shape[1]))
    return torch.nn.functional.linear(padded, weight.narrow(0, 0, n), None if bias is None else bias.to(x.dtype))


def _at_least(size: int, device: torch.device) -> torch.Tensor:
    buffer = _scratch.get(device)
    if buffer is None or buffer.numel() < size:
        if _capturing(device):
            raise BlockFp8Error(
                "the prefill scratch would have to grow while a graph is captured",
                expected=f"{size} bytes reserved on {device} when the weights were packed",
                got=reserved_bytes(device),
                fix="run one batch of this dtype before the capture, or serve in bf16 or fp16",
            )
        buffer = _scratch[device] = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer


def _capturing(device: torch.device) -> bool:
    module = getattr(torch, device.type, None)
    return bool(getattr(module, "is_current_stream_capturing", lambda: False)())
