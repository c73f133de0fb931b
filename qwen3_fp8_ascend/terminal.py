"""What all commands share: where they print, how they fail, how they end.

Results go to stdout, everything else to stderr; colour and progress only on a terminal (NO_COLOR is obeyed). An error
is one line that says what to do. Exit codes: 0 fine, 1 a threshold missed, 2 bad input or set-up, 130 after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qwen3_fp8_ascend.errors import BlockFp8Error

WIDE = 200
"""Columns where nobody's window sets them, so that a program reads whole words."""

out = Console(width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]

INTERRUPTED = 130
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Base of the command line's own errors, from whichever click this typer brings."""


def be_quiet() -> None:
    """From here on nothing is printed but JSON and errors."""
    out.quiet = err.quiet = True


def is_quiet() -> bool:
    """Whether `--quiet` was given."""
    return err.quiet


def is_watched(console: Console) -> bool:
    """Whether lines can be redrawn: it is a terminal. Not `is_terminal`: FORCE_COLOR makes that true of a file."""
    return console.file.isatty() and not console.is_dumb_terminal and not console.quiet


@contextlib.contextmanager
def progress(console: Console, step: str = "") -> Iterator[Callable[[str], None]]:
    """What is being done, said by calling what the `with` block gets.

    On a terminal one line that is redrawn. Elsewhere `step` alone, as a line of its own: a log is not for watching.
    """
    if is_watched(console):
        with console.status(step) as status:
            yield status.update
    else:
        if step:
            console.print(step, markup=False, highlight=False, soft_wrap=True)
        yield lambda step: None


def fail(message: str) -> None:
    """Print one error as one line on stderr."""
    console = Console(stderr=True)
    console.print("[bold red]error:[/]", end=" ")
    console.print(one_line(message), markup=False, highlight=False, soft_wrap=True)


def one_line(message: str) -> str:
    """The lines of a message joined by semicolons."""
    return "; ".join(line.strip().rstrip(".") for line in message.splitlines() if line.strip())


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; the user's mistakes end in one line, not in a traceback."""
    try:
        code = app(list(sys.argv[1:] if arguments is None else arguments) or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except BlockFp8Error as error:
        fail(str(error))
        return 2
    except UsageError as error:
        return _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        # Whoever read our output has seen enough (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0


def _usage(error: Exception) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "qwen3-fp8-ascend"
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())  # type: ignore[attr-defined]
        return 0
    fail(f"{error.format_message()}\nwhat to do: see {path} --help")  # type: ignore[attr-defined]
    return 2


def check_choices(option: str, values: Iterable[str], choices: Collection[str]) -> None:
    """Refuse values that an option does not have.

    Raises:
        BlockFp8Error: as said.
    """
    for value in values:
        if value not in choices:
            fix = f"choose one of: {', '.join(choices)}"
            raise BlockFp8Error("unknown value", where=option, got=value or "nothing", fix=fix)


def check_writable(path: Path | None) -> None:
    """Find out before the work that a result could not be written after it.

    Raises:
        BlockFp8Error: as `write_bytes`; or the path is a folder.
    """
    if path is None:
        return
    trial = path.with_name(f".{path.name}.part")
    try:
        if path.is_dir():
            raise BlockFp8Error("the result cannot be written", where=path, got="it is a folder", fix="name a file")
        made = [folder for folder in path.parents if not folder.exists()]  # the deepest first
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
        for folder in made:
            folder.rmdir()
    except OSError as error:
        raise unwritable(path, error) from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or not at all.

    Raises:
        BlockFp8Error: it cannot be written, or the disk is full.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True) if part.parent.is_dir() else None
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> BlockFp8Error:
    """What to say of a file that could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "free some space, or write elsewhere" if full else "choose a file that can be written"
    got = f"{error.filename} is no folder" if isinstance(error, FileExistsError) else error.strerror
    return BlockFp8Error("the result cannot be written", where=path, got=got, fix=fix)
