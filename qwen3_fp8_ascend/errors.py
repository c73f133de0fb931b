"""The one exception for mistakes that the user can mend."""

from __future__ import annotations

import reprlib


class BlockFp8Error(ValueError):
    """Something the user gave (a checkpoint, a flag, a machine) cannot be used; the message says what to do.

    The message is built once from the parts, so the exception survives pickling between vLLM's processes.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        lines = [what]
        for label, part in (("where", where), ("expected", expected), ("got", got), ("what to do", fix)):
            if part is not None:
                lines.append(f"  {label}: {part}")
        super().__init__("\n".join(lines))


def describe(value: object, limit: int = 200) -> str:
    """A value from a file in one short printable line, whatever its size, depth and characters."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, limit, limit, limit
    short.maxlist = short.maxdict = short.maxtuple = 8
    text = short.repr(value)
    return printable(text, limit)


def printable(text: str, limit: int = 1000) -> str:
    """Text from elsewhere, such as a file's name, as it is if a terminal can show it."""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    return text if text.isprintable() else ascii(text)
