"""What one rank holds of a linear that tensor parallelism cuts: rows or columns that may start and end within a block.

Blocks are the checkpoint's, laid out before anybody cut, so each rank takes the scales of all blocks that it touches.
No kernel knows of a cut:

- Rows: a shard that starts within a block is packed as two shards, what is left of that block and what follows it,
  since every shard of a grid starts a block of its own.
- Columns: zeros in front of the rank's own fill up the first block, in the weight (code 0) and in x. They add nothing.
- Columns with quantized activations: a group of channels that a cut divides has one scale, by the largest magnitude
  on all the ranks that hold part of it. The ranks exchange the maxima of their first and last groups, and each puts
  those of the whole groups among its zeros: into the first of the zeros in front, and into one more column behind the
  last channel. The kernels find them there as they find any maximum, and the weight's zeros take them out of the sums.
  So the codes are those of the uncut linear, to the bit.
- Experts: rows of gate and up and columns of down at once, with the exchange between them.

Nothing here imports vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwen3_fp8_ascend.format import Activation, BlockGrid, BlockSize, ceil_div

Gather = Callable[[torch.Tensor], torch.Tensor]
"""All ranks' tensors side by side in the last dimension, in the order of ranks."""


@dataclass(frozen=True)
class Extent:
    """Consecutive blocks."""

    first: int
    count: int


def blocks_of(start: int, size: int, block: int) -> Extent:
    """The blocks that rows or columns [start, start + size) touch."""
    return Extent(start // block, ceil_div(start + size, block) - start // block if size else 0)


def divides_groups(k: int, ranks: int, block: BlockSize, activation: Activation) -> bool:
    """Whether ranks that each hold `k` columns divide groups of channels that are quantized."""
    return ranks > 1 and k % block.k != 0 and activation is not Activation.W8A16


@dataclass(frozen=True)
class SharedGroups:
    """Groups of channels that several ranks hold part of; each rank holds `k` consecutive channels."""

    k: int
    block_k: int
    rank: int
    ranks: int

    def maxima(self, x: torch.Tensor) -> torch.Tensor:
        """Largest magnitudes of this rank's part of its first and of its last group. Shapes: x (..., k) -> (..., 2)."""
        start = self.rank * self.k
        first = min(self.k, self.block_k - start % self.block_k)
        last = max(0, self._block_of(self.rank, 1) * self.block_k - start)
        ends = (x[..., :first], x[..., last:])
        return torch.cat([part.abs().amax(-1, keepdim=True) for part in ends], -1)

    def agreed(self, gathered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the whole first and the whole last group. Shapes: gathered (..., 2 * ranks) -> two of (..., 1)."""
        return self._largest(gathered, 0), self._largest(gathered, 1)

    def _largest(self, gathered: torch.Tensor, end: int) -> torch.Tensor:
        block = self._block_of(self.rank, end)
        parts = [2 * r + e for r in range(self.ranks) for e in (0, 1) if self._block_of(r, e) == block]  # consecutive
        return gathered[..., parts[0] : parts[-1] + 1].amax(-1, keepdim=True)

    def _block_of(self, rank: int, end: int) -> int:
        """The block of a rank's first (0) or last (1) channel."""
        return (rank * self.k + end * (self.k - 1)) // self.block_k


@dataclass(frozen=True)
class Partition:
    """A rank's part of a linear (n, k), perhaps of merged shards.

    widths: rows of each shard on this rank. rows: the first of them within the checkpoint's tensor.
    k, column: the same of columns.
    shared: set where activations are quantized and cuts divide groups: then all ranks must call `pad`.
    behind: whether there are channels behind this rank's last one that belong to its group.
    """

    block: BlockSize
    widths: tuple[int, ...]
    k: int
    rows: tuple[int, ...] = ()
    column: int = 0
    shared: SharedGroups | None = None
    behind: bool = False

    def __post_init__(self) -> None:
        if not self.rows:
            object.__setattr__(self, "rows", (0,) * len(self.widths))

    @classmethod
    def of_columns(
        cls, block: BlockSize, widths: tuple[int, ...], k: int, rank: int, ranks: int, activation: Activation
    ) -> Partition:
        """All rows, and the columns of one of so many ranks that each hold `k`."""
        column = rank * k
        return cls(
            block,
            widths,
            k,
            column=column,
            shared=SharedGroups(k, block.k, rank, ranks) if divides_groups(k, ranks, block, activation) else None,
            behind=(column + k) % block.k != 0 and rank + 1 < ranks,
        )

    @property
    def scale_rows(self) -> tuple[Extent, ...]:
        """Which rows of a shard's scales this rank takes."""
        return tuple(blocks_of(row, width, self.block.n) for row, width in zip(self.rows, self.widths, strict=True))

    @property
    def scale_columns(self) -> Extent:
        return blocks_of(self.column, self.k, self.block.k)

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Of this rank's scales."""
        return sum(extent.count for extent in self.scale_rows), self.scale_columns.count

    @property
    def front(self) -> int:
        """Zero columns before this rank's own."""
        return self.column % self.block.k

    @property
    def back(self) -> int:
        """Zero columns behind them."""
        return int(self.shared is not None and self.behind)

    def parts(self, shard: int) -> tuple[int, ...]:
        """The widths as which a shard is packed."""
        width, left = self.widths[shard], -self.rows[shard] % self.block.n
        return (left, width - left) if 0 < left < width else (width,)

    @functools.cached_property
    def grid(self) -> BlockGrid:
        """Of the weight as it is packed."""
        widths = tuple(part for shard in range(len(self.widths)) for part in self.parts(shard))
        return BlockGrid(widths, self.front + self.k + self.back, self.block)

    @property
    def pads(self) -> bool:
        """Whether `pad` does anything."""
        return self.front > 0 or self.shared is not None

    def pad_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Shapes: codes (n, k) uint8 -> (n, grid.k)."""
        return torch.nn.functional.pad(codes, (self.front, self.back)) if self.front or self.back else codes

    def pad(self, x: torch.Tensor, gather: Gather) -> torch.Tensor:
        """The activation that belongs to the packed weight. Shapes: x (..., k) -> (..., grid.k)."""
        if self.shared is None:
            return torch.nn.functional.pad(x, (self.front, 0)) if self.front else x
        first, last = self.shared.agreed(gather(self.shared.maxima(x)))
        pieces = [x]
        if self.front:
            pieces = [torch.nn.functional.pad(first, (0, self.front - 1)), x]
        if self.back:
            pieces.append(last)
        return torch.cat(pieces, -1) if len(pieces) > 1 else x


def partitions_of_experts(
    block: BlockSize, hidden: int, inner: int, rank: int, ranks: int, activation: Activation
) -> tuple[Partition, Partition]:
    """Of gate and up, and of down, where each rank holds `inner` intermediate channels of all experts.

    They are rows of gate and up and columns of down. What is exchanged is the maxima of glu(gate, up), a row for
    each expert of each token.
    """
    row = rank * inner
    return (
        Partition(block, (inner, inner), hidden, rows=(row, row)),
        Partition.of_columns(block, (hidden,), inner, rank, ranks, activation),
    )
