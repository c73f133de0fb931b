"""Counters by which the programs of a tile find out which of them is the last: zero before and after each launch.

Launches that may run at once must not share them. Launches of one stream follow each other, so a stream has a region
for all of its own. A graph may be replayed on any stream, beside anything: each launch that is captured gets a region
that nothing else is ever given, from memory that was set to zero before (a layer of Qwen3-8B takes 2 KiB of a graph).
Where that has run out, the region is the graph's and set to zero by each replay: right, and a microsecond slower.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

CHUNK = 1 << 20
"""Counters that are set to zero at once: 4 MiB."""

EAGER = 1 << 13
"""A stream's region, if nothing larger is asked for."""


@dataclass
class _Pool:
    """Chunks are never given back, since graphs hold their addresses."""

    chunks: list[torch.Tensor] = field(default_factory=list)
    used: int = CHUNK
    of_stream: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, count: int) -> torch.Tensor | None:
        """The next so many, or None if the last chunk has not so many left."""
        if self.used + count > CHUNK:
            return None
        region = self.chunks[-1][self.used : self.used + count]
        self.used += -(-count // 32) * 32  # a line of the cache for itself
        return region

    def renew(self, device: torch.device) -> None:
        """Have another chunk; zeros must be there before any other stream counts in it."""
        self.chunks.append(torch.zeros(CHUNK, dtype=torch.int32, device=device))
        torch.cuda.current_stream(device).synchronize()
        self.used = 0


_pools: dict[torch.device, _Pool] = {}
_lock = threading.Lock()


def counters(count: int, device: torch.device) -> torch.Tensor:
    """(count,) int32, zero, for a launch on the device's current stream that leaves zeros behind."""
    if device.type != "cuda" or count > CHUNK // 2:
        return torch.zeros(count, dtype=torch.int32, device=device)
    with _lock:
        pool = _pools.setdefault(device, _Pool())
        if torch.cuda.is_current_stream_capturing():
            region = pool.take(count)
            return region if region is not None else torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        held = pool.of_stream.get(stream)
        if pool.used > CHUNK // 2:  # before the next capture, not within it
            pool.renew(device)
        if held is None or held.numel() < count:
            held = pool.take(max(count, EAGER))
            assert held is not None
            pool.of_stream[stream] = held
        return held[:count]
