"""Timing on shared machines: contenders in turn in one process, medians, ratios of neighbours."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen3_fp8_ascend.testing.devices import Device

Contender = Callable[[int], object]
"""Is given the number of the call, to choose a copy of its weights that is in no cache."""

CALLS = 20
"""Calls of a contender in one graph, or between two events."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a call in each round, in the order in which they were taken; `clock` says how."""

    seconds: np.ndarray
    clock: str = "host"

    @property
    def p20(self) -> float:
        return float(np.quantile(self.seconds, 0.2))

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p80(self) -> float:
        return float(np.quantile(self.seconds, 0.8))

    def speedup_over(self, other: Timing) -> float:
        """Median over rounds of other / self: the two ran next to each other, so the machine's drift cancels."""
        return float(np.median(other.seconds / self.seconds))


def interleave(
    functions: Mapping[str, Contender],
    *,
    seconds: float,
    device: Device | None = None,
    least: int = 5,
    most: int = 300,
) -> dict[str, Timing]:
    """Time the functions in turn, round after round, for about `seconds` in all.

    On a CPU a round is one call by the host's clock. On a GPU or an NPU it is `CALLS` calls in a graph, or between two
    events where a contender cannot be captured. Every round has a random order (the same in every run), so that none
    always follows the same neighbour.
    """
    clocks = {name: _clock(call, device) for name, call in functions.items()}
    taken: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(0)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < most and (rounds < least or time.perf_counter() < end):
        for name in order.sample(list(functions), len(functions)):
            taken[name].append(clocks[name][1](rounds))
        rounds += 1
    return {name: Timing(np.array(times), clocks[name][0]) for name, times in taken.items()}


def settle(functions: Mapping[str, Contender], copies: int, device: Device | None = None) -> None:
    """Read each copy of the weights once, on a CPU, before the first time that is kept of them.

    The first read of what was just laid out takes up to half as long again as all that come after it: seen of every
    implementation on a Xeon in a virtual machine, while no page changed.
    """
    if device is None or not device.has_graphs:
        for number in range(copies):
            for call in functions.values():
                call(number)


def _clock(call: Contender, device: Device | None) -> tuple[str, Callable[[int], float]]:
    """How one contender is timed, and a function that does it once; it is warm afterwards."""
    call(0)
    if device is None or not device.has_graphs:

        def by_host(number: int) -> float:
            start = time.perf_counter()
            call(number)
            return time.perf_counter() - start

        return "host", by_host

    def launch() -> None:
        for number in range(CALLS):
            call(number)

    try:
        replay, _ = device.capture(launch)
    except RuntimeError:  # a contender that waits for the device, as other people's may
        device.synchronize()
        return "events", lambda number: device.seconds(launch) / CALLS
    return "graph", lambda number: device.seconds(replay) / CALLS


def cache_bytes(device: Device | None = None) -> int:
    """How many bytes of weights are in no cache: a CPU's last level as Linux tells it, 256 MiB on an accelerator."""
    if device is not None and device.has_graphs:
        return 256 << 20
    sizes = [64 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)
