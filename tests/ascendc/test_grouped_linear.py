"""block_grouped_linear, and layers of experts made of it, against the fp64 oracle of what they compute."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import ascendc, prefill
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid
from qwen3_fp8_ascend.testing.experts import ExpertsProblem, assert_layer_exact, random_experts
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact, assert_prefill

from .conftest import DTYPES, FLAG_COUNTING, Emulator, Weight, random_activation, random_weight, relative_error
from .test_backend import on_cpu, schemas  # noqa: F401

EXACT = 1e-6  # what block-scaled fp32 reaches; the contract's figure for fp32 outputs

both_ways_of_counting_flags = pytest.mark.parametrize("emulator", FLAG_COUNTING, indirect=True)


def random_groups(groups: int, widths: Sequence[int], k: int) -> list[Weight]:
    return [random_weight(widths, k, seed=group) for group in range(groups)]


def packed(weights: Sequence[Weight]) -> tuple[torch.Tensor, ...]:
    scales = torch.stack([weight.scale for weight in weights])
    return ascendc.pack_experts((weight.codes for weight in weights), scales, weights[0].grid)


def ends_of(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int64)


def oracle_of(
    x: torch.Tensor, weights: Sequence[Weight], ends: torch.Tensor, activation: Activation = Activation.W8A8
) -> torch.Tensor:
    return reference.grouped_linear(
        x,
        torch.stack([weight.codes.view(torch.uint8) for weight in weights]).view(torch.float8_e4m3fn),
        torch.stack([weight.scale for weight in weights]),
        ends,
        activation=activation,
        grid=weights[0].grid,
        compute_dtype=torch.float64,
    )


@both_ways_of_counting_flags
@pytest.mark.parametrize(
    ("counts", "widths", "k", "cores"),
    [
        ((3, 0, 17, 0, 0, 1, 9), (200, 72), 300, 1),  # uneven and empty groups, merged ragged shards
        ((3, 0, 17, 0, 0, 1, 9), (200, 72), 300, 20),
        ((0, 0, 130, 0), (130,), 641, 3),  # all on one: passes of 64, 64 and 2
        ((64, 65), (128,), 128, 2),
        ((1,) * 8, (96, 96), 256, 7),  # a token of Qwen3-30B-A3B's shape at TP 8
        ((2,), (1,), 1, 20),  # fewer tiles than cores
        ((0, 0, 0), (128,), 256, 2),
    ],
)
def test_every_group_has_its_own_weight(
    emulator: Emulator, counts: tuple[int, ...], widths: tuple[int, ...], k: int, cores: int
) -> None:
    weights, ends = random_groups(len(counts), widths, k), ends_of(counts)
    x = random_activation(sum(counts) + 2, k, torch.float32)  # two rows are nobody's
    got, _ = emulator.grouped_linear(x, packed(weights), ends, sum(widths), cores=cores)
    owned = sum(counts)
    assert not owned or relative_error(got[:owned], oracle_of(x, weights, ends)[:owned]) <= EXACT
    assert not got[owned:].any(), "rows that are nobody's were written"


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sixteen_bit_rows_are_the_rounded_oracle(
    emulator: Emulator, dtype: torch.dtype, activation: Activation
) -> None:
    """By the gates of the dense linear, group by group. fp32 unquantized are bf16's numbers, as experts have them."""
    counts, widths, k = (5, 0, 70), (130, 62), 384
    weights, ends = random_groups(len(counts), widths, k), ends_of(counts)
    x = torch.randn(sum(counts), k, generator=torch.Generator().manual_seed(3)).bfloat16().to(dtype)
    got, _ = emulator.grouped_linear(x, packed(weights), ends, 192, activation=ascendc.ACTIVATIONS[activation])
    for weight, (start, end) in zip(weights, itertools.pairwise([0, *ends.tolist()]), strict=True):
        problem = Problem(x[start:end], weight.codes, weight.scale, grid=weight.grid)
        assert_exact(got[start:end], problem, activation)


