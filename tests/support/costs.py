"""pytest plugin: what each part of the tests costs, printed at the end, also by several workers.

A part is a folder of `tests`, or the tests that stand in none. Seconds of a processor count those of processes that a
test started and waited for; seconds on the clock include waiting, for a server to start or for another worker. The
tests that cost most are named; what several share is counted where it was made.
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
"""So many tests are named, of those that took at least so many seconds of a processor."""

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


def part_of(nodeid: str) -> str:
    folders = PurePosixPath(nodeid.partition("::")[0]).parts[:-1]
    return "/".join(folders[:2])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    costs: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    tests = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == KEY:
                    row = costs[part_of(report.nodeid)]
                    row[0] += 1
                    row[1] += value[0]
                    row[2] += value[1]
                    tests.append((value[1], value[0], report.nodeid))
    if not costs:
        return
    terminalreporter.section("what each part cost")
    terminalreporter.write_line(f"{'part':<24}{'tests':>8}{'clock s':>10}{'processor s':>13}")
    for part, (number, clock, processor) in sorted(costs.items(), key=lambda item: -item[1][1]):
        terminalreporter.write_line(f"{part:<24}{number:>8}{clock:>10.0f}{processor:>13.0f}")
    for processor, clock, nodeid in sorted(tests, reverse=True)[:NAMED]:
        if processor >= LEAST:
            terminalreporter.write_line(f"{clock:>42.0f}{processor:>13.0f}  {nodeid}")
