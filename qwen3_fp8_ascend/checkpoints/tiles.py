"""Matrices cut into tiles, so that what is computed of a weight costs little memory besides the weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from qwen3_fp8_ascend.format import BlockSize

TILE_ELEMENTS = 1 << 18
"""Weights converted at a time: enough to keep the cores busy, few enough to stay in cache and to cost no memory."""


class Tile(NamedTuple):
    """Part of a matrix: `rows` x `columns` from `row` and `column` on."""

    row: int
    rows: int
    column: int
    columns: int

    @property
    def where(self) -> tuple[slice, slice]:
        """The part, as an index."""
        return slice(self.row, self.row + self.rows), slice(self.column, self.column + self.columns)


def tiles(n: int, k: int, block: BlockSize, *, whole_blocks: bool) -> Iterator[Tile]:
    """Cover an (n, k) matrix by tiles of about `TILE_ELEMENTS` elements, each of several blocks or within one.

    `whole_blocks`: no tile is smaller than a block, however large that is. A matrix without elements has no tiles,
    however long its other side.
    """
    if not n * k:
        return
    width = TILE_ELEMENTS // min(n, block.n) if whole_blocks else TILE_ELEMENTS
    for column, columns in _spans(k, block.k, width, whole_blocks):
        for row, rows in _spans(n, block.n, max(1, TILE_ELEMENTS // columns), whole_blocks):
            yield Tile(row, rows, column, columns)


def _spans(size: int, unit: int, limit: int, whole_units: bool) -> Iterator[tuple[int, int]]:
    """Cut 0 to `size` into pieces of at most `limit`, each of whole units or within one: (start, length)."""
    step = min(max(1, limit // unit) * unit, size)
    inner = step if whole_units else min(step, limit)
    for start in range(0, size, step):
        end = min(start + step, size)
        for position in range(start, end, inner):
            yield position, min(inner, end - position)
