"""What is wrong with a checkpoint, as data: to be listed by `inspect` or raised as an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qwen3_fp8_ascend.errors import BlockFp8Error

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One finding: what is wrong, where, what was expected instead, what was found, and what to do about it.

    An error makes the checkpoint unusable; a warning does not. A note says what is left aside, and nothing is wrong.
    """

    what: str
    file: str | None = None
    tensor: str | None = None
    expected: str | None = None
    got: str | None = None
    fix: str | None = None
    severity: Severity = "error"

    @property
    def where(self) -> str | None:
        """File and tensor in one line."""
        return ", ".join(part for part in (self.file, self.tensor) if part) or None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


MAX_ANOMALIES = 1000
"""Most findings of a severity that are kept; the others are counted. A hostile index could name millions."""


def collect(findings: Iterable[Anomaly]) -> list[Anomaly]:
    """The findings in their order, without those beyond `MAX_ANOMALIES`, for which one says how many there are."""
    kept: list[Anomaly] = []
    counts: Counter[Severity] = Counter()
    for anomaly in findings:
        counts[anomaly.severity] += 1
        if counts[anomaly.severity] <= MAX_ANOMALIES:
            kept.append(anomaly)
    for severity, count in counts.items():
        if count > MAX_ANOMALIES:
            kept.append(Anomaly(f"{count - MAX_ANOMALIES} more {severity}s are not listed", severity=severity))
    return kept


class CheckpointError(BlockFp8Error):
    """A `BlockFp8Error` that keeps its parts, so that `inspect` can list it beside other findings."""

    def __init__(self, anomaly: Anomaly, more: int = 0) -> None:
        self.anomaly = anomaly
        self.more = more
        what = anomaly.what
        if more:
            what += f" (and {more} more; `qwen3-fp8-ascend inspect` lists them all)"
        super().__init__(what, where=anomaly.where, expected=anomaly.expected, got=anomaly.got, fix=anomaly.fix)

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[Anomaly, int]]:
        return CheckpointError, (self.anomaly, self.more)


def fault(
    what: str,
    *,
    file: str | None = None,
    tensor: str | None = None,
    expected: object = None,
    got: object = None,
    fix: str | None = None,
) -> CheckpointError:
    """A `CheckpointError` from its parts, ready to be raised."""
    return CheckpointError(
        Anomaly(
            what,
            file=file,
            tensor=tensor,
            expected=None if expected is None else str(expected),
            got=None if got is None else str(got),
            fix=fix,
        )
    )
