"""Read JSON that came from the internet: bounded in size and structure, without duplicate keys."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from qwen3_fp8_ascend.checkpoints.anomaly import fault
from qwen3_fp8_ascend.errors import printable

MAX_ELEMENTS = 200_000
"""Bound on the commas of one document: twice DeepSeek-V3's index, or Qwen3-30B-A3B's 38,000 tensors in one file."""

MAX_DEPTH = 32
"""Bound on nesting: several times what any config.json has, and far from Python's limit of recursion."""

MEMORY_FACTOR = 4
"""Most memory that reading a document may take, in multiples of the files that it describes."""

MEMORY_FLOOR = 1 << 20
"""Memory that any document may take."""

MAX_INTEGER_DIGITS = 20
"""Enough for any 64-bit integer; longer ones take quadratic time to parse."""

DAMAGED = "the file is damaged; download or write it again"


def parse_object(text: bytes, file: str, what: str, described: int | None = None) -> dict[str, Any]:
    """Parse a JSON object, refusing what is valid JSON but hostile.

    `described` is the size in bytes of the files that the document describes (default: its own); what would take more
    than four times as much memory, as a document of nothing but brackets does, is not worth reading.
    Raises:
        BlockFp8Error: not UTF-8, not JSON, not an object, a duplicate key, absurdly many elements, too much memory,
            too deep nesting, or an integer of more than 20 digits.
    """
    check_memory(text, file, what, described)
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_bounded_int)
    except (ValueError, RecursionError) as error:
        # JSONDecodeError and UnicodeDecodeError are ValueErrors; their messages may quote the whole input.
        raise fault(f"{what} is not valid JSON", file=file, got=printable(str(error), 200), fix=DAMAGED) from None
    if not isinstance(document, dict):
        raise fault(f"{what} is not a JSON object", file=file, got=type(document).__name__, fix=DAMAGED)
    _check_depth(document, file, what)
    return document


def check_memory(text: bytes, file: str, what: str, described: int | None = None) -> None:
    """Refuse JSON text that would take far more memory than what it describes, before anybody parses it.

    Raises:
        BlockFp8Error: as said, or absurdly many elements.
    """
    elements = text.count(b",")
    if elements > MAX_ELEMENTS:
        raise fault(f"{what} has more elements than any model", file=file, expected=f"<= {MAX_ELEMENTS}", got=elements)
    needed = _memory(text)
    allowed = MEMORY_FACTOR * max(len(text), described or 0) + MEMORY_FLOOR
    if needed > allowed:
        raise fault(
            f"{what} would take far more memory than the data that it describes",
            file=file,
            expected=f"at most {allowed} bytes",
            got=f"about {needed} bytes",
            fix="do not use this checkpoint unless you know who made it",
        )


def read_object(path: Path, what: str, max_bytes: int, described: int | None = None) -> dict[str, Any]:
    """Read and parse a JSON file of at most `max_bytes` that describes `described` bytes (default: itself).

    Raises:
        BlockFp8Error: the file cannot be read, is no regular file, is too large, or as for `parse_object`.
    """
    size = regular_size(path)
    if size > max_bytes:
        raise fault(f"{what} is too large", file=path.name, expected=f"at most {max_bytes} bytes", got=f"{size} bytes")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise fault(f"{what} cannot be read", file=path.name, got=error.strerror) from None
    return parse_object(text, path.name, what, described)


def regular_size(path: Path) -> int:
    """Size of a regular file, symlinks followed; a pipe or device is refused, since reading it may never end.

    Raises:
        BlockFp8Error: missing, a dangling link, unreadable, or not a regular file.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        if path.is_symlink():
            raise fault(
                "the link leads nowhere",
                file=path.name,
                got=printable(os.readlink(path)),
                fix="the download cache is incomplete; download the checkpoint again",
            ) from None
        raise fault("the file cannot be read", file=path.name, got=getattr(error, "strerror", error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise fault("this is not a regular file", file=path.name, got=stat.filemode(status.st_mode))
    return status.st_size


def _memory(text: bytes) -> int:
    """Roughly, and rather too much, what Python holds at once while a document is parsed and worked with.

    Counted in the text: the bytes, their characters (four bytes each if one of them is beyond the basic plane) and
    the strings cut from them; an object with what is made of it, a list, an element, a string's and a key's overhead.
    """
    width = 1 if text.isascii() else 4 if max(text) >= 0xF0 else 2
    return (
        len(text) * (1 + 2 * width)
        + 1000 * text.count(b"{")
        + 64 * text.count(b"[")
        + 40 * text.count(b",")
        + 28 * text.count(b'"')
        + 180 * text.count(b":")
    )


def _check_depth(document: dict[str, Any], file: str, what: str) -> None:
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for holder in level
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise fault(f"{what} is nested too deeply", file=file, expected=f"at most {MAX_DEPTH} levels", fix=DAMAGED)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!a} occurs twice in one object")
    return out


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