def test_a_row_depends_on_its_group_s_weight_alone(emulator: Emulator) -> None:
    """Not on other rows, not on how many cores there are, not on the pass that it is in: tiles are never shared."""
    weights = random_groups(4, (200,), 640)
    x = random_activation(90, 640, torch.bfloat16)
    counts = (0, 70, 13, 7)
    together, _ = emulator.grouped_linear(x, packed(weights), ends_of(counts), 200, cores=1)
    on_more_cores, _ = emulator.grouped_linear(x, packed(weights), ends_of(counts), 200, cores=11)
    assert torch.equal(together, on_more_cores)
    for row, group in ((0, 1), (69, 1), (70, 2), (89, 3)):
        alone = [int(other == group) for other in range(4)]
        got, _ = emulator.grouped_linear(x[row : row + 1], packed(weights), ends_of(alone), 200, cores=5)
        assert torch.equal(got[0], together[row])


def test_nan_and_infinity_stay_in_their_row(emulator: Emulator) -> None:
    """Rows of other groups go through the cube beside a group's own, up to sixteen."""
    weights, ends = random_groups(3, (128,), 256), ends_of((2, 3, 1))
    x = random_activation(6, 256, torch.float32)
    clean, _ = emulator.grouped_linear(x, packed(weights), ends, 128)
    x[1, 5], x[2, 3] = float("nan"), float("inf")
    got, _ = emulator.grouped_linear(x, packed(weights), ends, 128)
    assert got[1].isnan().all() and got[2].isnan().all()
    assert torch.equal(got[[0, 3, 4, 5]], clean[[0, 3, 4, 5]])


@pytest.mark.parametrize("ends", [[5, 2, 900], [-3, 4, 6], [2**40, 0, -(2**63)]])
def test_a_list_that_is_none_stays_within_the_rows(emulator: Emulator, ends: list[int]) -> None:
    """Which row then gets which weight means nothing, but no memory is touched that is not x's."""
    weights, x = random_groups(3, (128,), 128), random_activation(6, 128, torch.float32)
    got, _ = emulator.grouped_linear(x, packed(weights), torch.tensor(ends), 128)
    kept = torch.tensor(ends).clamp(0, 6).cummax(0).values
    assert relative_error(got, oracle_of(x, weights, kept)) <= EXACT


def test_only_groups_with_rows_are_read(emulator: Emulator) -> None:
    """One byte a weight of those, and once for each 64 rows."""
    n, k = 256, 512
    weights = random_groups(6, (n,), k)
    for counts, passes in (((0, 1, 0, 0, 7, 0), 2), ((0, 65, 0, 0, 0, 1), 3)):
        x = random_activation(sum(counts), k, torch.bfloat16)
        _, counted = emulator.grouped_linear(x, packed(weights), ends_of(counts), n)
        assert counted["bytes"]["HBM->UB"] / (n * k * passes) == pytest.approx(1.0, abs=0.01)


