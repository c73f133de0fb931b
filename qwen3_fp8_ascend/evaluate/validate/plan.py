"""Which steps there are on a device, in the order in which they are worth most if time runs out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen3_fp8_ascend.backends import load_backend
from qwen3_fp8_ascend.backends.registry import usable_backends
from qwen3_fp8_ascend.evaluate.validate import checks, experts, model, probes, times
from qwen3_fp8_ascend.evaluate.validate.cases import Check, Context
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.devices import Device

CHECKS = (
    Check("probes", probes.probes, 60, each="machine"),
    Check("quantize", checks.quantize, 60),
    Check("dequantize", checks.dequantize, 60),
    Check("linear", checks.decode, 120, each="arithmetic", all_scales=True),
    Check("prefill", checks.many_rows, 120, each="arithmetic", slow=False),
    Check("experts", experts.layers, 120, each="arithmetic", slow=False, all_scales=True),
    Check("nonfinite", checks.not_finite, 60, each="arithmetic"),
    Check("determinism", checks.determinism, 60, each="arithmetic", slow=False),
    Check("graph", checks.graphs, 60, each="arithmetic", slow=False),
    Check("times", times.times, 180, each="machine"),
    Check("compile", checks.compiled, 90, each="arithmetic", slow=False),
    Check("model", model.models, 240, each="machine"),
)
"""Another operation is one more entry."""


def steps(device: Device) -> Iterator[tuple[str, Check, str | None, Activation | None]]:
    """(name, check, backend, what it computes) of each step on this machine."""
    for check in CHECKS:
        if check.each == "machine":
            yield check.name, check, None, None
            continue
        for backend in usable_backends(device.place.type, check.slow):
            if check.each == "backend":
                yield f"{check.name}/{backend.name}", check, backend.name, None
                continue
            for activation in filter(backend.computes.__contains__, Activation):
                if activation is Activation.W8A8_UE8M0 and not check.all_scales:
                    continue
                yield f"{check.name}/{backend.name}/{activation}", check, backend.name, activation


def context_of(device: Device, seed: int, backend: str | None, activation: Activation | None) -> Context:
    """What a step works on."""
    return Context(device, seed, load_backend(backend) if backend else None, activation or Activation.W8A8)


def outline(device: Device) -> list[dict[str, Any]]:
    """The steps as the process that runs them knows them."""
    return [{"step": name, "seconds": check.seconds} for name, check, _, _ in steps(device)]
