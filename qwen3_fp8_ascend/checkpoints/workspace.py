"""The unfinished output of a conversion: atomic, resumable, and never mistaken for a finished one.

Layout of ``<destination>.incomplete/``: ``journal.json`` says what is being made from what; ``checkpoint/`` holds the
finished files and becomes the destination by one rename; ``*.part`` is the file that is being written;
``replaced/`` is, for a moment at the end, the old destination of a run that overwrites.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from qwen3_fp8_ascend.checkpoints.anomaly import fault
from qwen3_fp8_ascend.checkpoints.folder import CONFIG
from qwen3_fp8_ascend.errors import BlockFp8Error

JOURNAL = "journal.json"
PART_SUFFIX = ".part"


class Workspace:
    """Holds the folder in which one conversion's output grows; only one process at a time may have it."""

    def __init__(self, destination: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
        self.destination = Path(os.path.abspath(destination))
        self.overwrite = overwrite
        self.root = self.destination.with_name(self.destination.name + ".incomplete")
        self.output = self.root / "checkpoint"
        self._replaced = self.root / "replaced"
        # Through JSON, so that it compares equal to what is read back.
        self._identity = json.loads(json.dumps(identity))
        self._lock: int | None = None

    def __enter__(self) -> Workspace:
        check_destination(self.destination, overwrite=self.overwrite)
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._take_lock()
            self._adopt()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if kind is not None and self.output.is_dir() and not any(self.output.iterdir()):
            self.output.rmdir()
            self._remove()  # nothing was finished, so there is nothing to continue
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def has(self, file: str, size: int) -> bool:
        """Whether an earlier run finished this file."""
        path = self.output / file
        return path.is_file() and path.stat().st_size == size

    def write(self, file: str, produce: Callable[[Path], object]) -> None:
        """Let `produce` write a file (and sync it), and only then give it its name."""
        part = self.root / (file.replace("/", "_") + PART_SUFFIX)
        try:
            produce(part)
            target = self.output / file
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)

    def write_json(self, file: str, document: Mapping[str, Any]) -> None:
        """Write a JSON document as Hugging Face does: indented by two, ending in a newline."""
        text = json.dumps(document, indent=2) + "\n"
        self.write(file, lambda part: _write_durably(part, text.encode("ascii")))

    def copy(self, source: Path, file: str) -> None:
        """Copy a file's content."""

        def produce(part: Path) -> None:
            shutil.copyfile(source, part)
            with part.open("rb") as copied:
                os.fsync(copied.fileno())

        self.write(file, produce)

    def finish(self) -> None:
        """Rename the output to the destination; before this it does not exist, after it it is complete."""
        _sync_folder(self.output)
        check_destination(self.destination, overwrite=self.overwrite)
        if self.destination.exists():
            if self._replaced.exists():
                shutil.rmtree(self._replaced)
            os.rename(self.destination, self._replaced)
        os.rename(self.output, self.destination)
        _sync_folder(self.destination.parent)
        self._remove()

    def _take_lock(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockFp8Error(
                "another process is writing this checkpoint",
                where=self.root,
                fix="wait for it, or choose another destination",
            ) from None
        except OSError:
            return  # a network file system without locks: two runs at once are then up to the user

    def _adopt(self) -> None:
        """Continue what an earlier run with the same identity left, or begin."""
        journal = self.root / JOURNAL
        if journal.is_file():
            try:
                found = json.loads(journal.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                found = None
            if found != self._identity:
                if not self.overwrite:
                    raise BlockFp8Error(
                        "an unfinished conversion of another source, or with other settings, is in the way",
                        where=self.root,
                        got=_difference(found, self._identity),
                        fix=f"delete {self.root}, or allow overwriting",
                    )
                self._clear()
        elif any(path.name != JOURNAL + PART_SUFFIX for path in self.root.iterdir()):
            raise BlockFp8Error(
                "a folder that is no unfinished conversion is in the way",
                where=self.root,
                fix="move it away; this name is needed for the unfinished output",
            )
        for part in self.root.glob(f"*{PART_SUFFIX}"):
            part.unlink()
        if not journal.is_file():
            part = self.root / (JOURNAL + PART_SUFFIX)
            _write_durably(part, json.dumps(self._identity, indent=2).encode())
            os.replace(part, journal)
        self.output.mkdir(exist_ok=True)

    def _remove(self) -> None:
        """Remove the folder, the journal last, so that a run that is killed meanwhile is still recognised."""
        if self._replaced.exists():
            shutil.rmtree(self._replaced)
        (self.root / JOURNAL).unlink(missing_ok=True)
        self.root.rmdir()

    def _clear(self) -> None:
        (self.root / JOURNAL).unlink()
        if self.output.exists():
            shutil.rmtree(self.output)


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Refuse a destination that exists, unless it is empty, or a checkpoint that may be overwritten.

    Raises:
        BlockFp8Error: as said.
    """
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not destination.is_dir():
        raise fault("the destination exists and is not a folder", file=str(destination), fix="choose another name")
    names = os.listdir(destination)
    if names and not overwrite:
        raise fault(
            "the destination exists",
            file=str(destination),
            fix="choose another name, or allow overwriting (--overwrite)",
        )
    if names and CONFIG not in names:
        raise fault(
            "the destination is not a checkpoint folder, so it is not overwritten",
            file=str(destination),
            expected=f"a folder with {CONFIG}",
            fix="choose another name",
        )


def _difference(found: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(found, dict):
        return "an unreadable journal"
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return "a difference in " + ", ".join(keys)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
