"""Experts that serve get other weights: reloaded by vLLM, or pushed by a trainer."""

from __future__ import annotations

from typing import Any

import pytest

from qwen3_fp8_ascend.errors import BlockFp8Error

from .expert_layers import DAMAGES, apply, assert_near, checkpoint, expected, load, reload, routed, serving_layer


def addresses(layer: Any) -> list[int]:
    return [t.data_ptr() for t in (*layer.packed_w13_weight.tensors, *layer.packed_w2_weight.tensors)]


def test_new_weights_take_the_place_of_the_old_ones() -> None:
    layer = serving_layer(checkpoint())
    before = addresses(layer)
    for seed in (1, 2):
        tensors = checkpoint(seed=seed)
        reload(layer, tensors)
        assert_near(apply(layer, *routed()), expected(tensors, *routed()))
        assert addresses(layer) == before
        assert layer.w13_weight_scale_inv.numel() == 0


def test_tensors_pushed_into_a_layer_that_serves_renew_it_in_place() -> None:
    """All of them together, in two parts, and as fused tensors; nothing is asked of vLLM but its loaders."""
    layer = serving_layer(checkpoint())
    before = addresses(layer)
    tensors = checkpoint(seed=1)
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
    load(layer, parts[0])
    with pytest.raises(BlockFp8Error, match=r"only some(?s:.)*12 are missing, the first is .*experts\.0\."):
        apply(layer, *routed())
    load(layer, parts[1])
    layer.quant_method.process_weights_after_loading(layer)  # as trainers do when they have pushed everything
    assert_near(apply(layer, *routed()), expected(tensors, *routed()))
    assert addresses(layer) == before


def test_pushed_tensors_are_checked_like_loaded_ones() -> None:
    layer = serving_layer(checkpoint())
    bad = checkpoint(seed=1)
    with pytest.raises(BlockFp8Error, match=r"wrong dtype(?s:.)*experts\.0\.gate_proj\.weight\n"):
        load(layer, {name: tensor.float() for name, tensor in bad.items()})
    layer = serving_layer(checkpoint())
    DAMAGES["NaN in down"][0](bad)
    with pytest.raises(BlockFp8Error, match=r"experts\.3\.down_proj"):
        load(layer, bad)
    with pytest.raises(BlockFp8Error, match="restart the server"):
        apply(layer, *routed())


@pytest.mark.parametrize("missing", ["0.gate_proj.weight", "3.down_proj.weight_scale_inv"])
def test_a_tensor_that_is_missing_on_reload_is_named(missing: str) -> None:
    """vLLM gives unloaded parts arbitrary memory, here the very bytes of good weights."""
    tensors = checkpoint()
    layer = serving_layer(tensors)
    del tensors[missing]
    with pytest.raises(BlockFp8Error, match=rf"missing from the checkpoint\n.*{missing}\n"):
        reload(layer, tensors)
    with pytest.raises(BlockFp8Error, match="restart the server"):
        apply(layer, *routed())


def test_after_refused_weights_a_layer_serves_neither_old_nor_new_ones() -> None:
    layer = serving_layer(checkpoint())
    bad = checkpoint(seed=1)
    DAMAGES["NaN in down"][0](bad)
    with pytest.raises(BlockFp8Error, match=r"experts\.3\.down_proj"):
        reload(layer, bad)
    with pytest.raises(BlockFp8Error, match="restart the server"):
        apply(layer, *routed())
