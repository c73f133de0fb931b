"""Weights loaded again into layers that already serve, through vLLM's own layerwise reloading."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact, random_problem

from .linear_layers import config, finish, load, qkv_layer, split

MODEL = SimpleNamespace(dtype=torch.bfloat16)


def qkv_shards(problem: Problem) -> list[tuple[Any, torch.Tensor, torch.Tensor]]:
    return [(name, *tensors) for name, tensors in zip("qkv", split(problem), strict=True)]


def serving_layer(problem: Problem) -> torch.nn.Module:
    layer = qkv_layer(config())
    record_metadata_for_reloading(layer)
    load(layer, qkv_shards(problem))
    return finish(layer)


def reload(layer: torch.nn.Module, shards: list[tuple[Any, torch.Tensor, torch.Tensor]]) -> None:
    initialize_layerwise_reload(layer)
    load(layer, shards)
    finalize_layerwise_reload(layer, MODEL)


def addresses(layer: torch.nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in layer.packed_weight.tensors]


@pytest.mark.parametrize("rounds", [1, 3])
def test_new_weights_take_the_place_of_the_old_ones(rounds: int) -> None:
    """Same memory for codes and scales: compiled code refers to it, and there is no second copy."""
    layer = serving_layer(random_problem(5, (576, 192, 192), 576))
    before = addresses(layer)
    for seed in range(1, rounds + 1):
        problem = random_problem(5, (576, 192, 192), 576, seed=seed)
        reload(layer, qkv_shards(problem))
        assert_exact(layer(problem.x)[0], problem)
        assert addresses(layer) == before
        assert layer.weight.data_ptr() == before[0]
        assert layer.weight_scale_inv.numel() == 0


@pytest.mark.parametrize("missing", ["q", "k", "v"])
@pytest.mark.parametrize("tensor", ["weight", "weight_scale_inv"])
def test_a_tensor_that_is_missing_on_reload_is_named(missing: str, tensor: str) -> None:
    """vLLM gives unloaded parts arbitrary memory, here the very bytes of good weights."""
    problem = random_problem(5, (576, 192, 192), 576)
    layer = serving_layer(problem)
    initialize_layerwise_reload(layer)
    for shard, weight, scale in qkv_shards(problem):
        if (shard, tensor) != (missing, "weight"):
            layer.weight.weight_loader(layer.weight, weight, shard)
        if (shard, tensor) != (missing, "weight_scale_inv"):
            layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale, shard)
    with pytest.raises(BlockFp8Error, match=rf"(weight is|scales are) missing[^\n]*\n.*{missing}_proj\.{tensor}"):
        finalize_layerwise_reload(layer, MODEL)
    with pytest.raises(BlockFp8Error, match="restart the server"):
        layer.quant_method.apply(layer, problem.x)


def test_after_refused_weights_a_layer_serves_neither_old_nor_new_ones() -> None:
    problem = random_problem(5, (576, 192, 192), 576)
    layer = serving_layer(problem)
    bad = random_problem(5, (576, 192, 192), 576, seed=1)
    bad.weight.view(torch.uint8)[600, 3] = 0x7F
    initialize_layerwise_reload(layer)
    with pytest.raises(BlockFp8Error, match=r"k_proj\.weight"):
        load(layer, qkv_shards(bad))
    with pytest.raises(BlockFp8Error, match="restart the server"):
        layer.quant_method.apply(layer, problem.x)


def test_tensors_pushed_into_a_layer_that_serves_renew_it_in_place() -> None:
    """Through vLLM's loaders alone, in any order; a trainer may ask for the processing afterwards, or not."""
    layer = serving_layer(random_problem(5, (576, 192, 192), 576))
    before = addresses(layer)
    for seed in (1, 2):
        problem = random_problem(5, (576, 192, 192), 576, seed=seed)
        q, k, v = qkv_shards(problem)
        load(layer, [v, q])
        with pytest.raises(BlockFp8Error, match=r"only some(?s:.)*2 are missing, the first is .*k_proj\.weight"):
            layer(problem.x)
        with pytest.raises(BlockFp8Error, match="only some"):
            layer.quant_method.process_weights_after_loading(layer)
        load(layer, [k])
        layer.quant_method.process_weights_after_loading(layer)
        assert_exact(layer(problem.x)[0], problem)
        assert addresses(layer) == before
    reload(layer, qkv_shards(random_problem(5, (576, 192, 192), 576, seed=3)))
    load(layer, qkv_shards(problem))
    assert_exact(layer(problem.x)[0], problem)


def test_pushed_tensors_go_where_the_layer_is() -> None:
    """vLLM makes the layer's device the default while it loads a model; when a trainer pushes, another one is."""
    layer = serving_layer(random_problem(5, (576, 192, 192), 576))
    before = addresses(layer)
    problem = random_problem(5, (576, 192, 192), 576, seed=1)
    q, *others = qkv_shards(problem)
    with torch.device("meta"):
        load(layer, [q])
    load(layer, others)
    assert_exact(layer(problem.x)[0], problem)
    assert addresses(layer) == before


def test_pushed_tensors_are_checked_like_loaded_ones() -> None:
    problem = random_problem(5, (576, 192, 192), 576)
    layer = serving_layer(problem)
    (name, weight, scale), *_ = qkv_shards(problem)
    with pytest.raises(BlockFp8Error, match=r"wrong dtype(?s:.)*qkv_proj\.weight, shard q"):
        load(layer, [(name, weight.float(), scale)])
    layer = serving_layer(problem)
    bad = random_problem(5, (576, 192, 192), 576, seed=1)
    bad.weight.view(torch.uint8)[600, 3] = 0x7F
    with pytest.raises(BlockFp8Error, match=r"k_proj\.weight"):
        load(layer, qkv_shards(bad))
    with pytest.raises(BlockFp8Error, match="restart the server"):
        layer(problem.x)


def test_real_weights_take_the_place_of_dummy_ones() -> None:
    """``--load-format dummy``, then a push: values are checked from then on, and are not filled with random ones."""
    problem = random_problem(5, (576, 192, 192), 576)
    layer = qkv_layer(config())
    layer.quant_method.dummy = True
    finish(layer)
    load(layer, qkv_shards(problem))
    layer.quant_method.process_weights_after_loading(layer)
    assert_exact(layer(problem.x)[0], problem)
    bad = random_problem(5, (576, 192, 192), 576, seed=1)
    bad.scale[0, 0] = torch.nan
    with pytest.raises(BlockFp8Error, match=r"q_proj\.weight_scale_inv"):
        load(layer, qkv_shards(bad))


def test_a_merged_layer_without_names_of_shards() -> None:
    problem, other = (random_problem(4, (300, 256), 200, seed=seed) for seed in (0, 1))
    layer = MergedColumnParallelLinear(
        200, [300, 256], bias=False, params_dtype=torch.bfloat16, quant_config=config(), prefix="model.merged"
    )
    record_metadata_for_reloading(layer)
    load(layer, [(shard, *tensors) for shard, tensors in enumerate(split(problem))])
    finish(layer)
    reload(layer, [(shard, *tensors) for shard, tensors in enumerate(split(other))])
    assert_exact(layer(other.x)[0], other)
