"""How many threads a table has, and how a machine's processors lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

NODES = Path("/sys/devices/system/node")


def thread_counts(wanted: Sequence[str], available: int) -> list[int]:
    """Numbers of threads in ascending order, each once: `wanted` holds numbers, "half" and "all", also with commas.

    Raises:
        ValueError: what is wanted is neither, or more than there are.
    """
    words = {"half": max(1, available // 2), "all": available}
    counts = set()
    for word in (part.strip() for text in wanted for part in text.split(",")):
        if word not in words and not word.isdecimal():
            raise ValueError(f"--threads takes numbers, half and all, got {word!r}")
        count = words.get(word) or int(word)
        if not 1 <= count <= available:
            raise ValueError(f"--threads {word}: this process may use 1 to {available}")
        counts.add(count)
    return sorted(counts)


def numa_layout(nodes: Path = NODES) -> str:
    """The NUMA nodes that have processors, and which of those this process may use.

    A table of a machine with several nodes is worth something only if it says which of them were used.
    """
    found = []
    for node in sorted(nodes.glob("node[0-9]*"), key=lambda path: int(path.name.removeprefix("node"))):
        if processors := (node / "cpulist").read_text().strip():
            found.append(f"node {node.name.removeprefix('node')}: processors {processors}")
    layout = "; ".join(found) or "NUMA nodes unknown"
    return f"{layout}; {len(os.sched_getaffinity(0))} of them for this process"
