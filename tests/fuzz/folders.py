"""A folder as an attacker makes it: files, sparse ones, links, pipes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

OUTSIDE = "secret"
"""A file beside the checkpoint folder (`OUTSIDE`.safetensors, .json) that no checkpoint may lead to."""

PICKLE = b"cposix\nsystem\n(S'touch PICKLE_WAS_LOADED'\ntR."
"""Runs a command when it is unpickled."""

HOLE = 1 << 40


@dataclass(frozen=True)
class Sparse:
    """A file of `size` bytes that begins with `head` and goes on with a hole; `described`: by a header, as data."""

    head: bytes
    size: int
    described: bool = False


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Pipe:
    """A named pipe, which blocks whoever opens it."""


@dataclass(frozen=True)
class Folder:
    """A folder in place of a file."""


Content = bytes | Sparse | Link | Pipe | Folder


@dataclass
class HostileFolder:
    """Files by relative name, and what was done to them."""

    files: dict[str, Content]
    damages: list[str] = field(default_factory=list)

    def size(self, *, data: bool) -> int:
        """Bytes that a reader has before it: holes count in JSON, where they are data, and for who reads all `data`."""
        total = 0
        for name, content in self.files.items():
            if isinstance(content, bytes):
                total += len(content)
            elif isinstance(content, Sparse):
                small = content.size < HOLE and (data or not name.endswith(".safetensors"))
                total += content.size if small or content.described else len(content.head)
        return total

    @property
    def mapped(self) -> int:
        """Bytes of its holes: who maps a file takes so much address space, which is not memory."""
        return sum(content.size for content in self.files.values() if isinstance(content, Sparse))

    def write(self, folder: Path) -> None:
        """Write it into an empty folder."""
        for name, content in self.files.items():
            path = os.path.join(os.fsencode(folder), name.encode("utf-8", "surrogateescape"))
            if "/" in name:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            if isinstance(content, Link):
                os.symlink(content.target, path)
            elif isinstance(content, Pipe):
                os.mkfifo(path)
            elif isinstance(content, Folder):
                os.mkdir(path)
            else:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                try:
                    os.write(descriptor, content if isinstance(content, bytes) else content.head)
                    if isinstance(content, Sparse):
                        os.ftruncate(descriptor, content.size)
                finally:
                    os.close(descriptor)
