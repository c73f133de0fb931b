"""Groups of rows and random weights for the grouped linear."""

import itertools

import torch

from qwen3_fp8_ascend.format import BlockGrid
from qwen3_fp8_ascend.testing.experts import random_codes

PATTERNS = {
    "uneven and empty": (3, 0, 17, 0, 0, 1, 9),
    "all on one": (0, 0, 130, 0),
    "a tile and one row": (16, 17),
    "one row each": (1,) * 8,
    "none": (0, 0, 0),
}
"""Rows a group, by what is special about them."""


def ends_of(counts):
    """`ends` of `ops.grouped_linear` for so many rows a group."""
    return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int64)


def random_groups(groups, widths, k):
    """Weights and scales of groups, as `ops.pack_experts` takes them."""
    grid = BlockGrid(tuple(widths), k)
    weights = random_codes((groups, grid.n, k), torch.Generator().manual_seed(1))
    return weights, torch.rand(groups, *grid.scale_shape) * 0.01 + 1e-4, grid
