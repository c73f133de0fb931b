"""Ranks that cut through blocks, without ranks: all parts together are the uncut linear."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.format import Activation, BlockGrid, BlockSize, ceil_div
from qwen3_fp8_ascend.testing import nonfinite
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact, random_problem, rel_l2
from qwen3_fp8_ascend.testing.strategies import activations
from qwen3_fp8_ascend.vllm_plugin.partition import Partition

FP64 = 1e-13
"""Other orders of fp64 sums."""

BLOCKS = (BlockSize(), BlockSize(64, 64), BlockSize(32, 256), BlockSize(1, 128), BlockSize(128, 4))


def columns_of(whole: Problem, ranks: int, activation: Activation) -> list[tuple[Partition, Problem]]:
    """Each rank's partition and its own columns, as it loads them."""
    k, block = whole.grid.k // ranks, whole.grid.block
    out = []
    for rank in range(ranks):
        column = rank * k
        partition = Partition.of_columns(block, whole.grid.widths, k, rank, ranks, activation)
        blocks = partition.scale_columns
        codes = partition.pad_codes(whole.weight.view(torch.uint8)[:, column : column + k].contiguous())
        scale = whole.scale[:, blocks.first : blocks.first + blocks.count]
        assert scale.shape == partition.scale_shape == partition.grid.scale_shape
        part = Problem(
            whole.x[:, column : column + k], codes.view(torch.float8_e4m3fn), scale, whole.bias, partition.grid
        )
        out.append((partition, part))
    return out


def padded(parts: list[tuple[Partition, Problem]]) -> list[Problem]:
    """The same with the activations that the ranks multiply, after their exchange."""

    def gather(_: torch.Tensor) -> torch.Tensor:
        return torch.cat([p.shared.maxima(problem.x) for p, problem in parts if p.shared], -1)

    return [dataclasses.replace(problem, x=p.pad(problem.x, gather)) for p, problem in parts]


@st.composite
def cut_columns(draw: st.DrawFn) -> tuple[Problem, int]:
    ranks, block = draw(st.integers(1, 8)), draw(st.sampled_from(BLOCKS))
    k = ranks * draw(st.integers(1, 200))
    grid = BlockGrid((draw(st.integers(1, 40)),), k, block)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 0x7F, (grid.n, k), generator=generator, dtype=torch.uint8)
    scale = torch.exp2(torch.rand(grid.scale_shape, generator=generator) * 8 - 14)
    return Problem(draw(activations(k=k)), codes.view(torch.float8_e4m3fn), scale, None, grid), ranks


@pytest.mark.parametrize("activation", list(Activation))
@given(cut=cut_columns())
def test_columns_add_up(activation: Activation, cut: tuple[Problem, int]) -> None:
    whole, ranks = cut
    want = whole.oracle(activation)
    got = sum(part.oracle(activation) for part in padded(columns_of(whole, ranks, activation)))
    assert isinstance(got, torch.Tensor)
    size = whole.magnitude(activation)
    assert ((got - want).abs() <= FP64 * size).all()


@given(cut=cut_columns())
def test_every_rank_has_the_codes_and_scales_of_the_uncut_activation(cut: tuple[Problem, int]) -> None:
    whole, ranks = cut
    block_k = whole.grid.block.k
    codes, scale = reference.quantize_activation(whole.x, block_k)
    parts = columns_of(whole, ranks, Activation.W8A8)
    for (partition, _), part in zip(parts, padded(parts), strict=True):
        ours, our_scale = reference.quantize_activation(part.x, block_k)
        own = slice(partition.column, partition.column + partition.k)
        blocks = partition.scale_columns
        own_codes = ours.view(torch.uint8)[:, partition.front : partition.front + partition.k]
        assert torch.equal(own_codes, codes.view(torch.uint8)[:, own])
        assert torch.equal(our_scale, scale[:, blocks.first : blocks.first + blocks.count])
        assert part.x.shape[1] <= partition.k + block_k  # less than a block is added


@pytest.mark.parametrize("case", nonfinite.NON_FINITE, ids=str)
@pytest.mark.parametrize("ranks", [2, 4, 10])
def test_what_is_not_finite_stays_so(case: nonfinite.NonFinite, ranks: int) -> None:
    """A NaN makes its whole group NaN, on every rank that has part of it."""
    k = 300
    whole = dataclasses.replace(random_problem(0, (40,), k), x=nonfinite.activation(case, k))
    for activation in Activation:
        want = whole.oracle(activation)
        got = sum(part.oracle(activation) for part in padded(columns_of(whole, ranks, activation)))
        assert isinstance(got, torch.Tensor)
        assert nonfinite.same_numbers(got.isfinite(), want.isfinite())
        assert nonfinite.same_numbers(got.isnan(), want.isnan())


