"""Decisions of a generator of inputs: an input *is* its choices, and can be kept in a file and made again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Decisions taken from a byte string; when it is used up every decision is the first alternative."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def below(self, count: int) -> int:
        """An integer from 0 to `count` - 1."""
        return int.from_bytes(self._next(_width(count)), "little") % count

    def take(self, most: int) -> bytes:
        """Bytes as they come, up to `most`."""
        size = self.below(most + 1)
        return self._next(size).ljust(size, b"\0")

    def _next(self, size: int) -> bytes:
        piece = self._data[self._position : self._position + size]
        self._position += size
        return piece

    def pick(self, alternatives: Sequence[T]) -> T:
        """One of several."""
        return alternatives[self.below(len(alternatives))]

    def one_in(self, count: int) -> bool:
        """True once in `count` times, and never when the choices are used up."""
        return self.below(count) == count - 1


class DrawnChoices(Choices):
    """Decisions drawn elsewhere, by hypothesis for instance; `data` replays them through `Choices`."""

    def __init__(self, draw: Callable[[int], int]) -> None:
        super().__init__(b"")
        self._draw = draw
        self.data = b""

    def below(self, count: int) -> int:
        value = self._draw(count) if count > 1 else 0
        self.data += value.to_bytes(_width(count), "little")
        return value

    def _next(self, size: int) -> bytes:
        return bytes(self.below(256) for _ in range(size))


def _width(count: int) -> int:
    """Bytes for a choice among so many."""
    return ((count - 1).bit_length() + 7) // 8


def random_choices(seed: int, number: int, size: int = 256) -> bytes:
    """The choices of one input of a run in bulk."""
    return random.Random(f"{seed}/{number}").randbytes(size)
