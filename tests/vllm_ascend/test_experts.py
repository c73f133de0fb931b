"""Experts inside vLLM-Ascend 0.30.0rc2: its dispatch and combine around this package's scheme."""

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .conftest import BEFORE_SCHEMES

if BEFORE_SCHEMES:
    pytest.skip("vLLM-Ascend 0.23.0 has no such schemes: experts are refused there", allow_module_level=True)

from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm_ascend.ascend_forward_context import MoECommType
from vllm_ascend.ops.fused_moe import token_dispatcher
from vllm_ascend.ops.fused_moe.moe_comm_method import AllGatherCommImpl

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.glu import GELU_TANH, SILU, Glu
from qwen3_fp8_ascend.testing.experts import assert_layer_exact, random_experts
from qwen3_fp8_ascend.testing.judges import rel_l2
from qwen3_fp8_ascend.vllm_plugin import ascend_schemes, experts
from qwen3_fp8_ascend.vllm_plugin.expert_layer import glu_of
from tests.support.cut_experts import cut

from .expert_layer import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Layer, loaded_layer, tensors_of  # noqa: F401


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_their_dispatch_and_combine_around_our_scheme(layer: Layer, dtype: torch.dtype) -> None:
    """Bit for bit `ops.block_experts`, and so the specification."""
    problem = dataclasses.replace(layer.problem, x=layer.problem.x.to(dtype))
    got = layer(problem)
    assert got.dtype == dtype and torch.equal(got, layer.expected(problem))
    assert_layer_exact(got, problem, layer.activation)


