"""What the CPU kernels are measured against: a raw read, torch, vLLM's packed operators, FBGEMM."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.format import Activation

Prepared = Callable[[torch.Tensor], Callable[[int], object]]
"""Takes activations (m, k) and returns the timed function of the round's number."""


@dataclass(frozen=True)
class Weights:
    """A random layer in both precisions, and how much memory its copies have to cover to be in no cache."""

    codes: torch.Tensor
    scale: torch.Tensor
    rotate_bytes: int

    @property
    def bf16(self) -> torch.Tensor:
        return reference.dequantize_weight(self.codes, self.scale)

    def copies(self, bytes_per_weight: int) -> int:
        return max(2, -(-self.rotate_bytes // (self.codes.numel() * bytes_per_weight)))


@dataclass(frozen=True)
class Peer:
    """`prepare` lays out all copies of a weight; `unavailable` is the reason why it cannot run here, or None."""

    name: str
    bytes_per_weight: int
    computes: str
    prepare: Callable[[Weights], Prepared]
    unavailable: Callable[[], str | None] = lambda: None


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on 2 MiB pages, so that no implementation is slower for want of them."""
    size = tensor.numel() * tensor.element_size()
    memory = mmap.mmap(-1, size + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    offset = -flat.data_ptr() % (2 << 20)
    return flat[offset : offset + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _ours(activation: Activation) -> Callable[[Weights], Prepared]:
    def prepare(weights: Weights) -> Prepared:
        packed = [ops.pack_weight(weights.codes, weights.scale, backend="cpu") for _ in range(weights.copies(1))]
        return lambda x: lambda i: ops.block_linear(x, packed[i % len(packed)], None, activation)

    return prepare


def _read(weights: Weights) -> Prepared:
    copies = [on_huge_pages(weights.codes.view(torch.uint8)) for _ in range(weights.copies(1))]
    return lambda x: lambda i: torch.ops.qwen3_fp8_ascend.cpu_read(copies[i % len(copies)])


def _torch_bf16(weights: Weights) -> Prepared:
    copies = [on_huge_pages(weights.bf16) for _ in range(weights.copies(2))]
    return lambda x: lambda i: torch.nn.functional.linear(x, copies[i % len(copies)])


def vllm_operator_missing(name: str) -> str | None:
    """Why one of vLLM's CPU operators is not there, or None; if there, it is loaded.

    vLLM has one library for each instruction set and chooses by itself; they do not hold the same operators, and
    importing one that the processor cannot run ends the process.
    """
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        return f"vLLM cannot be loaded: {error}"
    current_platform.import_kernels()
    if hasattr(torch.ops._C, name):
        return None
    return f"vLLM's library for this processor has no {name}"


def _vllm_bf16(weights: Weights) -> Prepared:
    packed = torch.ops._C.convert_weight_packed(weights.bf16)
    copies = [on_huge_pages(packed) for _ in range(weights.copies(2))]

    def run(x: torch.Tensor) -> Callable[[int], object]:
        out = torch.empty(x.shape[0], weights.codes.shape[0], dtype=x.dtype)
        return lambda i: torch.ops._C.weight_packed_linear(out, x, copies[i % len(copies)], None, True)

    return run


def _vllm_fp8(weights: Weights) -> Prepared:
    packed = torch.ops._C.convert_weight_packed(weights.codes)
    copies = [on_huge_pages(packed) for _ in range(weights.copies(1))]
    scale = weights.scale
    return lambda x: (
        lambda i: torch.ops._C.fp8_scaled_mm_cpu(
            x, copies[i % len(copies)], scale, [128, 128], None, torch.bfloat16, True
        )
    )


def _fbgemm_missing() -> str | None:
    return None if "fbgemm" in torch.backends.quantized.supported_engines else "this torch has no FBGEMM"


def _fbgemm_int8(weights: Weights) -> Prepared:
    torch.backends.quantized.engine = "fbgemm"
    n, k = weights.codes.shape
    quantized = torch.quantize_per_channel(
        weights.bf16.float(), torch.full((n,), 1e-3), torch.zeros(n, dtype=torch.long), 0, torch.qint8
    )
    layers = []
    for _ in range(weights.copies(1)):
        layer = torch.ao.nn.quantized.dynamic.Linear(k, n, bias_=False)
        layer.set_weight_bias(quantized, None)
        layers.append(layer)

    def run(x: torch.Tensor) -> Callable[[int], object]:
        wide = x.float()
        return lambda i: layers[i % len(layers)](wide)

    return run


PEERS = (
    Peer("w8a8", 1, "w8a8", _ours(Activation.W8A8)),
    Peer("w8a16", 1, "w8a16", _ours(Activation.W8A16)),
    Peer("read", 1, "reads the same bytes", _read),
    Peer("torch bf16", 2, "bf16", _torch_bf16),
    Peer("vllm bf16", 2, "bf16", _vllm_bf16, lambda: vllm_operator_missing("weight_packed_linear")),
    Peer("vllm fp8", 1, "w8a16", _vllm_fp8, lambda: vllm_operator_missing("fp8_scaled_mm_cpu")),
    Peer("fbgemm int8", 1, "int8 per channel", _fbgemm_int8, _fbgemm_missing),
)
"""Ours first, then the limit, then the others."""
