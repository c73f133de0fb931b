"""Timing on shared machines: implementations in turn in one process, medians, ratios of neighbours."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, in the order in which they were taken."""

    seconds: np.ndarray

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
    functions: Mapping[str, Callable[[int], object]], *, seconds: float, least: int = 5, most: int = 300
) -> dict[str, Timing]:
    """Call the functions in turn, round after round, for about `seconds` in all.

    Each gets the number of the round, to choose a copy of its weights that is in no cache. Every round has a random
    order (the same in every run), so that none always follows the same neighbour.
    """
    names = list(functions)
    for name in names:
        functions[name](0)
    taken: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < most and (rounds < least or time.perf_counter() < end):
        for name in order.sample(names, len(names)):
            start = time.perf_counter()
            functions[name](rounds)
            taken[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: Timing(np.array(times)) for name, times in taken.items()}


def cache_bytes() -> int:
    """Size of the last-level cache as Linux tells it, at least 64 MiB."""
    sizes = [64 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)