@pytest.mark.parametrize(
    ("activation", "numbers", "glu"),
    [
        (MoEActivation.SILU, (0.5, None, None), Glu.clamped(0.5)),
        (MoEActivation.SWIGLUSTEP, (None, None, None), Glu.step(7.0)),
        (MoEActivation.GELU_TANH, (None, None, None), GELU_TANH),
        (MoEActivation.SWIGLUOAI_UNINTERLEAVE, (7.0, 1.702, 1.0), Glu.clamped(7.0, 1.702, 1.0)),
    ],
    ids=lambda value: getattr(value, "value", None),
)
def test_other_activations(
    layer: Layer,
    activation: MoEActivation,
    numbers: tuple[float | None, ...],
    glu: Glu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Computed here, whatever vLLM-Ascend has for them; tokens are large enough to meet every bound."""
    monkeypatch.setattr(layer.routed, "activation", activation)
    for name, number in zip(("limit", "alpha", "beta"), numbers, strict=True):
        monkeypatch.setattr(layer.routed, f"swiglu_{name}", number)
    monkeypatch.setattr(layer.routed.quant_method, "glu", glu_of(layer.routed, "experts"))
    problem = dataclasses.replace(layer.problem, x=layer.problem.x * 16, glu=glu)
    got = layer(problem)
    assert torch.equal(got, layer.expected(problem))
    assert not torch.equal(got, layer.expected(dataclasses.replace(problem, glu=SILU)))


def of_rank(layer: Layer, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the layer that of a rank of two, with half of the experts."""
    half = EXPERTS // 2
    mine = slice(rank * half, (rank + 1) * half)
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    expert_map[mine] = torch.arange(half, dtype=torch.int32)
    for name in ("packed_w13_weight", "packed_w2_weight"):
        whole = getattr(layer.routed, name)
        part = dataclasses.replace(whole, tensors=tuple(t[mine] for t in whole.tensors), groups=half)
        monkeypatch.setattr(layer.routed, name, part)
    monkeypatch.setattr(type(layer.routed), "ascend_expert_map", expert_map)
    moe_config = copy.copy(layer.routed.moe_config)
    moe_config.num_local_experts = half
    monkeypatch.setattr(token_dispatcher, "get_ep_group", lambda: SimpleNamespace(rank_in_group=rank))
    layer.context.moe_comm_method = AllGatherCommImpl(moe_config)


@pytest.mark.parametrize("rank_", [0, 1])
def test_expert_parallelism(layer: Layer, rank_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's part of the sum; rows that nobody owns are NaN when they come, and leave no trace."""
    of_rank(layer, rank_, monkeypatch)
    problem = layer.problem
    problem.topk_ids[0] = torch.tensor([0, 1, 2])  # on the first rank alone
    local = layer.routed.ascend_expert_map[problem.topk_ids]
    got = layer(problem)
    assert torch.equal(got, layer.expected(dataclasses.replace(problem, topk_ids=local)))
    assert bool(got[0].any()) == (rank_ == 0)


def test_a_cut_through_a_block(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with half of a block of channels each, which take turns: together they are the uncut layer.

    What each gives to the exchange, here a tensor that is handed over, is collected first.
    """
    problem = dataclasses.replace(layer.problem, x=layer.problem.x.float())
    whole = layer(problem)
    parts = cut(problem, 2, layer.activation)
    method, given = layer.routed.quant_method, list[torch.Tensor]()
    totals = []

    def collect(own: torch.Tensor) -> torch.Tensor:
        given.append(own)
        return own.repeat(1, 2)

    exchanges = (collect, lambda own: torch.cat(given, 1), lambda own: torch.zeros(len(own), 4))
    for exchange in exchanges:  # the last is none
        monkeypatch.setattr(experts, "tensor_model_parallel_all_gather", exchange)
        outs = []
        for part in parts:
            method.partitions = {"w13": part.gate_up, "w2": part.down}
            w13, w2 = part.packed("reference")
            monkeypatch.setattr(layer.routed, "packed_w13_weight", w13)
            monkeypatch.setattr(layer.routed, "packed_w2_weight", w2)
            outs.append(layer(problem))
        totals.append(torch.stack(outs).sum(0))
    quantized = layer.activation is not Activation.W8A16
    assert len(given) == (2 if quantized else 0)
    assert rel_l2(totals[1], whole) < 2e-6
    assert not quantized or rel_l2(totals[2], whole) > 1e-4


def test_a_rank_to_which_no_token_comes(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    of_rank(layer, 1, monkeypatch)
    layer.problem.topk_ids[:] %= EXPERTS // 2
    assert not layer(layer.problem).any()


def count_as_ends(given: Any) -> torch.Tensor:
    return torch.as_tensor(given.group_list)


def one_row_late(given: Any) -> torch.Tensor:
    return (given.group_list.cumsum(0) + 1).clamp(max=given.hidden_states.shape[0])


@pytest.mark.parametrize("defect", [None, count_as_ends, one_row_late])
def test_a_list_that_is_misread_is_found(layer: Layer, monkeypatch: pytest.MonkeyPatch, defect: Any) -> None:
    expected = layer.expected(layer.problem)
    if defect is not None:
        monkeypatch.setattr(ascend_schemes, "cumulative", defect)
    if defect is count_as_ends:
        with pytest.raises(BlockFp8Error, match="ends of the experts' rows"):  # the CPU looks
            layer(layer.problem)
        return
    assert torch.equal(layer(layer.problem), expected) == (defect is None)


def test_a_row_of_nobody_s_would_be_found(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the zeros the NaN of a row that nobody owns reaches every token of another rank's expert."""
    of_rank(layer, 1, monkeypatch)
    layer.problem.topk_ids[:] %= EXPERTS // 2
    monkeypatch.setattr(torch.Tensor, "masked_fill_", lambda tensor, mask, value: tensor)
    monkeypatch.setattr(
        ascend_schemes.ops, "grouped_linear", lambda x, w, *_, **__: x.new_full((len(x), w.n), torch.nan)
    )
    assert layer(layer.problem).isnan().any()


@pytest.mark.parametrize("comm", [MoECommType.MC2, MoECommType.ALLTOALL])
def test_rows_that_go_back_to_other_ranks_are_rounded(layer: Layer, comm: MoECommType) -> None:
    """Their operators take the activations' dtype; the list is cumulative there, or counts."""
    problem = random_experts(7, EXPERTS, 1, HIDDEN, INTERMEDIATE)
    counts = torch.tensor([3, 0, 2, 0, 1, 1])
    for kind, groups in ((0, counts.cumsum(0)), (1, counts)):
        given = SimpleNamespace(
            hidden_states=problem.x, layer=layer.routed, group_list=groups, group_list_type=kind, activation="silu"
        )
        scheme = layer.routed.quant_method.quant_method
        assert scheme.supports_fused_activation("silu") and not scheme.supports_fused_activation("gelu")
        a, scale = scheme.apply_gmm1_act_quant(given)
        assert scale is None and a.dtype == problem.x.dtype
        outs = {}
        for layer.context.moe_comm_type in (comm, MoECommType.ALLGATHER):
            outs[layer.context.moe_comm_type] = scheme.apply_gmm2(given, a, None)
        assert outs[MoECommType.ALLGATHER].dtype == torch.float32
        assert torch.equal(outs[comm], outs[MoECommType.ALLGATHER].to(problem.x.dtype))


def test_weights_pushed_into_experts_that_serve(layer: Layer) -> None:
    """In place, by `load_weights` alone, and never a mixture of old and new ones."""
    before = [t.data_ptr() for t in (*layer.routed.packed_w13_weight.tensors, *layer.routed.packed_w2_weight.tensors)]
    other = random_experts(9, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, seed=1)
    *tensors, last = tensors_of(other)
    layer.model.load_weights(tensors)
    with pytest.raises(BlockFp8Error, match=r"only some[\s\S]*1 are missing"):
        layer(layer.problem)
    layer.model.load_weights([last])
    assert_layer_exact(layer(other), other, layer.activation)
    after = [t.data_ptr() for t in (*layer.routed.packed_w13_weight.tensors, *layer.routed.packed_w2_weight.tensors)]
    assert after == before
