"""The unfinished output of a conversion: atomic, resumable, and never mistaken for a finished one.

Layout of ``<destination>.incomplete/``: ``journal.json`` says what is being made from what; ``checkpoint/`` holds the
finished files and becomes the destination by one rename; ``*.tmp`` is the file that is being written;
``replaced/`` is, for a moment at the end, the old destination of a run that overwrites.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from qwen3_fp8_ascend.checkpoints.anomaly import fault
from qwen3_fp8_ascend.checkpoints.folder import CONFIG
from qwen3_fp8_ascend.errors import BlockFp8Error

JOURNAL = "journal.json"
TMP = ".tmp"


class UnfinishedOutput:
    """The folder in which one conversion's output grows; only one process at a time may have it."""

    def __init__(self, destination: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
        self.destination = destination
        self.overwrite = overwrite
        self.root = destination.with_name(destination.name + ".incomplete")
        self._finished = self.root / "checkpoint"
        self._replaced = self.root / "replaced"
        # Through JSON, so that it compares equal to what is read back.
        self._identity = json.loads(json.dumps(identity))
        self._lock = -1

    def __enter__(self) -> UnfinishedOutput:
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
        unused = self._finished.is_dir() and not any(self._finished.iterdir()) and not self._replaced.exists()
        if kind is not None and unused:
            self._remove()  # nothing was finished, so there is nothing to continue
        os.close(self._lock)

    def has(self, file: str) -> bool:
        """Whether an earlier run finished this file."""
        return (self._finished / file).is_file()

    @property
    def mode(self) -> int:
        """Permissions of what is written: everybody may read it, unless the user's mask says otherwise."""
        return stat.S_IMODE((self.root / JOURNAL).stat().st_mode) & 0o644

    def write(self, file: str, produce: Callable[[Path], object]) -> None:
        """Let `produce` write a file (and sync it), and only then give it its name."""
        tmp = self.root / (file.replace("/", "_") + TMP)
        target = self._finished / file
        try:
            produce(tmp)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(tmp, target)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise
        _sync(target.parent)

    def write_json(self, file: str, document: Mapping[str, Any]) -> None:
        """Write a JSON document as Hugging Face does: indented by two, ending in a newline."""
        self.write(file, lambda tmp: _write_text(tmp, json.dumps(document, indent=2) + "\n"))

    def copy(self, source: Path, file: str) -> None:
        """Copy a file's content."""

        def produce(tmp: Path) -> None:
            shutil.copyfile(source, tmp)
            _sync(tmp)

        self.write(file, produce)

    def finish(self) -> None:
        """Rename the output to the destination; before this it does not exist, after it it is complete."""
        _sync(self._finished)
        check_destination(self.destination, overwrite=self.overwrite)
        if self.destination.exists():
            if self._replaced.exists():
                shutil.rmtree(self._replaced)
            os.rename(self.destination, self._replaced)
        os.rename(self._finished, self.destination)
        _sync(self.destination.parent)
        self._remove()

    def _take_lock(self) -> None:
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
            found = _read_journal(journal)
            if found != self._identity:
                if not self.overwrite:
                    raise BlockFp8Error(
                        "an unfinished conversion of another source, or with other settings, is in the way",
                        where=self.root,
                        got=_difference(found, self._identity),
                        fix=f"delete {self.root}, or allow overwriting",
                    )
                if self._finished.exists():
                    shutil.rmtree(self._finished)
                journal.unlink()
        elif any(path.name != JOURNAL + TMP for path in self.root.iterdir()):
            raise BlockFp8Error(
                "a folder that is no unfinished conversion is in the way",
                where=self.root,
                fix="move it away; this name is needed for the unfinished output",
            )
        for path in self.root.iterdir():
            if path.name.endswith(TMP) or path.name.startswith(TMP):  # the second is the safetensors library's
                path.unlink()
        if not journal.is_file():
            tmp = self.root / (JOURNAL + TMP)
            _write_text(tmp, json.dumps(self._identity, indent=2))
            os.replace(tmp, journal)
        self._finished.mkdir(exist_ok=True)

    def _remove(self) -> None:
        """Remove the folder, the journal last, so that a run that is killed meanwhile is still recognised."""
        for path in sorted(self.root.iterdir(), key=lambda path: path.name == JOURNAL):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.root.rmdir()


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


def _read_journal(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _difference(found: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(found, dict):
        return "an unreadable journal"
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return "a difference in " + ", ".join(keys)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
