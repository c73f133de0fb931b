"""Linear layers that are damaged, that are not served, or that a checkpoint leaves alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

from qwen3_fp8_ascend.checkpoints.folder import OF_A_RANK
from qwen3_fp8_ascend.containers import COMPRESSED_TENSORS, MODELOPT
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import BlockFp8Config, BlockSize
from qwen3_fp8_ascend.testing.judges import random_problem
from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig

from .linear_layers import ATTENTION, config, finish, gate_up_layer, load, qkv_layer, split


@pytest.mark.parametrize(
    ("ignored", "quantized"),
    [
        ((), True),
        (
            ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"),
            False,
        ),
        ((f"{ATTENTION}.qkv_proj",), False),
        ((ATTENTION,), False),
        (("qkv_proj",), False),
        (("lm_head",), True),
    ],
)
def test_ignored_layers(ignored: tuple[str, ...], quantized: bool) -> None:
    layer = qkv_layer(config(ignored))
    assert isinstance(layer.quant_method, UnquantizedLinearMethod) is not quantized


def test_half_ignored_merged_layers_are_refused() -> None:
    with pytest.raises(BlockFp8Error, match=r"only some\n  where: model\.layers\.0\.self_attn\.qkv_proj"):
        qkv_layer(config((f"{ATTENTION}.q_proj",)))


def _spoiled(
    shard: int, weight: Callable[[torch.Tensor], Any] | None = None, scale: Callable[[torch.Tensor], Any] | None = None
) -> Any:
    problem = random_problem(1, (576, 192, 192), 576)
    parts = split(problem)
    w, s = (t.clone() for t in parts[shard])
    if weight:
        w = weight(w)
    if scale:
        s = scale(s)
    parts[shard] = (w, s)
    layer = qkv_layer(config())
    load(layer, [(name, *tensors) for name, tensors in zip("qkv", parts, strict=True) if tensors[0] is not None])
    return finish(layer)


def _set(value: float | int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor)[1, 2] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"shard": 1, "weight": _set(0x7F)}, r"self_attn\.k_proj\.weight\n.*\n  got: 1 NaN of 110592"),
        ({"shard": 2, "weight": _set(0xFF)}, r"self_attn\.v_proj\.weight"),
        ({"shard": 0, "scale": _set(float("inf"))}, r"self_attn\.q_proj\.weight_scale_inv"),
        ({"shard": 1, "scale": _set(-1.0)}, r"self_attn\.k_proj\.weight_scale_inv"),
        (
            {"shard": 2, "weight": lambda w: w.bfloat16()},
            r"qkv_proj\.weight, shard v\n  expected: float8_e4m3fn\n  got: bfloat16",
        ),
        ({"shard": 2, "weight": lambda w: w[:100]}, r"does not fit the layer\n  where: .*qkv_proj\.weight, shard v"),
        (
            {"shard": 1, "scale": lambda s: s[:1]},
            r"does not fit the layer\n  where: .*qkv_proj\.weight_scale_inv, shard k",
        ),
        ({"shard": 1, "scale": lambda s: s.half()}, r"wrong dtype\n  where: .*qkv_proj\.weight_scale_inv, shard k"),
    ],
)
def test_spoiled_tensors_are_named(arguments: dict, said: str) -> None:
    with pytest.raises(BlockFp8Error, match=said):
        _spoiled(**arguments)


@pytest.mark.parametrize("container", [COMPRESSED_TENSORS, MODELOPT])
def test_errors_name_scales_as_the_file_does(container: str) -> None:
    problem = random_problem(1, (192, 64), 256)
    quantization = config(container=container)
    layer = gate_up_layer(256, 192, 64, quantization)
    bad = problem.scale.clone()
    bad[2, 1] = -1.0  # the second shard's only row
    scales = bad.split(problem.grid.scale_rows)
    for shard, ((weight, _), scale) in enumerate(zip(split(problem), scales, strict=True)):
        layer.weight.weight_loader(layer.weight, weight, shard)
        layer.weight_scale.weight_loader(layer.weight_scale, scale, shard)
    with pytest.raises(BlockFp8Error, match=r"scales.*\n  where: .*up_proj\.weight_scale\n"):
        finish(layer)


@pytest.mark.parametrize(("skip_weight", "skip_scale"), [(True, False), (False, True)])
def test_missing_tensors_are_named(skip_weight: bool, skip_scale: bool) -> None:
    layer = qkv_layer(config())
    for name, (weight, scale) in zip("qkv", split(random_problem(1, (576, 192, 192), 576)), strict=True):
        if not (skip_weight and name == "k"):
            layer.weight.weight_loader(layer.weight, weight, name)
        if not (skip_scale and name == "k"):
            layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale, name)
    with pytest.raises(BlockFp8Error, match=r"(weight is|scales are) missing.*\n  where: .*k_proj"):
        finish(layer)


def test_a_ragged_merged_tensor_on_disk_is_refused() -> None:
    problem = random_problem(1, (576, 192, 192), 576)
    layer = qkv_layer(config())
    with pytest.raises(BlockFp8Error, match="merged on disk"):
        layer.weight.weight_loader(layer.weight, problem.weight)


def test_a_block_that_no_backend_serves_is_said_before_anything_is_loaded() -> None:
    quantization = BlockFp8AscendConfig(BlockFp8Config(BlockSize(1, 128)))
    with pytest.raises(BlockFp8Error, match=r"no backend can run block FP8 on cpu(?s:.*)32 rows.*, not 1x128"):
        ColumnParallelLinear(
            256, 256, bias=False, params_dtype=torch.bfloat16, quant_config=quantization, prefix="model.layers.0.one"
        )


def test_what_vllm_saves_of_a_rank_is_known_by_name() -> None:
    """Its tensors are packed already, and have names of their own; `checkpoints.folder` refuses them."""
    assert OF_A_RANK.fullmatch(ShardedStateLoader.DEFAULT_PATTERN.format(rank=12, part=0))
    assert not OF_A_RANK.fullmatch("model-00001-of-00002.safetensors")
