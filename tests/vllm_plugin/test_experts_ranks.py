"""Ranks of vLLM's mixture-of-experts layer with our method: whole experts, channels cut anywhere, renewal."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig

from qwen3_fp8_ascend.containers import SCALE_ENDINGS
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.vllm_plugin import experts, linear

from .expert_layers import (
    EXPERTS,
    HIDDEN,
    PREFIX,
    W8A16,
    apply,
    assert_near,
    checkpoint,
    expected,
    finish,
    load,
    make_layer,
    reload,
    routed,
    serving_layer,
)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend to be a rank, for layers made afterwards with `tp_size`."""

    def pretend(rank: int) -> None:
        path = "vllm.model_executor.layers.fused_moe.config.get_tensor_model_parallel_rank"
        monkeypatch.setattr(path, lambda: rank)

    return pretend


def test_expert_parallel_ranks_add_up(ranks: Callable[[int], None]) -> None:
    """Whole experts on each rank, in another number on the last; what is on another rank counts nothing here."""
    tensors = checkpoint(experts=5)
    total = torch.zeros(7, HIDDEN)
    for rank in range(2):
        ranks(rank)
        layer = make_layer(experts=5, tp_size=2, expert_parallel=True)
        assert layer.local_num_experts == (3, 2)[rank]
        load(layer, tensors)
        total += apply(finish(layer), *routed(7, experts=5))
    assert_near(total, expected(tensors, *routed(7, experts=5)))


def test_ranks_choose_among_all_experts(ranks: Callable[[int], None]) -> None:
    """Where experts are chosen here and not by vLLM."""
    tensors, sigmoid = checkpoint(experts=5), {"experts": 5, "scoring_func": "sigmoid"}
    x, logits = routed(7)[0], torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(7, HIDDEN)
    for rank in range(2):
        ranks(rank)
        layer = make_layer(tp_size=2, expert_parallel=True, **sigmoid)
        load(layer, tensors)
        total += finish(layer).quant_method.apply_monolithic(layer, x, logits)
    assert_near(total, expected(tensors, x, *make_layer(**sigmoid).quant_method.routing.choose(logits)))


def test_tensor_parallel_shards_of_whole_blocks_add_up(ranks: Callable[[int], None]) -> None:
    tensors = checkpoint(inner=384)
    total = torch.zeros(5, HIDDEN)
    for rank in range(3):
        ranks(rank)
        layer = make_layer(inner=384, tp_size=3)
        assert tuple(layer.w13_weight.shape) == (EXPERTS, 256, HIDDEN)
        load(layer, tensors)
        total += apply(finish(layer), *routed())
    assert_near(total, expected(tensors, *routed()))


