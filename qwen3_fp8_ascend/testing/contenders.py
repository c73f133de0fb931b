"""What is timed beside each other: our backends, the framework's own ways, a copy of the same number of bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import cpu
from qwen3_fp8_ascend.backends.registry import usable_backends
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.devices import Device
from qwen3_fp8_ascend.testing.timing import Contender

Prepared = Callable[[torch.Tensor], Contender]
"""Takes activations (m, k) on the device and returns the timed function of the call's number."""


@dataclass(frozen=True)
class Weights:
    """A random layer on a device, and how much memory its copies have to cover to be in no cache."""

    codes: torch.Tensor
    scale: torch.Tensor
    rotate_bytes: int
    device: Device

    @functools.cached_property
    def bf16(self) -> torch.Tensor:
        """The layer expanded, on the device."""
        codes = self.codes.view(torch.uint8).cpu().view(torch.float8_e4m3fn)
        return reference.dequantize_weight(codes, self.scale.cpu()).to(self.device.place)

    def copies(self, bytes_per_weight: int) -> int:
        return max(2, -(-self.rotate_bytes // (self.codes.numel() * bytes_per_weight)))

    @functools.cached_property
    def packed(self) -> dict[str, list[ops.PackedWeight]]:
        """Copies by backend, made when they are first asked for."""
        return {}

    def packed_for(self, backend: str, readers: int) -> list[ops.PackedWeight]:
        """At least as many as there are `readers` of them in a round."""
        if backend not in self.packed:
            once = range(max(readers, self.copies(1)))
            self.packed[backend] = [
                ops.pack_weight(self.codes, self.scale, backend=backend, check_values=False) for _ in once
            ]
        return self.packed[backend]


@dataclass(frozen=True)
class Peer:
    """`prepare` lays out all copies of a weight; `unavailable` is the reason why it cannot run here, or None.

    computes: "w8a8", "w8a16", or what else it does in words. backend: whose it is, None for others.
    """

    name: str
    bytes_per_weight: int
    computes: str
    prepare: Callable[[Weights], Prepared]
    unavailable: Callable[[], str | None] = lambda: None
    backend: str | None = None


def ours(device: Device) -> Iterator[Peer]:
    """Every backend for the device but the slow ones, with all that it computes; on a CPU each instruction set too.

    W8A8 with scales that are powers of two is left out: it is the same work.
    """
    for backend in usable_backends(device.place.type, slow=False):
        activations = [a for a in (Activation.W8A8, Activation.W8A16) if a in backend.computes]
        isas = cpu.isas()[:-1] if backend.name == "cpu" else []
        readers = len(activations) + len(isas)
        for place, activation in enumerate(activations):
            prepare = functools.partial(_packed, backend.name, activation, place, readers)
            yield Peer(f"{backend.name} {activation}", 1, activation, prepare, backend=backend.name)
        for place, isa in enumerate(isas, start=len(activations)):
            prepare = functools.partial(_instruction_set, isa, place, readers)
            yield Peer(f"cpu w8a8, {isa}", 1, "w8a8", prepare, backend="cpu")


def _packed(backend: str, activation: Activation, place: int, readers: int, weights: Weights) -> Prepared:
    packed = _from_a_place(weights.packed_for(backend, readers), place, readers)
    return lambda x: lambda i: ops.block_linear(x, packed[i % len(packed)], None, activation)


def _from_a_place(copies: list[ops.PackedWeight], place: int, readers: int) -> list[ops.PackedWeight]:
    """All of them, for one reader of several: in a round each takes another, since what was just read is in a cache."""
    first = place * len(copies) // readers
    return copies[first:] + copies[:first]


def _instruction_set(isa: str, place: int, readers: int, weights: Weights) -> Prepared:
    packed = _from_a_place(weights.packed_for("cpu", readers), place, readers)

    def prepare(x: torch.Tensor) -> Contender:
        def run(i: int) -> torch.Tensor:
            before = cpu.isa()
            cpu.set_isa(isa)
            try:
                return ops.block_linear(x, packed[i % len(packed)])
            finally:
                cpu.set_isa(before)

        return run

    return prepare


def _copy(weights: Weights) -> Prepared:
    """Reads and writes half as many bytes as the layer has, each: as many as it has together."""
    copies = [on_huge_pages(weights.codes.view(torch.uint8)) for _ in range(weights.copies(1))]
    half = weights.codes.shape[0] // 2
    target = torch.empty_like(copies[0][:half])
    return lambda x: lambda i: target.copy_(copies[i % len(copies)][:half])


def _bf16(weights: Weights) -> Prepared:
    copies = [on_huge_pages(weights.bf16) for _ in range(weights.copies(2))]
    return lambda x: lambda i: torch.nn.functional.linear(x, copies[i % len(copies)])


def _dequantized(weights: Weights) -> Prepared:
    """What a framework without block FP8 does: expand, then multiply."""
    once = range(weights.copies(1))
    codes = [weights.codes.view(torch.uint8).clone().view(weights.codes.dtype) for _ in once]
    scale = weights.scale
    return lambda x: lambda i: torch.nn.functional.linear(x, ops.dequantize_weight(codes[i % len(codes)], scale))


def _scaled_mm_missing(device: Device) -> str | None:
    if device.kind != "cuda":
        return "torch has no block-scaled FP8 product for this device"
    if not hasattr(torch.nn.functional, "scaled_mm") or torch.cuda.get_device_capability()[0] < 9:
        return "it needs a torch with scaled_mm and compute capability 9.0"
    return None


def _scaled_mm(quantizes: bool, weights: Weights) -> Prepared:
    """torch's block-scaled FP8 product; activations are quantized in each call, or before, which is not timed."""
    kinds = torch.nn.functional.ScalingType
    codes = [weights.codes.clone() for _ in range(weights.copies(1))]

    def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, scale = ops.quantize_activation(x)
        return values, torch.empty_strided(scale.shape, (1, scale.shape[0]), device=scale.device).copy_(scale)

    def prepare(x: torch.Tensor) -> Contender:
        before = None if quantizes else quantized(x)

        def run(i: int) -> torch.Tensor:
            values, along_m = before or quantized(x)
            weight, scale = codes[i % len(codes)].t(), weights.scale.t()
            out: torch.Tensor = torch.nn.functional.scaled_mm(
                values, weight, along_m, kinds.BlockWise1x128, scale, kinds.BlockWise128x128
            )
            return out

        return run

    return prepare


def able(
    prepared: Mapping[str, Prepared], x: torch.Tensor, required: Collection[str]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Contenders that can compute x, called once, and why the others cannot: some know no small batch.

    Raises:
        Exception: whatever one of the `required` raises; kernels of ours that fail are not left out.
    """
    contenders, missing = {}, {}
    for name, prepare in prepared.items():
        try:
            contender = prepare(x)
            contender(0)
        except (RuntimeError, ValueError) as error:
            if name in required:
                raise
            missing[name] = f"{type(error).__name__}: {error}"
        else:
            contenders[name] = contender
    return contenders, missing


def framework(device: Device) -> tuple[Peer, ...]:
    """What the framework offers for the same layer, and a copy."""
    return (
        Peer("copy", 1, "moves the same bytes", _copy),
        Peer("torch bf16", 2, "bf16", _bf16),
        Peer("dequantize, torch bf16", 1, "w8a16", _dequantized),
        *(
            Peer(name, 1, computes, functools.partial(_scaled_mm, quantizes), lambda: _scaled_mm_missing(device))
            for name, computes, quantizes in (
                ("torch scaled_mm", "w8a8, quantized before", False),
                ("torch scaled_mm, quantized by ours", "w8a8", True),
            )
        ),
    )


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; on a CPU on 2 MiB pages, if it fills one, so that no implementation is slower for want of them."""
    if tensor.device.type != "cpu":
        return tensor.clone()
    return cpu.empty_bytes((tensor.nbytes,)).view(tensor.dtype).view(tensor.shape).copy_(tensor)
