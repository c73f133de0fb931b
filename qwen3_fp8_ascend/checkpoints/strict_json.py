"""Read JSON that came from the internet: bounded in size and structure, without duplicate keys."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from qwen3_fp8_ascend.checkpoints.anomaly import fault

MAX_ELEMENTS = 1 << 20
"""Bound on the commas of one document: ten times DeepSeek-V3's index, and about a second to parse."""

MAX_INTEGER_DIGITS = 20
"""Enough for any 64-bit integer; longer ones take quadratic time to parse."""

DAMAGED = "the file is damaged; download or write it again"


def parse_object(text: bytes, file: str, what: str) -> dict[str, Any]:
    """Parse a JSON object, refusing what is valid JSON but hostile.

    Raises:
        BlockFp8Error: not UTF-8, not JSON, not an object, a duplicate key, absurdly many elements, too deep
            nesting, or an integer of more than 20 digits.
    """
    elements = text.count(b",")
    if elements > MAX_ELEMENTS:
        raise fault(f"{what} has more elements than any model", file=file, expected=f"<= {MAX_ELEMENTS}", got=elements)
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_bounded_int)
    except (ValueError, RecursionError) as error:
        # JSONDecodeError and UnicodeDecodeError are ValueErrors; their messages may quote the whole input.
        raise fault(f"{what} is not valid JSON", file=file, got=_shorten(str(error)), fix=DAMAGED) from None
    if not isinstance(document, dict):
        raise fault(f"{what} is not a JSON object", file=file, got=type(document).__name__, fix=DAMAGED)
    return document


def read_object(path: Path, what: str, max_bytes: int) -> dict[str, Any]:
    """Read and parse a JSON file of at most `max_bytes`.

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
    return parse_object(text, path.name, what)


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
                got=os.readlink(path),
                fix="the download cache is incomplete; download the checkpoint again",
            ) from None
        raise fault("the file cannot be read", file=path.name, got=getattr(error, "strerror", error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise fault("this is not a regular file", file=path.name, got=stat.filemode(status.st_mode))
    return status.st_size


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


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
