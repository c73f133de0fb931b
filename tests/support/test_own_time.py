"""The bound on a core's time finds what is slow, whatever else the machine does, and excuses a slow core."""

from __future__ import annotations

import gc

import pytest

from tests.support import own_time
from tests.support.own_time import at_pace, pace, piece, within


def test_what_is_slow_is_found() -> None:
    with pytest.raises(AssertionError, match="of an idle core's time"), within(5 * own_time.PIECE_SECONDS):
        for _ in range(40):
            piece()


def test_what_is_not_is_not() -> None:
    with within(5 * own_time.PIECE_SECONDS):
        piece()


def test_no_collection_is_counted() -> None:
    """A full one takes as long as the process is large: a second, in one that has imported vLLM."""
    collections: list[dict[str, int]] = []

    def note(phase: str, info: dict[str, int]) -> None:
        collections.append(info)

    thresholds = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(100, 1, 1)
    try:
        piece(100)
        assert collections
        with within(1.0):
            before = len(collections)
            piece()
            pace()
            counted = len(collections) - before
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(note)
    assert counted == 0 and gc.isenabled()


def test_a_slow_core_is_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pace() >= 1
    monkeypatch.setattr(own_time, "pace", lambda: 3.0)
    assert at_pace(0.9, 1) == 0.9
    assert at_pace(2.7, 1) == pytest.approx(0.9)
    assert at_pace(3.3, 1) == pytest.approx(1.1)
