"""The one exception for mistakes that the user can mend."""

from __future__ import annotations


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
