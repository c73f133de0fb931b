"""Bounds on a core's time that mean the same on every machine, idle or busy.

A second of processor time is no measure by itself: another process on the core's other thread, a slower core or a
virtual machine's neighbours make each instruction take longer. So what took longer than its bound is divided by how
much longer a fixed piece of the same sort of work takes at that moment. Nor is a garbage collection counted: a full one
takes as long as everything that the process has made before, which has nothing to do with the work.
"""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

PIECE_SECONDS = 0.0113
"""What `piece` takes on an idle core of a Zen 3 with Python 3.11: the least of 360; half of them took 0.015 or more."""

PIECES = 9

_NUMBER = re.compile(r"\.(\d+)\.")


def piece(entries: int = 4000) -> int:
    """Work such as reading a checkpoint's header is: objects made and parsed, names cut and looked up; about a MiB."""
    made = {f"model.layers.{number}.weight": {"shape": [number, 1], "dtype": "U8"} for number in range(entries)}
    read = json.loads(json.dumps(made))
    found = 0
    for name in made:
        match = _NUMBER.search(name)
        found += match is not None and name in read and name.rpartition(".")[2] == "weight" and int(match[1]) >= 0
    return found


@contextmanager
def _without_collections() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def pace() -> float:
    """How many times longer than on that idle core `PIECES` pieces take here and now, at least 1."""
    with _without_collections():
        started = time.process_time()
        for _ in range(PIECES):
            piece()
        return max(1.0, (time.process_time() - started) / (PIECES * PIECE_SECONDS))


def at_pace(seconds: float, bound: float) -> float:
    """Processor time as it is if within `bound`, else what that idle core would have taken for the same work."""
    return seconds if seconds <= bound else seconds / pace()


@contextmanager
def within(bound: float) -> Iterator[None]:
    """What is done inside takes at most `bound` seconds of an idle core's time.

    Raises AssertionError if it takes more.
    """
    started = time.process_time()
    try:
        with _without_collections():
            yield
    finally:
        seconds = at_pace(time.process_time() - started, bound)
        assert seconds <= bound, f"took {seconds:.2f} s of an idle core's time, more than {bound} s"
