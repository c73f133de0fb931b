"""A device as judges and clocks use it: a CPU, an NVIDIA GPU, an Ascend NPU.

torch_npu has torch.cuda's streams, events and graphs under its own names, so one class serves both.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3_fp8_ascend.backends import soc
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.provenance import cpu_name

KINDS = ("cpu", "cuda", "npu")


@dataclass(frozen=True)
class Device:
    """`place` is where tensors lie; `module` is torch.cuda or torch_npu.npu, None for a CPU."""

    kind: str
    name: str
    place: torch.device
    module: Any = None

    @property
    def has_graphs(self) -> bool:
        """Whether streams and graphs are there."""
        return self.module is not None

    def synchronize(self) -> None:
        """Wait for everything that was launched."""
        if self.module is not None:
            self.module.synchronize()

    def free_bytes(self) -> int:
        """Memory that is free on it; for a CPU what the system and a limit on this process leave."""
        if self.module is not None:
            return int(self.module.mem_get_info()[0])
        return host_memory()

    @contextlib.contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        """Launch on another stream, which begins after what the current one has been given."""
        stream.wait_stream(self.module.current_stream())
        with self.module.stream(stream):
            yield

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """`call` as a graph: a function that replays it, and what `call` returned, which each replay fills anew."""
        with self.on_stream(self.module.Stream()):
            for _ in range(3):  # what compiles or allocates once does so before
                call()
        self.module.synchronize()
        graph = (self.module.CUDAGraph if self.kind == "cuda" else self.module.NPUGraph)()
        with self.module.graph(graph):
            out = call()
        return graph.replay, out

    def seconds(self, launch: Callable[[], Any]) -> float:
        """Time on the device between two events around what is launched."""
        start, end = self.module.Event(enable_timing=True), self.module.Event(enable_timing=True)
        start.record()
        launch()
        end.record()
        self.module.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def host_memory() -> int:
    """Bytes that this process may still take: what Linux calls available, or less where a limit is set."""
    available = 1 << 62
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            available = min(available, limit - used)
    return available


def open_device(kind: str) -> Device:
    """The device of that kind that this process uses; "auto" is an NPU, else a GPU, else the CPU.

    Raises:
        BlockFp8Error: there is none, or there is no such kind.
    """
    if kind == "auto":
        kind = "npu" if soc.missing_npu() is None else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return Device("cpu", cpu_name(), torch.device("cpu"))
    if kind == "cuda":
        if not torch.cuda.is_available():
            got = f"torch {torch.__version__} sees no NVIDIA GPU"
            fix = "install the driver and a torch built for CUDA, or choose another --device"
            raise BlockFp8Error("there is no such device", where="--device cuda", got=got, fix=fix)
        return Device("cuda", torch.cuda.get_device_name(), torch.device("cuda", 0), torch.cuda)
    if kind == "npu":
        missing = soc.missing_npu()
        if missing is not None:
            fix = "see `qwen3-fp8-ascend doctor`, or choose another --device"
            raise BlockFp8Error("there is no such device", where="--device npu", got=missing, fix=fix)
        module = importlib.import_module("torch_npu").npu
        return Device("npu", module.get_device_name(), torch.device("npu", 0), module)
    fix = f"choose one of: {', '.join(KINDS)}"
    raise BlockFp8Error("there is no such device", where="--device", got=kind, fix=fix)
