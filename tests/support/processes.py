"""The processes of a server: which there are, how much memory they hold, whether they ended."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

from qwen3_fp8_ascend.errors import BlockFp8Error


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants, the oldest first."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def named(pid: int, part: str) -> psutil.Process:
    """The one descendant whose title contains `part`, as in vLLM's "VLLM::EngineCore".

    Raises:
        BlockFp8Error: there is none, or there are several.
    """
    titles = {process: " ".join(process.cmdline()) for process in family(pid)[1:]}
    found = [process for process, title in titles.items() if part in title]
    if len(found) != 1:
        raise BlockFp8Error("no single process of that name", expected=part, got=", ".join(titles.values()))
    return found[0]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; zombies do not."""
    return [process for process in processes if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants together."""
    total = 0
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


@dataclass
class MemoryRecord:
    """Resident bytes of a server's processes, sampled at regular times."""

    samples: list[int] = field(default_factory=list)

    def halves(self) -> tuple[int, int]:
        """The largest value of the first half of the time, and of the second."""
        middle = len(self.samples) // 2
        return max(self.samples[:middle]), max(self.samples[middle:])


@contextlib.contextmanager
def record_memory(pid: int, interval: float = 0.25) -> Iterator[MemoryRecord]:
    """Sample a server's memory every `interval` seconds for the length of a `with` block."""
    record, ended = MemoryRecord(), threading.Event()

    def sample() -> None:
        while True:
            record.samples.append(resident_bytes(pid))
            if ended.wait(interval):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield record
    finally:
        ended.set()
        thread.join()


def wait_until_ended(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for processes to end; returns those that have not."""
    deadline = time.monotonic() + seconds
    while (left := alive(processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
