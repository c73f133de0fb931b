"""Experts on torch_npu's grouped operator (A5), which is stood in for by its documented meaning."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import torch_npu
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.experts import ExpertsProblem, assert_layer_exact, random_experts
from qwen3_fp8_ascend.testing.judges import (
    Problem,
    assert_exact,
)
from tests.support.documented_npu import DocumentedOperators

QUANTIZING = (Activation.W8A8, Activation.W8A8_UE8M0)
on_a5 = pytest.mark.parametrize("chip", ["A5"], indirect=True)

# Whole blocks, a shard's 96 and 1.5 blocks of 768 / 8 and 768 / 4, one token, no token's expert, all on one.
LAYERS = {
    "whole blocks": lambda dtype: random_experts(6, 4, 2, 256, 128, dtype=dtype),
    "a shard of 96": lambda dtype: random_experts(6, 8, 2, 256, 96, dtype=dtype),
    "a shard of 192": lambda dtype: random_experts(5, 4, 3, 130, 192, dtype=dtype),
    "one token": lambda dtype: random_experts(1, 16, 8, 256, 96, dtype=dtype),
    "a single expert": lambda dtype: random_experts(3, 1, 1, 128, 40, dtype=dtype),
    "some nowhere": lambda dtype: nowhere(random_experts(6, 4, 2, 128, 96, dtype=dtype)),
}


def nowhere(problem: ExpertsProblem) -> ExpertsProblem:
    ids = problem.topk_ids.clone()
    ids[::2, 0] = -1
    ids[1] = -1
    return problem.with_tokens(problem.x, problem.topk_weights, ids)


@on_a5
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("activation", QUANTIZING)
def test_a_layer_of_experts(chip: str, activation: Activation, name: str, dtype: torch.dtype) -> None:
    problem = LAYERS[name](dtype)
    assert_layer_exact(problem.layer("torch_npu", activation), problem, activation)


@on_a5
def test_the_grouped_linear_by_the_gates_of_the_dense_one(chip: str) -> None:
    problem = random_experts(0, 4, 1, 200, 96)
    packed, _ = problem.pack("torch_npu")
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    counts = (5, 0, 30, 3)  # and two rows that are nobody's
    ends = torch.tensor(list(itertools.accumulate(counts)))
    got = ops.grouped_linear(x, packed, ends)
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        one = Problem(x[start:end], problem.w13[expert], problem.w13_scale[expert], grid=problem.w13_grid)
        assert_exact(got[start:end], one)
    assert got[38:].isnan().all()


@on_a5
@pytest.mark.parametrize("intermediate", [128, 96])
def test_experts_at_one_byte_a_weight(chip: str, intermediate: int) -> None:
    """A shard that ends within a block is filled up with rows of zeros; its scales are the checkpoint's own."""
    problem = random_experts(0, 3, 1, 130, intermediate)
    codes, scale = problem.pack("torch_npu")[0].tensors
    assert (codes.shape, codes.dtype) == ((3, 256, 256), torch.uint8)
    assert torch.equal(scale, problem.w13_scale)
    shards = codes.unflatten(1, (2, 128))
    assert not shards[:, :, intermediate:].any() and not codes[:, :, 130:].any()
    assert torch.equal(shards[:, :, :intermediate, :130].flatten(1, 2), problem.w13.view(torch.uint8))


@on_a5
@pytest.mark.parametrize(
    "plant",
    [
        lambda out, scale, ends: (scale.roll(1, 0), ends),
        lambda out, scale, ends: (scale.flip(1), ends),
        lambda out, scale, ends: (scale, (ends - 1).clamp_min(0)),
        lambda out, scale, ends: (scale, ends.roll(1)),
    ],
    ids=["another expert's scales", "up's scales for gate", "ends that are off by one", "another expert's rows"],
)
def test_planted_faults_of_the_grouped_product_are_noticed(
    chip: str, monkeypatch: pytest.MonkeyPatch, plant: Any
) -> None:
    problem = random_experts(6, 4, 2, 256, 128)
    assert_layer_exact(problem.layer("torch_npu"), problem)
    honest = DocumentedOperators.npu_grouped_matmul

    def faulty(x: Any, weight: Any, *, scale: Any, group_list: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        wrong, ends = plant(x, scale[0].transpose(1, 2).contiguous(), group_list)
        ends = ends.cummax(0).values
        out = honest(x, weight, scale=[wrong.contiguous().transpose(1, 2)], group_list=ends, **options)
        return [torch.nan_to_num(out[0])]

    monkeypatch.setattr(DocumentedOperators, "npu_grouped_matmul", faulty)
    with pytest.raises(AssertionError):
        assert_layer_exact(problem.layer("torch_npu"), problem)


def test_experts_are_refused_where_the_chip_has_no_product_for_them(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_experts(2, 2, 1, 128, 64)
    if chip == "A2":
        with pytest.raises(BlockFp8Error, match="serves experts on Ascend 950 alone"):
            problem.pack("torch_npu")
        return
    with pytest.raises(BlockFp8Error, match="computes w8a8/w8a8-ue8m0, not w8a16"):
        problem.pack("torch_npu", activation=Activation.W8A16)
    monkeypatch.setattr(torch_npu, "MAX_EXPERTS", 1)
    with pytest.raises(BlockFp8Error, match="too many experts"):
        problem.pack("torch_npu")


@on_a5
def test_fp32_experts_are_refused(chip: str) -> None:
    with pytest.raises(BlockFp8Error, match="16-bit activations"):
        random_experts(2, 2, 1, 128, 64, dtype=torch.float32).layer("torch_npu")


@on_a5
def test_operands_of_the_grouped_product_that_do_not_fit_are_refused(chip: str) -> None:
    problem = random_experts(2, 3, 1, 128, 64)
    packed, _ = problem.pack("torch_npu")
    codes, scale = packed.tensors
    ends = torch.tensor([1, 1, 2])
    for pair in ((codes[:2], scale), (codes[:, :128].contiguous(), scale), (codes, scale.bfloat16())):
        with pytest.raises(BlockFp8Error, match=r"do not fit each other|not a packed weight's"):
            ops.grouped_linear(problem.x, dataclasses.replace(packed, tensors=pair), ends)


@on_a5
def test_a_layer_compiles_whole(chip: str) -> None:
    """One graph for any number of tokens, with two grouped linears in it that nothing looks into."""
    torch._dynamo.reset()
    problem = random_experts(5, 4, 2, 256, 96)
    w13, w2 = problem.pack("torch_npu")
    compiled = torch.compile(ops.block_experts, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (5, 3):
        operands = (problem.x[:tokens], w13, w2, problem.topk_weights[:tokens], problem.topk_ids[:tokens])
        assert torch.equal(compiled(*operands), ops.block_experts(*operands))


@on_a5
def test_the_grouped_operator_traces_with_any_number_of_rows(chip: str) -> None:
    problem = random_experts(3, 3, 1, 128, 96)
    packed, _ = problem.pack("torch_npu")
    operands = (problem.x, *packed.tensors, torch.tensor([1, 1, 3]), [96, 96], torch.bfloat16)
    operator = torch_npu.torch_npu_native_grouped_linear
    torch.library.opcheck(operator, operands, test_utils=("test_schema", "test_faketensor"))