@pytest.fixture
def tensor_parallel(ranks: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend to be a rank of vLLM's group for exchanges, too."""

    def pretend(rank: int, size: int) -> None:
        ranks(rank)
        monkeypatch.setattr(linear, "get_tp_group", lambda: SimpleNamespace(rank_in_group=rank, world_size=size))

    return pretend


CUTS = [(384, 2), (768, 8), (512, 8), (256, 8)]
"""Intermediate channels and ranks: 192, 96, 64 and 32 channels each, so that up to four ranks share a block."""


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize(("inner", "size"), CUTS)
def test_channels_are_cut_anywhere(
    tensor_parallel: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    inner: int,
    size: int,
    activation: Activation,
) -> None:
    """The ranks take turns: what each gives to the exchange is collected first. Together they are the uncut layer."""
    tensors = checkpoint(inner=inner)
    options: dict[str, Any] = {"inner": inner, "scale_fmt": "ue8m0" if activation is Activation.W8A8_UE8M0 else "fp32"}

    def make(size: int) -> Any:
        config = VllmConfig(additional_config=W8A16 if activation is Activation.W8A16 else {})
        layer = make_layer(config=config, tp_size=size, **options)
        assert layer.quant_method.activation is activation
        load(layer, tensors)
        return finish(layer)

    tensor_parallel(0, 1)
    whole = apply(make(1), *routed())
    layers = []
    for rank in range(size):
        tensor_parallel(rank, size)
        layers.append(make(size))
    given: list[torch.Tensor] = []

    def collect(own: torch.Tensor) -> torch.Tensor:
        given.append(own)
        return own.repeat(1, size)

    monkeypatch.setattr(experts, "tensor_model_parallel_all_gather", collect)
    for layer in layers:
        apply(layer, *routed())
    assert len(given) == (0 if activation is Activation.W8A16 else size)
    monkeypatch.setattr(experts, "tensor_model_parallel_all_gather", lambda own: torch.cat(given, 1))
    total = torch.stack([apply(layer, *routed()) for layer in layers]).sum(0)
    assert_near(total, whole.double())
    if activation is Activation.W8A16:
        assert_near(total, expected(tensors, *routed()))
    elif activation is Activation.W8A8:  # without the exchange it is another layer; powers of two may be the same
        monkeypatch.setattr(experts, "tensor_model_parallel_all_gather", lambda own: torch.zeros(len(own), 2 * size))
        alone = torch.stack([apply(layer, *routed()) for layer in layers]).sum(0)
        with pytest.raises(AssertionError):
            assert_near(alone, whole.double())


@pytest.mark.parametrize("container", SCALE_ENDINGS)
def test_ranks_that_vllm_does_not_exchange_between_are_refused(ranks: Callable[[int], None], container: str) -> None:
    """As with data parallelism without expert parallelism: experts are divided among more ranks than attention."""
    ranks(0)
    with pytest.raises(BlockFp8Error, match="cut through a block of 128x128 of the experts") as refused:
        make_layer(config=VllmConfig(), inner=768, tp_size=4, container=container)
    said = str(refused.value)
    assert "divide the experts by 1 or 2 or 3 or 6," in said and "--enable-expert-parallel" in said and PREFIX in said
    assert make_layer(inner=768, tp_size=4, container=container).w2_weight.shape[2] == 192  # W8A16 exchanges nothing
    whole = make_layer(config=VllmConfig(), inner=768, tp_size=4, expert_parallel=True, experts=8, container=container)
    assert whole.local_num_experts == 2


def test_bad_values_behind_a_cut_are_named(ranks: Callable[[int], None]) -> None:
    ranks(1)
    tensors = checkpoint(inner=384)
    tensors["2.up_proj.weight_scale_inv"][2, 1] = -1.0
    layer = make_layer(inner=384, tp_size=2)
    load(layer, tensors)
    with pytest.raises(BlockFp8Error, match=r"where: .*experts\.2\.up_proj\.weight_scale_inv"):
        finish(layer)


def test_a_cut_layer_is_renewed(ranks: Callable[[int], None]) -> None:
    """By vLLM's reloading, and by a trainer: into the memory of the old weights."""
    layers = []
    for rank in range(2):
        ranks(rank)
        layers.append(serving_layer(checkpoint(inner=384), inner=384, tp_size=2))
    memory = [layer.packed_w2_weight.tensors[0].data_ptr() for layer in layers]
    for seed, renew in ((1, reload), (2, load)):
        tensors = checkpoint(inner=384, seed=seed)
        for layer in layers:
            renew(layer, tensors)
        total = torch.stack([apply(layer, *routed()) for layer in layers]).sum(0)
        assert_near(total, expected(tensors, *routed()))
    assert memory == [layer.packed_w2_weight.tensors[0].data_ptr() for layer in layers]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_renewed_though_other_ranks_experts_come_too(ranks: Callable[[int], None], rank: int) -> None:
    """The first rank has all its experts, and is packed, before those of the second have come."""
    ranks(rank)
    layer = serving_layer(checkpoint(), tp_size=2, expert_parallel=True)
    tensors = checkpoint(seed=1)
    reload(layer, tensors)
    x, weights, ids = routed()
    here = (ids // 2 == rank) * weights
    assert_near(apply(layer, x, weights, ids), expected(tensors, x, here, ids))
    tensors = checkpoint(seed=2)
    load(layer, tensors)  # and by a trainer
    assert_near(apply(layer, x, weights, ids), expected(tensors, x, here, ids))
