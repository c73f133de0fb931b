"""The process of a step with backends of the test's own, good and bad, and with a device that stands in for an NPU.

`python -m tests.evaluate.validate.planted WHAT REQUEST`. WHAT is "faults": backends over the CPU's, each with one
fault; or "npu": `testing.devices.Device` over `StandIn`, with the CPU's kernels under the name of a backend for NPUs.
 Fewer cases than in earnest, of the same kinds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen3_fp8_ascend.backends import registry
from qwen3_fp8_ascend.evaluate.validate import checks, child, experts, layer_times, model, times
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.glu import SILU
from qwen3_fp8_ascend.testing import contenders, devices, timing

GOOD = registry.load_backend("cpu")


def plant(name: str, **changes: Any) -> None:
    """A backend that differs from the CPU's in what is given, which does not check its operands."""
    kept: dict[str, Any] = {"plan": None, "levels": dict, "checks_operands": False}
    registry.LOADED[name] = dataclasses.replace(GOOD, name=name, **kept | changes)
    registry._MODULES = (*registry._MODULES, name)


def linear_with(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The CPU's linear; `change` is given x and the result."""
    return lambda x, packed, bias, activation: change(x, GOOD.linear(x, packed, bias, activation))


def one_ulp(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The first output of the last token, in 16 bits: one unit in the last place too large."""
    if out.numel() and out.dtype != torch.float32:
        out.view(torch.int16)[-1, 0] += 1
    return out


def wrong_scale_row(weight: torch.Tensor, scale: torch.Tensor, grid: Any) -> tuple[torch.Tensor, ...]:
    """The first block of a later shard gets the scales of the last one of the shard before."""
    first = [span.scale_row for span in grid.spans()][-1]
    scale = scale.clone()
    if len(grid.widths) > 1:
        scale[first] = scale[first - 1]
    return GOOD.pack(weight, scale, grid)


def without_nan(x: torch.Tensor, block_k: int, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    return GOOD.quantize_activation(x.nan_to_num(), block_k, activation)


def without_last_slot(x: torch.Tensor, w13: Any, w2: Any, weights: torch.Tensor, *rest: Any) -> torch.Tensor:
    """A layer of experts that leaves the last expert of the first token out."""
    weights = weights.clone()
    weights[0, -1] = 0
    assert GOOD.block_experts is not None
    return GOOD.block_experts(x, w13, w2, weights, *rest)


def always_silu(*operands: Any) -> torch.Tensor:
    """A layer of experts that computes silu(gate) * up in any case."""
    assert GOOD.block_experts is not None
    return GOOD.block_experts(*operands[:-1], SILU)


class Race:
    """Once in fifty calls another bit."""

    calls = 0

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        Race.calls += 1
        return one_ulp(x, out) if Race.calls % 50 == 0 else out


def at_17_rows(action: Callable[[], None]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def act(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if len(x) == 17:
            action()
        return out

    return act


def faults() -> None:
    """One backend for each, named after it."""
    plant("planted_ulp", linear=linear_with(one_ulp))
    plant("planted_scale", pack=wrong_scale_row)
    plant("planted_nan", linear=linear_with(lambda x, out: out.nan_to_num()), quantize_activation=without_nan)
    plant("planted_race", linear=linear_with(Race()))
    plant("planted_slot", block_experts=without_last_slot)
    plant("planted_silu", block_experts=always_silu)
    plant("planted_hang", linear=linear_with(at_17_rows(lambda: time.sleep(3600))))
    plant("planted_kill", linear=linear_with(at_17_rows(lambda: os.kill(os.getpid(), signal.SIGSEGV))))


class Graph:
    """Operations as they were dispatched, to be replayed on the same tensors."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        with torch.inference_mode():
            for function, args, kwargs, out in self.calls:
                again = tree_leaves(function(*args, **kwargs))
                for kept, new in zip(tree_leaves(out), again, strict=True):
                    if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)


class Record(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, out))
        return out


class Stream:
    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class StandIn:
    """torch_npu.npu as `devices.Device` uses it, over the CPU."""

    Stream, Event, NPUGraph = Stream, Event, Graph

    @staticmethod
    def synchronize() -> None:
        """A CPU has nothing to wait for."""

    @staticmethod
    def current_stream() -> Stream:
        return Stream()

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        yield

    @staticmethod
    @contextlib.contextmanager
    def graph(graph: Graph) -> Iterator[None]:
        with Record(graph):
            yield

    @staticmethod
    def mem_get_info() -> tuple[int, int]:
        return 32 << 30, 64 << 30


def npu() -> None:
    """An Ascend910B3 whose only backend is called `triton` and computes W8A8."""
    here = devices.Device("npu", "Ascend910B3", torch.device("cpu"), StandIn)
    devices.open_device = lambda kind: here  # type: ignore[assignment]
    registry._MODULES = ()
    plant("triton", computes=frozenset({Activation.W8A8}))
    contenders.cpu.isas = lambda: ("portable",)  # type: ignore[assignment]
    os.environ.pop(contenders.cpu.ENVIRONMENT_VARIABLE, None)  # of the machine's levels, which may be above that one


def fewer() -> None:
    """Cases of the same kinds, for a test."""
    checks.ROWS = (0, 1, 17, 65)
    checks.SMALL = (((1,), 1), ((130, 70), 300))
    checks.FULL, checks.FULL_ROWS = {"o": (1024, 256)}, (1, 65)
    experts.ROWS, experts.SHAPES, experts.LARGE_ROWS = (0, 1, 17), ((4, 4, 130, 72),), ()
    times.ROWS, times.SECONDS = (1, 16), 0.05
    layer_times.ROWS, layer_times.SECONDS = (1, 16), 0.05
    times.FULL = {"qkv": (512, 256), "o": (256, 256)}
    layer_times.cache_bytes = times.cache_bytes = timing.cache_bytes = lambda device=None: 1 << 20  # type: ignore[assignment]
    model.importlib.util.find_spec = lambda name: None  # type: ignore[assignment]


if __name__ == "__main__":
    {"faults": faults, "npu": npu}[sys.argv.pop(1)]()
    fewer()
    sys.exit(child.main())
