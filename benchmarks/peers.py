"""Peers that are no part of the package: a raw read, vLLM's packed operators and its Triton kernel, FBGEMM."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qwen3_fp8_ascend.backends import cpu
from qwen3_fp8_ascend.testing.contenders import Peer, Prepared, Weights, on_huge_pages
from qwen3_fp8_ascend.testing.devices import Device
from qwen3_fp8_ascend.testing.timing import interleave

READ_AHEAD = (0, 1024, 2048, 4096, 8192)
"""Bytes ahead that the raw read may prefetch; which is best differs between processors."""


def best_read_ahead(pieces: Sequence[torch.Tensor], seconds: float) -> int:
    """The prefetching distance with which the raw read of such pieces is fastest on this machine, with one thread.

    Each distance starts with another piece, so that none finds in a cache what its neighbour has just read.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def read(ahead: int, number: int) -> Callable[[int], object]:
        return lambda i: torch.ops.qwen3_fp8_ascend.cpu_read(pieces[(i + number) % len(pieces)], ahead)

    timings = interleave({str(a): read(a, n) for n, a in enumerate(READ_AHEAD)}, seconds=seconds, least=10)
    torch.set_num_threads(before)
    return int(min(timings, key=lambda name: timings[name].median))


def _read(weights: Weights) -> Prepared:
    copies = [on_huge_pages(weights.codes.view(torch.uint8)) for _ in range(weights.copies(1))]
    ahead = best_read_ahead(copies, seconds=1)
    return lambda x: lambda i: torch.ops.qwen3_fp8_ascend.cpu_read(copies[i % len(copies)], ahead)


def _multiply_add_missing() -> str | None:
    if torch.ops.qwen3_fp8_ascend.cpu_has_multiply_add():
        return None
    return f"there is no loop of bare multiply-adds for {cpu.isa()}"


def _multiply_add(weights: Weights) -> Prepared:
    """As many multiply-adds as the linear has, in registers: the multiplier's limit."""
    count = weights.codes.numel()
    return lambda x: lambda i: torch.ops.qwen3_fp8_ascend.cpu_multiply_add(len(x) * count)


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


def _vllm_triton_missing() -> str | None:
    try:
        from vllm.model_executor.layers.quantization.utils import fp8_utils
    except ImportError as error:
        return f"vLLM cannot be loaded: {error}"
    return None if hasattr(fp8_utils, "w8a8_triton_block_scaled_mm") else "this vLLM has no such kernel"


def _vllm_triton(weights: Weights) -> Prepared:
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    copies = [weights.codes.clone() for _ in range(weights.copies(1))]

    def run(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        quantized, x_scale = fp8_utils.per_token_group_quant_fp8(x, 128)
        return fp8_utils.w8a8_triton_block_scaled_mm(quantized, codes, x_scale, weights.scale, [128, 128], x.dtype)

    return lambda x: lambda i: run(x, copies[i % len(copies)])


def peers(device: Device) -> tuple[Peer, ...]:
    """Those for the device."""
    if device.kind == "cpu":
        return (
            Peer("read", 1, "reads the same bytes", _read),
            Peer("multiply-adds", 1, "as many, from registers", _multiply_add, _multiply_add_missing),
            Peer("vllm bf16", 2, "bf16", _vllm_bf16, lambda: vllm_operator_missing("weight_packed_linear")),
            Peer("vllm fp8", 1, "w8a16", _vllm_fp8, lambda: vllm_operator_missing("fp8_scaled_mm_cpu")),
            Peer("fbgemm int8", 1, "int8 per channel", _fbgemm_int8, _fbgemm_missing),
        )
    if device.kind == "cuda":
        return (Peer("vllm Triton", 1, "w8a8", _vllm_triton, _vllm_triton_missing),)
    return ()
