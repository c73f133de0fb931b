"""How far a benchmark is: a bar on a terminal; elsewhere, as in a log, a line for each step that is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress

from qwen3_fp8_ascend.terminal import is_watched


class Steps:
    """Of a benchmark; `bar` is the one on a terminal, if there is one."""

    def __init__(self, console: Console, total: int, bar: Progress | None) -> None:
        self._console, self._bar = console, bar
        self._task = bar.add_task("", total=total) if bar else None

    def begin(self, step: str) -> None:
        """Say what is being done: on a terminal only."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=step)

    def end(self, step: str) -> None:
        """One of the `total` steps is done, with what came of it."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)
        else:
            self._console.print(step, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def steps(console: Console, total: int) -> Iterator[Steps]:
    """Steps of a benchmark, `total` of them, within the `with` block."""
    if is_watched(console):
        with Progress(console=console, transient=True) as bar:
            yield Steps(console, total, bar)
    else:
        yield Steps(console, total, None)
