"""What the outcome of tests under a sanitizer says."""

from __future__ import annotations

from tests.support.cpu_levels import is_lack
from tests.support.sanitizers import Outcome


def assert_clean(outcome: Outcome, least: int) -> None:
    """Everything that this machine can run has passed, and at least `least` tests were chosen.

    How many of them are skipped depends on the machine's instruction sets, so it is only asked why they were.
    """
    assert outcome.status == 0, outcome.output[-8000:]
    report = outcome.report
    assert report is not None
    assert report["sanitized_library_loaded"] and not report["other_libraries"]
    assert report["failed"] == 0 and report["passed"] > 0, outcome.output[-3000:]
    assert [reason for reason in report["skipped"].values() if not is_lack(reason)] == []
    assert report["passed"] + len(report["skipped"]) >= least, outcome.output[-3000:]
    print(f"{report['passed']} passed, {len(report['skipped'])} skipped, {outcome.seconds:.0f} s")


def lack_of(outcome: Outcome) -> str | None:
    """Why the one test of a run was skipped, if this machine lacks what it needs; None if it ran."""
    report = outcome.report
    if outcome.status != 0 or report is None or report["passed"] or report["failed"]:
        return None
    [reason] = report["skipped"].values()
    return reason if is_lack(reason) else None
