"""Which steps there are on a device, in the order in which they are worth most if time runs out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from qwen3_fp8_ascend.backends.registry import Backend, usable_backends
from qwen3_fp8_ascend.evaluate.validate import checks, experts, model, probes, times
from qwen3_fp8_ascend.evaluate.validate.cases import Check, Step
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.devices import Device

CHECKS = (
    Check("probes", probes.probes, 60, each="machine", alone=True),
    Check("quantize", checks.quantize, 60, lower=True),
    Check("dequantize", checks.dequantize, 60, lower=True),
    Check("linear", checks.decode, 120, each="arithmetic", lower=True, all_scales=True),
    Check("prefill", checks.many_rows, 120, each="arithmetic", slow=False, lower=True),
    Check("experts", experts.layers, 120, each="arithmetic", slow=False, lower=True, all_scales=True),
    Check("nonfinite", checks.not_finite, 60, each="arithmetic", lower=True),
    Check("determinism", checks.determinism, 60, each="arithmetic", slow=False),
    Check("graph", checks.graphs, 60, each="arithmetic", slow=False),
    Check("times", times.times, 180, each="machine", alone=True),
    Check("compile", checks.compiled, 90, each="arithmetic", slow=False),
    Check("model", model.models, 240, each="machine", alone=True),
)
"""Another operation is one more entry."""

NONE: Mapping[str, str] = MappingProxyType({})


def steps(device: Device) -> Iterator[Step]:
    """Each step on this machine: the kernels that serve here, those asked for by name, those for lesser processors."""
    serving = usable_backends(device.place.type, slow=False)
    for check in CHECKS:
        if check.each == "machine":
            yield Step(check.name, check)
            continue
        for backend in serving:
            yield from _steps(check, backend)
    for backend in usable_backends(device.place.type):
        for check in (check for check in CHECKS if check.slow and check.each != "machine" and backend not in serving):
            yield from _steps(check, backend)
    for backend in serving:
        for check in (check for check in CHECKS if check.lower):
            for level, environment in _lower(backend):
                yield from _steps(check, backend, f":{level}", environment)


def _steps(check: Check, backend: Backend, level: str = "", environment: Mapping[str, str] = NONE) -> Iterator[Step]:
    name = f"{check.name}/{backend.name}{level}"
    if check.each == "backend":
        yield Step(name, check, backend.name, None, environment, not level)
        return
    for activation in filter(backend.computes.__contains__, Activation):
        if activation is Activation.W8A8_UE8M0 and (level or not check.all_scales):
            continue
        # What scales that are powers of two change is their rounding alone, which `quantize` has judged.
        thorough = not level and activation is not Activation.W8A8_UE8M0
        yield Step(f"{name}/{activation}", check, backend.name, activation, environment, thorough)


def _lower(backend: Backend) -> list[tuple[str, Mapping[str, str]]]:
    """Levels below the one in use, the best first."""
    levels = list(backend.levels().items())
    names = [name for name, _ in levels]
    used = names.index(backend.detail()) if backend.detail and names else 0
    return levels[:used][::-1]


def find(device: Device, name: str) -> Step:
    """The step of that name, in the process that runs it: there its level is the one in use."""
    plain = "/".join(part.partition(":")[0] for part in name.split("/"))
    step = next(step for step in steps(device) if step.name == plain)
    return replace(step, name=name, thorough=step.thorough and ":" not in name)


def outline(device: Device) -> list[dict[str, Any]]:
    """The steps as the process that starts theirs knows them."""
    return [
        {
            "step": step.name,
            "seconds": step.check.seconds,
            "environment": dict(step.environment),
            "alone": step.check.alone,
        }
        for step in steps(device)
    ]
