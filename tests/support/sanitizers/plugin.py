"""pytest plugin of the process that runs under a sanitizer: puts the library in place and reports what ran."""

from __future__ import annotations

import ctypes
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

LIBRARY = Path(os.environ["SANITIZED_LIBRARY"])

ATTRIBUTE = "_hypothesis_internal_use_settings"
"""Where `@settings` leaves what it was given; it cannot be applied twice."""

_counts: Counter[str] = Counter()
_skipped: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    from qwen3_fp8_ascend.backends import cpu

    cpu.LIBRARY = LIBRARY
    settings.register_profile(
        "sanitizers",
        deadline=None,
        max_examples=int(os.environ["SANITIZED_EXAMPLES"]),
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("sanitizers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """If asked to, tests that name a number of examples themselves get no more than the others."""
    if not os.environ.get("SANITIZED_CAPPED"):
        return
    most = settings().max_examples
    for test in {getattr(item, "obj", None) for item in items}:
        asked = getattr(test, ATTRIBUTE, None)
        if asked is not None and asked.max_examples > most:
            setattr(test, ATTRIBUTE, settings(asked, max_examples=most))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _counts[report.outcome] += 1
    if report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped[report.nodeid] = reason.removeprefix("Skipped: ")


def pytest_sessionfinish(session: pytest.Session) -> None:
    loaded = [
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("/_cpu.so")
    ]
    mapped = str(LIBRARY) in Path("/proc/self/maps").read_text()
    regions = None
    if mapped and hasattr(library := ctypes.CDLL(str(LIBRARY)), "count_threaded_regions"):
        library.count_threaded_regions.restype = ctypes.c_int64
        regions = library.count_threaded_regions()
    report = {
        "sanitized_library_loaded": mapped,
        "other_libraries": sorted(set(loaded)),
        "threaded_regions": regions,
        "passed": _counts["passed"],
        "failed": _counts["failed"],
        "skipped": _skipped,
    }
    Path(os.environ["SANITIZED_REPORT"]).write_text(json.dumps(report))
