"""How far a benchmark is, in a log and on a terminal."""

import contextlib
import io
import os
import pty
from typing import BinaryIO

import pytest
from rich.console import Console

from benchmarks.steps import steps


def say_two(console: Console) -> None:
    with steps(console, 2) as said:
        for m in (1, 16):
            said.begin(f"m={m}")
            said.end(f"m={m}: {m} ms, [90%] of the read")


def read_all(terminal: BinaryIO) -> bytes:
    """What was written on the other side, which is closed; Linux then gives an error in the place of an end."""
    seen = b""
    with contextlib.suppress(OSError):
        while part := os.read(terminal.fileno(), 4096):
            seen += part
    return seen


@pytest.mark.parametrize("coloured", [False, True])
def test_a_log_has_a_line_for_each_step(coloured: bool) -> None:
    log = io.StringIO()
    say_two(Console(file=log, force_terminal=coloured, width=20))
    assert log.getvalue() == "m=1: 1 ms, [90%] of the read\nm=16: 16 ms, [90%] of the read\n"


def test_a_terminal_has_a_bar_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as file:
        say_two(Console(file=file, force_terminal=True, width=60))
    with os.fdopen(ours, "rb") as terminal:
        seen = read_all(terminal).decode()
    assert "m=16" in seen and "of the read" not in seen
    assert seen.rstrip().endswith("\x1b[2K")  # the line is cleared
