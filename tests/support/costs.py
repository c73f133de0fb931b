"""pytest plugin: what each part of the tests costs, printed at the end, also by several workers.

A part is a folder of `tests`, or the tests that stand in none. Seconds of a processor count those of processes that a
test started and waited for; seconds on the clock include waiting, for a server to start or for another worker. The
files and the tests that cost most are named; what several share is counted where it was made.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest

KEY = "cost"
NAMED, LEAST = 20, 3.0
"""So many files and tests are named, of those that took at least so many seconds of a processor."""

_elsewhere = 0.0


def add(seconds: float) -> None:
    """Count what a process took for a test that is no child of this one."""
    global _elsewhere
    _elsewhere += seconds


def processor_seconds() -> float:
    """Of this process, of its children that have ended, and of what else worked for it."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + _elsewhere


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    start, used = time.monotonic(), processor_seconds()
    item.stash[_START] = (start, used)
    return (yield)


_START = pytest.StashKey[tuple[float, float]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "teardown":
        start, used = item.stash[_START]
        report.user_properties = [(KEY, (time.monotonic() - start, processor_seconds() - used))]
    return report


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def part_of(nodeid: str) -> str:
    return "/".join(PurePosixPath(file_of(nodeid)).parts[:-1][:2])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tests = [
        (report.nodeid, *value)
        for reports in terminalreporter.stats.values()
        for report in reports
        for key, value in getattr(report, "user_properties", ())
        if key == KEY
    ]
    if not tests:
        return

    def write(name: str, number: str, clock: str, processor: str) -> None:
        terminalreporter.write_line(f"{number:>8}{clock:>10}{processor:>13}  {name}")

    def write_sums(sums: dict[str, list[float]]) -> None:
        for name, (number, clock, processor) in sorted(sums.items(), key=lambda item: -item[1][2])[:NAMED]:
            if processor >= LEAST:
                write(name, f"{number:.0f}", f"{clock:.0f}", f"{processor:.0f}")

    terminalreporter.section("what each part cost")
    write("part", "tests", "clock s", "processor s")
    for key in (part_of, file_of, str):
        sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        for nodeid, *cost in tests:
            sums[key(nodeid)] = [a + b for a, b in zip(sums[key(nodeid)], (1, *cost), strict=True)]
        write_sums(sums)
