"""Damage to the bytes of files."""

from __future__ import annotations

import struct

from tests.fuzz.choices import Choices
from tests.fuzz.damages import Damage
from tests.fuzz.drafts import Draft
from tests.fuzz.folders import HOLE, PICKLE, Sparse

JUNK = (
    b"",
    b"{}",
    b"[]",
    b"<html>not found</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    b"\xef\xbb\xbf{}",
    '{"a":1}'.encode("utf-16"),
    b'{"a":1,"a":2}',
    b"{" * 1000,
    b"[" * 100_000,
    b'{"a":' * 3000,
    b"\x00" * 64,
    struct.pack("<Q", 2) + b"{}",
    struct.pack("<Q", 8) + b"{}      ",
    struct.pack("<Q", 10) + b'{"":{}}   ',
    struct.pack("<Q", 100_000_000) + b"{",
    b"PK\x03\x04" + bytes(60),
    PICKLE,
)


def _bytes_of(draft: Draft, choices: Choices) -> tuple[str, bytearray]:
    name = choices.pick(sorted(draft.files))
    content = draft.files[name]
    return name, bytearray(content if isinstance(content, bytes) else b"")


def mutate_bytes(draft: Draft, choices: Choices) -> None:
    """Flip, cut, insert or repeat, mostly within the first kilobytes, where headers and JSON are."""
    name, content = _bytes_of(draft, choices)
    for _ in range(1 + choices.below(4)):
        at = choices.below(max(1, min(len(content), 65536)))
        kind = choices.below(5)
        if kind == 0 and content:
            content[at] = choices.below(256)
        elif kind == 1:
            del content[at : at + 1 + choices.below(64)]
        elif kind == 2:
            content[at:at] = choices.take(8)
        elif kind == 3:
            content[at:at] = content[at : at + 1 + choices.below(64)]
        else:
            token = choices.pick(
                (b"{", b"}", b"[", b"]", b'"', b",", b"-", b"\\u0000", b"1e9", b"null", b"\xf0\x9f\x98\x80")
            )
            content[at : at + len(token)] = token
    draft.files[name] = bytes(content)


def cut_short(draft: Draft, choices: Choices) -> None:
    name, content = _bytes_of(draft, choices)
    draft.files[name] = bytes(content[: choices.below(len(content) + 1)])


def add_trailing(draft: Draft, choices: Choices) -> None:
    name, content = _bytes_of(draft, choices)
    draft.files[name] = bytes(content) + choices.pick((b"\0", b" ", b"\n", b"}", bytes(4096)))


def lie_about_length(draft: Draft, choices: Choices) -> None:
    name, content = _bytes_of(draft, choices)
    true = int.from_bytes(content[:8], "little")
    length = choices.pick(
        (true - 1, true + 1, true + 8, 0, 1, len(content), 100_000_000, 1 << 32, 1 << 63, (1 << 64) - 1)
    )
    draft.files[name] = struct.pack("<Q", length % (1 << 64)) + bytes(content[8:])


def replace_by_junk(draft: Draft, choices: Choices) -> None:
    name, _ = _bytes_of(draft, choices)
    draft.files[name] = choices.pick(JUNK)


def replace_by_choices(draft: Draft, choices: Choices) -> None:
    """Whatever bytes the fuzzer likes."""
    name, _ = _bytes_of(draft, choices)
    text = choices.take(200)
    draft.files[name] = struct.pack("<Q", len(text)) + text if choices.below(2) else text


def make_sparse(draft: Draft, choices: Choices) -> None:
    """A hole at the end, or a last tensor that fills it truthfully."""
    name, content = _bytes_of(draft, choices)
    draft.files[name] = Sparse(bytes(content), choices.pick((HOLE, len(content) + 1, 1 << 20)))


BYTES: tuple[Damage, ...] = (
    mutate_bytes,
    cut_short,
    add_trailing,
    lie_about_length,
    replace_by_junk,
    replace_by_choices,
    make_sparse,
)