def watched_linears(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What goes into every grouped linear of the backend, x and ends, and what comes out."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    honest: Callable[..., torch.Tensor] = ascendc.ascendc_grouped_linear

    def watch(x: torch.Tensor, *operands: object) -> torch.Tensor:
        out = honest(x, *operands)
        ends = operands[3]
        assert isinstance(ends, torch.Tensor)
        seen.append((x, ends, out))
        return out

    monkeypatch.setattr(ascendc, "ascendc_grouped_linear", watch)
    return seen


def in_fp32(problem: Problem) -> Problem:
    return dataclasses.replace(problem, x=problem.x.float())


def routed(problem: ExpertsProblem, to: Sequence[int]) -> ExpertsProblem:
    """The same layer with every token sent to these experts."""
    ids = torch.tensor(to).expand(problem.x.shape[0], -1).contiguous()
    return problem.with_tokens(problem.x, problem.topk_weights[:, : len(to)].contiguous(), ids)


# Qwen3-30B-A3B: 128 experts of 768 x 2048, top 8; sizes divided by 8, and by 16 what a shard at TP 2 has.
LAYERS = {
    "one token": lambda dtype: random_experts(1, 16, 8, 256, 96, dtype=dtype),
    "a batch": lambda dtype: random_experts(5, 16, 8, 256, 48, dtype=dtype),
    "all on one expert": lambda dtype: routed(random_experts(70, 4, 1, 256, 96, dtype=dtype), [2]),
    "nowhere": lambda dtype: routed(random_experts(3, 4, 2, 256, 96, dtype=dtype), [-1, -1]),
}


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_experts_stage_by_stage(
    on_cpu: Emulator,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    activation: Activation,
) -> None:
    problem = LAYERS[name](torch.bfloat16)
    w13, w2 = problem.pack("ascendc", activation=activation)
    seen = watched_linears(monkeypatch)
    out = ops.block_experts(problem.x, w13, w2, problem.topk_weights, problem.topk_ids, activation)
    assert_layer_exact(out, problem, activation)
    stages = ((problem.w13, problem.w13_scale, problem.w13_grid), (problem.w2, problem.w2_scale, problem.w2_grid))
    assert len(seen) == len(stages)
    for (x, ends, got), (codes, scales, grid) in zip(seen, stages, strict=True):
        for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            one = Problem(x[start:end], codes[expert], scales[expert], grid=grid)
            assert_exact(got[start:end], one if got.dtype == x.dtype else in_fp32(one), activation)
    assert int(seen[0][1][-1]) == int((problem.topk_ids >= 0).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_layer_in_the_other_dtypes(on_cpu: Emulator, dtype: torch.dtype) -> None:  # noqa: F811
    problem = LAYERS["one token"](dtype)
    assert_layer_exact(problem.layer("ascendc"), problem)


def test_a_single_expert_is_a_group_too(on_cpu: Emulator) -> None:  # noqa: F811
    problem = routed(random_experts(3, 1, 1, 128, 64), [0])
    assert_layer_exact(problem.layer("ascendc"), problem)


def test_more_rows_than_a_launch_takes(on_cpu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(ascendc, "MAX_GROUPED_ROWS", 8)
    weights, counts = random_groups(4, (72,), 130), (3, 9, 0, 6)
    grid = weights[0].grid
    layer = ops.pack_experts(
        (weight.codes for weight in weights), torch.stack([weight.scale for weight in weights]), grid, "ascendc"
    )
    x = random_activation(20, 130, torch.float32)
    got = ops.grouped_linear(x, layer, ends_of(counts))
    assert relative_error(got[:18], oracle_of(x, weights, ends_of(counts))[:18]) <= EXACT


def many_rows(dtype: torch.dtype) -> ExpertsProblem:
    """66 rows an expert on average, nearly all of them two experts'; each with weights of a size of their own."""
    problem = random_experts(66, 3, 3, 130, 96, dtype=dtype)
    # The share of equal values is judged where there are thousands of them, so not for the third expert.
    ids = torch.where(torch.arange(66)[:, None] < 64, problem.topk_ids % 2, problem.topk_ids)
    ids[0] = -1
    sizes = torch.tensor([1.0, 64.0, 2.0**-5])[:, None, None]  # so that each has a power of two of its own
    scales = {"w13_scale": problem.w13_scale * sizes, "w2_scale": problem.w2_scale / sizes}
    return dataclasses.replace(problem.with_tokens(problem.x, problem.topk_weights, ids), **scales)


def judge_prefill_stage_by_stage(
    problem: ExpertsProblem, monkeypatch: pytest.MonkeyPatch, activation: Activation
) -> torch.Tensor:
    w13, w2 = problem.pack("ascendc", activation=activation)
    assert all(len(set(packed.tensors[2][:, 0, 2].tolist())) == 3 for packed in (w13, w2))
    seen = watched_linears(monkeypatch)
    out = ops.block_experts(problem.x, w13, w2, problem.topk_weights, problem.topk_ids, activation)
    stages = ((problem.w13, problem.w13_scale, problem.w13_grid), (problem.w2, problem.w2_scale, problem.w2_grid))
    for (x, ends, got), (codes, scales, grid) in zip(seen, stages, strict=True):
        assert x.dtype == problem.x.dtype
        for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            one = Problem(x[start:end], codes[expert], scales[expert], grid=grid)
            assert_prefill(got[start:end].to(x.dtype), one, activation)
    assert seen[1][2].dtype == torch.float32
    return out


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_many_rows_go_through_the_scratch_stage_by_stage(
    on_cpu: Emulator,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    activation: Activation,
) -> None:
    """By the bound that the dense prefill has, whichever expert has how many."""
    taken: list[tuple[int, ...]] = []
    honest = prefill.scratch

    def watched(*shape: Any) -> torch.Tensor:
        taken.append(shape[:2])
        return honest(*shape)

    monkeypatch.setattr(prefill, "scratch", watched)
    out = judge_prefill_stage_by_stage(many_rows(dtype), monkeypatch, activation)
    assert taken == [(3 * 192, 130), (3 * 130, 96)]
    assert out.isfinite().all() and not out[0].any()


@pytest.mark.parametrize(
    "fault",
    [
        lambda operand, weights, ends, grow: (operand, weights.roll(1, 0), ends, grow),
        lambda operand, weights, ends, grow: (operand, weights, ends - 1, grow),
        lambda operand, weights, ends, grow: (operand, weights, ends, grow.roll(1, 0)),
    ],
    ids=["another expert's weight", "ends that are off by one", "another row's power of two"],
)
def test_planted_faults_of_the_prefill_are_caught(
    on_cpu: Emulator,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., tuple[torch.Tensor, ...]],
) -> None:
    honest = prefill.multiply_groups
    monkeypatch.setattr(
        prefill, "multiply_groups", lambda *operands: honest(*fault(*operands[:4]), operands[4]).nan_to_num()
    )
    with pytest.raises(AssertionError, match=r"element is off|relative L2|equal the rounded"):
        judge_prefill_stage_by_stage(many_rows(torch.bfloat16), monkeypatch, Activation.W8A8)


def test_a_layer_beyond_the_scratch_keeps_to_the_fused_kernel(
    on_cpu: Emulator,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = routed(random_experts(70, 1, 1, 128, 64), [0])
    monkeypatch.setattr(prefill, "MAX_WEIGHTS", 1000)
    assert_layer_exact(problem.layer("ascendc"), problem)


def test_experts_are_packed_one_by_one(on_cpu: Emulator) -> None:  # noqa: F811
    """Each as a weight alone would be, and none is held when the next comes."""
    weights = random_groups(3, (200, 30), 300)
    alive: list[int] = []

    def one_by_one():
        for number, weight in enumerate(weights):
            alive.append(number)
            yield weight.codes.clone()

    layer = ops.pack_experts(one_by_one(), torch.stack([w.scale for w in weights]), weights[0].grid, "ascendc")
    assert alive == [0, 1, 2] and layer.groups == 3
    for number, weight in enumerate(weights):
        for whole, part in zip(layer.tensors, weight.tensors, strict=True):
            assert torch.equal(whole[number], part)
    tiles, k_blocks = 3, 3
    assert layer.nbytes == 3 * tiles * (k_blocks * (128 * 128 + 32) + 32)


def test_experts_that_the_kernels_do_not_take_are_refused(on_cpu: Emulator) -> None:  # noqa: F811
    k = ascendc.MAX_COLUMNS + 1
    codes = torch.zeros(1, 1, k, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(BlockFp8Error, match="too many columns"):
        ops.pack_experts(codes, torch.ones(1, 1, math.ceil(k / 128)), BlockGrid((1,), k), "ascendc")
