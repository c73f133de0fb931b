"""Thousands of hostile inputs in a row, and one again: `python -m tests.fuzz.campaign --help`.

The input that is being read lies in ``<artefacts>/current.bin``, so that a process that dies leaves it; inputs that
the judge condemns are written to files that `--replay` reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.choices import Choices, random_choices
from tests.fuzz.judge import Judge, Sandbox, Verdict
from tests.fuzz.planted import PLANTED
from tests.fuzz.readers import READERS, Reader, one_rank

MAX_ARTEFACTS = 20
KNOWN = READERS | {PLANTED.name: PLANTED}


@dataclass
class Figures:
    """What a run saw; `violations` counts by kind, `artefacts` are inputs to replay."""

    reader: str
    inputs: int = 0
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    python_peak: int = 0
    resident_peak: int = 0
    largest: int = 0
    factor: float = 0.0
    violations: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    artefacts: list[str] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        self.inputs += 1
        self.refused += verdict.refusal is not None
        self.read += verdict.refusal is None and verdict.violation is None
        self.slowest = max(self.slowest, verdict.seconds)
        self.python_peak = max(self.python_peak, verdict.python_peak)
        self.resident_peak = max(self.resident_peak, verdict.resident_peak)
        self.largest = max(self.largest, verdict.size)
        self.factor = max(self.factor, verdict.factor)
        if verdict.refusal:
            self.refusals[verdict.refusal.split(" (and ")[0][:60]] += 1

    def __str__(self) -> str:
        return (
            f"{self.reader}: {self.inputs} inputs in {self.seconds:.1f} s, {self.read} read, {self.refused} refused "
            f"in {len(self.refusals)} ways, {self.violations.total()} violations; "
            f"slowest {1000 * self.slowest:.0f} ms, Python peak {self.python_peak / 1e6:.2f} MB, "
            f"resident {self.resident_peak / 1e6:.1f} MB, largest input {self.largest / 1e6:.3f} MB"
        )


def warm_up(reader: Reader) -> None:
    """Read the sound checkpoint first, so that imports and first uses count for nobody; it must be accepted."""
    with Sandbox() as sandbox:
        reader.read(sandbox.fill(reader.make(Choices(b""))))


def run(reader: Reader, inputs: Iterable[bytes], artefacts: Path) -> Figures:
    """Judge every input."""
    warm_up(reader)
    figures = Figures(reader.name)
    artefacts.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (
        Judge(reader.read, reads_data=reader.reads_data) as judge,
        (artefacts / "current.bin").open("wb", 0) as current,
    ):
        for data in inputs:
            current.seek(0)
            current.write(data)
            folder = reader.make(Choices(data))
            verdict = judge.judge(folder)
            figures.add(verdict)
            if verdict.violation:
                report(figures, data, folder.damages, verdict, artefacts)
    figures.seconds = time.perf_counter() - started
    return figures


def report(figures: Figures, data: bytes, damages: list[str], verdict: Verdict, artefacts: Path) -> None:
    """Keep an input that was condemned and say how to see it again."""
    kind = (verdict.violation or "")[:60]
    figures.violations[kind] += 1
    if figures.violations[kind] > 1 or len(figures.artefacts) >= MAX_ARTEFACTS:
        return
    path = artefacts / f"{figures.reader}-{hashlib.sha256(data).hexdigest()[:12]}.bin"
    path.write_bytes(data)
    command = f"python -m tests.fuzz.campaign {figures.reader} --replay {path}"
    figures.artefacts.append(command)
    print(f"{figures.reader}: {verdict.violation}\n  damages: {', '.join(damages)}\n  again: {command}", flush=True)


def replay(reader: Reader, path: Path) -> Verdict:
    """Read a kept input again and say what it is and what happened."""
    warm_up(reader)
    folder = reader.make(Choices(path.read_bytes()))
    print(f"damages: {', '.join(folder.damages) or 'none'}")
    for name, content in folder.files.items():
        print(f"  {name!a}: {str(content)[:2000]}")
    with Judge(reader.read, reads_data=reader.reads_data) as judge:
        verdict = judge.judge(folder)
    print(verdict)
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=KNOWN)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--artefacts", type=Path, help="where condemned inputs go (default: a new folder)")
    parser.add_argument("--replay", type=Path, help="read this kept input again")
    parser.add_argument("--figures", type=Path, help="write the figures there as JSON")
    parser.add_argument("--refusals", action="store_true", help="say how often each refusal was seen")
    options = parser.parse_args()
    reader = KNOWN[options.reader]
    with one_rank() if reader.name == "load" else nullcontext():
        if options.replay:
            return int(replay(reader, options.replay).violation is not None)
        artefacts = options.artefacts or Path(tempfile.mkdtemp(prefix="fuzz-"))
        numbers = range(options.first, options.first + options.inputs)
        figures = run(reader, (random_choices(options.seed, number) for number in numbers), artefacts)
    print(figures, flush=True)
    if options.refusals:
        for words, count in figures.refusals.most_common():
            print(f"  {count:6} {words!a}")
    if options.figures:
        options.figures.write_text(json.dumps(vars(figures)))
    return int(bool(figures.violations))


if __name__ == "__main__":
    sys.exit(main())