OMISSIONS: dict[str, Callable[[list[tuple[Partition, Problem]]], list[Problem]]] = {
    "no exchange": lambda parts: [
        dataclasses.replace(problem, x=torch.nn.functional.pad(problem.x, (p.front, p.back))) for p, problem in parts
    ],
    "the last rank's maxima for all": lambda parts: [
        dataclasses.replace(q, x=p.pad(q.x, lambda _: parts[-1][0].shared.maxima(parts[-1][1].x).repeat(1, len(parts))))  # type: ignore[union-attr]
        for p, q in parts
    ],
    "no phase": lambda parts: [
        dataclasses.replace(
            problem,
            x=torch.nn.functional.pad(problem.x, (0, p.front + p.back)),
            weight=problem.weight.view(torch.uint8).roll(-p.front, 1).view(torch.float8_e4m3fn),
        )
        for p, problem in parts
    ],
}


@pytest.mark.parametrize("omission", OMISSIONS)
def test_what_is_left_out_is_noticed(omission: str) -> None:
    whole = random_problem(16, (64,), 640, dtype=torch.float32)
    want = whole.oracle()
    parts = columns_of(whole, 4, Activation.W8A8)
    good, bad = (sum(p.oracle() for p in made) for made in (padded(parts), OMISSIONS[omission](parts)))
    assert isinstance(good, torch.Tensor) and isinstance(bad, torch.Tensor)
    assert rel_l2(good, want) < FP64 < 1e-4 < rel_l2(bad, want)


@given(
    shares=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    ranks=st.integers(1, 6),
    k=st.integers(1, 200),
    block=st.sampled_from(BLOCKS),
    seed=st.integers(0, 99),
)
def test_rows_are_those_of_the_uncut_linear(shares: list[int], ranks: int, k: int, block: BlockSize, seed: int) -> None:
    """Merged shards, each cut for all ranks."""
    whole = random_problem(3, tuple(share * ranks for share in shares), k, block=block, seed=seed)
    want = whole.oracle().split(whole.grid.widths, 1)
    weights = whole.weight.view(torch.uint8).split(whole.grid.widths)
    scales = whole.scale.split(whole.grid.scale_rows)
    for rank in range(ranks):
        partition = Partition(block, tuple(shares), k, rows=tuple(rank * share for share in shares))
        own = [slice(row, row + share) for row, share in zip(partition.rows, shares, strict=True)]
        blocks = [slice(extent.first, extent.first + extent.count) for extent in partition.scale_rows]
        codes = torch.cat([weight[rows] for weight, rows in zip(weights, own, strict=True)])
        scale = torch.cat([part[rows] for part, rows in zip(scales, blocks, strict=True)])
        assert scale.shape == partition.scale_shape == partition.grid.scale_shape
        assert partition.pad_codes(codes) is codes and partition.pad(whole.x, NotImplemented) is whole.x
        got = Problem(whole.x, codes.view(torch.float8_e4m3fn), scale, None, partition.grid).oracle()
        assert torch.equal(got, torch.cat([part[:, rows] for part, rows in zip(want, own, strict=True)], 1))


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_compute_a_part_as_they_compute_a_whole(activation: Activation, dtype: torch.dtype) -> None:
    whole = random_problem(20, (200,), 1152, dtype=dtype)
    for part in padded(columns_of(whole, 4, activation)):
        packed = ops.pack_weight(part.weight, part.scale, part.grid, "cpu", activation=activation)
        assert_exact(ops.block_linear(part.x, packed, activation=activation), part, activation)


def test_a_cut_costs_less_than_a_block() -> None:
    partition = Partition(BlockSize(), (100, 100), 1000, rows=(100, 100))
    assert partition.grid == BlockGrid((28, 72, 28, 72), 1000)
    last = Partition(BlockSize(), (8,), 1000, column=1000)
    assert (last.front, last.grid.k) == (1000 % 128, 1000 + 1000 % 128)
    assert last.grid.scale_shape[1] == ceil_div(2000, 128) - 1000 // 128
