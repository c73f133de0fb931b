"""Ranks of vLLM's mixture-of-experts layer with our method: whole experts, shards of whole blocks, renewal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qwen3_fp8_ascend.containers import SCALE_ENDINGS
from qwen3_fp8_ascend.errors import BlockFp8Error

from .expert_layers import (
    EXPERTS,
    HIDDEN,
    PREFIX,
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


@pytest.mark.parametrize("container", SCALE_ENDINGS)
@pytest.mark.parametrize(
    ("inner", "size", "working"), [(768, 4, "1 or 2 or 3 or 6"), (192, 2, "1"), (512, 8, "1 or 2 or 4")]
)
def test_a_cut_through_a_block_is_refused(
    ranks: Callable[[int], None], inner: int, size: int, working: str, container: str
) -> None:
    ranks(0)
    with pytest.raises(BlockFp8Error, match="cut through a block of 128x128 of the experts") as refused:
        make_layer(inner=inner, tp_size=size, container=container)
    said = str(refused.value)
    assert f"--tensor-parallel-size {working} (" in said and "--enable-expert-parallel" in said and PREFIX in said
    whole = make_layer(inner=inner, tp_size=size, expert_parallel=True, experts=8, container=container)
    assert whole.local_num_experts == 8 // size


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
