"""The large attacks, each in a process of its own with a bound on its address space: `python -m tests.fuzz.heavy`.

The process is forked from one that has everything imported and used once, so that what is measured is the input's.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen3_fp8_ascend.errors import BlockFp8Error
from tests.fuzz.choices import Choices
from tests.fuzz.folders import HostileFolder
from tests.fuzz.judge import (
    FACTOR,
    HANG_SECONDS,
    RESIDENT_ALLOWANCE,
    SECONDS,
    Sandbox,
    address_space,
    give_back_free_memory,
    resident_peak,
)
from tests.fuzz.large_attacks import HEAVY
from tests.fuzz.readers import READERS, Reader
from tests.support.own_time import at_pace

ARENA = 64 << 20
"""Address space that glibc reserves for a thread's first allocation; it is not memory."""

SIZES = (1 << 16, 1 << 20, 1 << 23)
READ_BY = ("header", "config", "inspect", "render", "quantize", "dequantize")


@dataclass(frozen=True)
class Outcome:
    """One attack on one reader."""

    attack: str
    reader: str
    size: int
    seconds: float
    resident: int
    refusal: str | None = None
    violation: str | None = None

    @property
    def factor(self) -> float:
        """Resident memory in multiples of the input, where the input is so large that this says something."""
        return self.resident / self.size if self.size >= 1 << 20 else 0.0

    def __str__(self) -> str:
        result = self.violation or (f"refused: {self.refusal}" if self.refusal else "read")
        return (
            f"{self.attack:26} {self.reader:10} {self.size / 1e6:7.2f} MB {self.seconds:6.2f} s "
            f"{self.resident / 1e6:7.1f} MB  {result}"
        )


def attack(name: str, reader: Reader, folder: HostileFolder) -> Outcome:
    """Let the reader read it in a child; the best of three if it was slow."""
    outcome = _once(name, reader, folder)
    for _ in range(2):
        if outcome.violation or outcome.seconds <= SECONDS:
            return outcome
        outcome = min(outcome, _once(name, reader, folder), key=lambda o: o.seconds)
    if not outcome.violation and outcome.seconds > SECONDS:
        return Outcome(**asdict(outcome) | {"violation": f"took {outcome.seconds:.2f} s"})
    return outcome


def _once(name: str, reader: Reader, hostile: HostileFolder) -> Outcome:
    size = hostile.size(data=reader.reads_data)
    with Sandbox() as sandbox:
        folder = sandbox.fill(hostile)
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            os.close(receive)
            _child(reader, folder, size, hostile.mapped, send)
        os.close(send)
        with os.fdopen(receive, "rb") as answer:
            text = answer.read()
        status = os.waitpid(child, 0)[1]
    if not text:
        return Outcome(name, reader.name, size, 0, 0, violation=f"the process died: status {status}")
    return Outcome(name, reader.name, size, **json.loads(text))


def _child(reader: Reader, folder: Path, size: int, mapped: int, send: int) -> None:
    """Read, answer, and end without a word, whatever happens."""
    answer: dict[str, object] = {}
    faulthandler.disable()
    try:
        _read_sound(reader)  # a fork begins without the pages of libraries
        give_back_free_memory()
        resource.setrlimit(resource.RLIMIT_CPU, (HANG_SECONDS, HANG_SECONDS + 1))
        bound = FACTOR * size + RESIDENT_ALLOWANCE
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + bound + mapped + ARENA,) * 2)
        before = resident_peak(reset=True)
        started = time.process_time()
        try:
            reader.read(folder)
        except BlockFp8Error as error:
            answer["refusal"] = str(error).split("\n")[0]
        except BaseException as error:
            answer["violation"] = f"{type(error).__name__} instead of BlockFp8Error: {str(error)[:200]}"
        seconds, resident = time.process_time() - started, resident_peak() - before
        answer |= {"seconds": at_pace(seconds, SECONDS), "resident": resident}
        if "violation" not in answer and resident > bound:
            answer["violation"] = f"more than {bound / 1e6:.1f} MB"
        os.write(send, json.dumps(answer).encode())
    finally:
        os._exit(0)


def _read_sound(reader: Reader) -> None:
    with Sandbox() as sandbox:
        reader.read(sandbox.fill(reader.make(Choices(b""))))


def attacks(sizes: tuple[int, ...] = SIZES, names: tuple[str, ...] = tuple(HEAVY)) -> Iterator[Outcome]:
    """Every attack in every size on every reader."""
    for reader in READERS.values():
        if reader.name in READ_BY:
            _read_sound(reader)
    gc.collect()
    gc.freeze()  # else each collection in a fork looks through all that was imported, a third of the slowest times
    for name in names:
        for size in sizes:
            folder = HEAVY[name](size)
            for reader in READ_BY:
                yield attack(name, READERS[reader], folder)


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="bytes")
    parser.add_argument("--attacks", nargs="*", default=tuple(HEAVY), choices=tuple(HEAVY), metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    outcomes = []
    for outcome in attacks(tuple(options.sizes), tuple(options.attacks)):
        outcomes.append(outcome)
        print(outcome, flush=True)
    bad = [outcome for outcome in outcomes if outcome.violation]
    for outcome in bad:
        print("condemned:", outcome)
    slowest = max(outcomes, key=lambda o: o.seconds)
    hungriest = max(outcomes, key=lambda o: o.factor)
    small = max((outcome.resident for outcome in outcomes if outcome.size < 1 << 20), default=0)
    print(
        f"{len(outcomes)} inputs, {len(bad)} violations; slowest {slowest.seconds:.2f} s ({slowest.attack}, "
        f"{slowest.reader}); most memory for a megabyte or more {hungriest.factor:.2f} x the input "
        f"({hungriest.attack}, {hungriest.reader}), for less {small / 1e6:.1f} MB"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
