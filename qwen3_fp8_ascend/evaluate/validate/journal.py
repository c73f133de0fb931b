"""What an interrupted run has finished: a header and one line of JSON for each step, in a file beside the result."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.terminal import unwritable


class Journal:
    """`finished` has the steps by name; `note` adds one, which is on the disk when it returns."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Go on with the journal at `path` if there is one.

        Raises:
            BlockFp8Error: it is another run's (of another version, device, seed), or none; it is left as it is.
        """
        self.path, self.finished = path, dict[str, dict[str, Any]]()
        lines = self._read()
        if lines:
            self._check(lines[0], header)
            self.finished = {record["step"]: record for record in lines[1:]}
        else:
            self._append(header)

    def note(self, record: dict[str, Any]) -> None:
        """Add a step's record.

        Raises:
            BlockFp8Error: it cannot be written, as on a full disk; what was noted before stays.
        """
        self._append(record)
        self.finished[record["step"]] = record

    def remove(self) -> None:
        """The result is written."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> list[dict[str, Any]]:
        """All whole lines; a last one that was not written to its end is cut off."""
        if not self.path.exists():
            return []
        try:
            data = self.path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                os.truncate(self.path, len(whole))
            return [json.loads(line) for line in whole.splitlines()]
        except (OSError, ValueError) as error:
            raise self._refuse(f"{type(error).__name__}: {error}", "a journal of `validate`") from error

    def _check(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        for key, value in header.items():
            if not isinstance(found, dict) or found.get(key) != value:
                got = found.get(key) if isinstance(found, dict) else found
                raise self._refuse(f"{key} {got}", f"{key} {value}")

    def _refuse(self, got: str, expected: str) -> BlockFp8Error:
        fix = "name another --output, go on with what began it, or delete that file to begin anew"
        what = "the interrupted run that is there cannot be gone on with"
        return BlockFp8Error(what, where=self.path, expected=expected, got=got, fix=fix)

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error
