"""The containers that block FP8 comes in: what is read, what is refused by which key, what is written."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from qwen3_fp8_ascend.containers import COMPRESSED_TENSORS, MODELOPT, holds_fp8
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockFp8Config, BlockSize

CODES = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "actorder": None,
    "observer_kwargs": {},
    "scale_dtype": None,
    "zp_dtype": None,
}
GROUP = {
    "format": "float-quantized",
    "input_activations": CODES | {"dynamic": True, "strategy": "group", "group_size": 128, "block_structure": None},
    "output_activations": None,
    "targets": ["Linear"],
    "weights": CODES | {"dynamic": False, "strategy": "block", "block_structure": [128, 128], "group_size": None},
}
LLM_COMPRESSOR: dict[str, Any] = {
    "config_groups": {"group_0": GROUP},
    "format": "float-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.19.0",
}
"""What llm-compressor 0.14 writes for the scheme FP8_BLOCK."""

MODELOPT_FILE: dict[str, Any] = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {"quant_algo": "FP8_PB_WO", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
}
MODELOPT_CONFIG: dict[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": "FP8_PB_WO",
    "producer": {"name": "modelopt", "version": "0.39.0"},
    "ignore": ["lm_head", "model.visual*"],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """`LLM_COMPRESSOR` with one value changed; a path's parts are separated by slashes."""
    out = copy.deepcopy(LLM_COMPRESSOR)
    *parents, last = path.split("/")
    at = out
    for parent in parents:
        at = at[parent]
    at[last] = value
    return out


def test_llm_compressors_fp8_block() -> None:
    config = BlockFp8Config.from_dict(LLM_COMPRESSOR)
    assert config == BlockFp8Config(BlockSize(128, 128), ("lm_head", "re:.*mlp.gate$"), container=COMPRESSED_TENSORS)
    assert config.scale_of("mlp.up_proj.weight") == "mlp.up_proj.weight_scale"
    assert config.set_aside == ()


@pytest.mark.parametrize("config", [MODELOPT_FILE, MODELOPT_CONFIG])
def test_modelopts_fp8_pb_wo(config: dict[str, Any]) -> None:
    found = BlockFp8Config.from_dict(config)
    assert (found.block, found.container, found.scale_name) == (BlockSize(128, 128), MODELOPT, "weight_scale")
    assert found.ignored[0] == "lm_head"
    assert holds_fp8(config)


@pytest.mark.parametrize(
    "config",
    [
        LLM_COMPRESSOR,
        MODELOPT_FILE,
        MODELOPT_CONFIG,
        changed("config_groups/group_0/targets", ["re:.*proj$", "fc1"]),
        changed("config_groups/group_0/input_activations", None),
    ],
)
def test_what_is_written_is_read_back(config: dict[str, Any]) -> None:
    found = BlockFp8Config.from_dict(config)
    assert BlockFp8Config.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_weights_alone_mean_activations_as_they_are() -> None:
    """Unless somebody asks for more, which the same weights can do."""
    config = BlockFp8Config.from_dict(changed("config_groups/group_0/input_activations", None))
    assert config.weights_only
    assert config.activation(None) is Activation.W8A16
    assert config.activation(Activation.W8A8) is Activation.W8A8
    both = {"group_0": GROUP, "group_1": GROUP | {"input_activations": None, "targets": ["re:.*mlp.*"]}}
    with pytest.raises(BlockFp8Error, match=r"for none\n.*\n  got: not in .*'group_1', but in .*'group_0'"):
        BlockFp8Config.from_dict(changed("config_groups", both))
    assert BlockFp8Config.from_dict(LLM_COMPRESSOR).activation(None) is Activation.W8A8


W, A = "config_groups/group_0/weights", "config_groups/group_0/input_activations"


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("config_groups", {}, "config_groups"),
        (f"{W}/strategy", "channel", "weights.strategy"),
        (f"{W}/strategy", "tensor", "weights.strategy"),
        (f"{W}/num_bits", 4, "weights.num_bits"),
        (f"{W}/num_bits", True, "weights.num_bits"),
        (f"{W}/type", "int", "weights.type"),
        (f"{W}/symmetric", False, "weights.symmetric"),
        (f"{W}/actorder", "group", "weights.actorder"),
        (f"{W}/block_structure", None, "weights.block_structure"),
        (f"{W}/block_structure", "128x", "weights.block_structure"),
        (A, [], "group_0.input_activations"),
        (f"{A}/dynamic", False, "input_activations.dynamic"),
        (f"{A}/strategy", "token", "input_activations.strategy"),
        (f"{A}/group_size", 64, "input_activations.group_size"),
        ("config_groups/group_0/output_activations", CODES, "group_0.output_activations"),
        ("config_groups/group_0/format", "pack-quantized", "group_0.format"),
        ("config_groups/group_0/targets", "Linear", "group_0.targets"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config"),
        ("transform_config", {"config_groups": {"R1": {}}}, "transform_config"),
        ("ignore", "lm_head", "ignore"),
    ],
)
def test_what_is_not_block_fp8_is_refused_by_its_key(path: str, value: Any, key: str) -> None:
    with pytest.raises(
        BlockFp8Error, match=rf"quantization_config\.(?:config_groups\.'group_0'\.)?{key.removeprefix('group_0.')}"
    ):
        BlockFp8Config.from_dict(changed(path, value))


def test_several_groups_of_which_one_is_ours() -> None:
    config = copy.deepcopy(LLM_COMPRESSOR)
    attention = {"targets": ["LlamaAttention"], "input_activations": CODES, "weights": None}
    config["config_groups"] |= {"kv": attention, "none": GROUP | {"targets": []}, "more": GROUP | {"targets": ["fc1"]}}
    found = BlockFp8Config.from_dict(config)
    assert found.targets == () and found.set_aside == ("config_groups.'kv'",)
    int4 = {"targets": ["re:.*experts.*"], "weights": {"num_bits": 4, "type": "int"}, "input_activations": None}
    config["config_groups"]["experts"] = int4
    with pytest.raises(BlockFp8Error, match=r"config_groups\.'experts'\.weights\.num_bits"):
        BlockFp8Config.from_dict(config)
    del config["config_groups"]["experts"]
    smaller = copy.deepcopy(GROUP)
    smaller["weights"]["block_structure"] = "64x64"
    smaller["input_activations"]["group_size"] = 64
    config["config_groups"]["small"] = smaller
    with pytest.raises(BlockFp8Error, match="one size of blocks"):
        BlockFp8Config.from_dict(config)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"quant_algo": "NVFP4"}, "quant_algo"),
        ({"quant_algo": "FP8"}, "quant_algo"),
        ({"quant_algo": "MIXED_PRECISION"}, "quant_algo"),
        ({"group_size": 64}, "group_size"),
        ({"quantized_layers": {"a": {}}}, "quantized_layers"),
        ({"quantization": "FP8"}, "quantization"),
    ],
)
def test_other_modelopt_checkpoints_are_refused_by_their_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(BlockFp8Error, match=rf"quantization_config\.{key}"):
        BlockFp8Config.from_dict(MODELOPT_CONFIG | change)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("key", "value", "harmless"),
    [
        ("expert_dtype", "fp4", "fp8"),
        ("routed_experts_quant_method", "mxfp4", "fp8"),
        ("modules_to_convert", ["experts"], []),
    ],
)
def test_keys_that_change_the_meaning_are_refused_by_name(key: str, value: Any, harmless: Any) -> None:
    for allowed in (harmless, None):
        assert BlockFp8Config.from_dict(FP8 | {key: allowed}) == BlockFp8Config.from_dict(FP8)
    with pytest.raises(BlockFp8Error, match=rf"quantization_config\.{key}"):
        BlockFp8Config.from_dict(FP8 | {key: value})


def test_keys_that_are_not_obeyed_are_named() -> None:
    cache = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    assert BlockFp8Config.from_dict(LLM_COMPRESSOR | cache).set_aside == ("kv_cache_scheme",)
    assert BlockFp8Config.from_dict(FP8 | {"\x1b[2J" * 99: 1, "later": 2, "none": None}).set_aside[1:] == ("later",)
    inner = MODELOPT_FILE | {"quantization": MODELOPT_FILE["quantization"] | {"kv_cache_quant_algo": "FP8"}}
    assert BlockFp8Config.from_dict(inner).set_aside == ("kv_cache_quant_algo",)


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        (LLM_COMPRESSOR, True),
        (changed(f"{W}/strategy", "channel"), True),  # to be refused with a reason
        (changed(f"{W}/type", "int"), False),
        (MODELOPT_CONFIG | {"quant_algo": "FP8"}, True),
        (MODELOPT_CONFIG | {"quant_algo": "NVFP4"}, False),
        ({"quant_method": "compressed-tensors", "bits": 4}, False),
        ({"quant_method": "awq"}, False),
        ({"quant_method": 3}, False),
        ({"quantization": {"quant_algo": "FP8_PB_WO"}}, False),
        ("fp8", False),
        (None, False),
    ],
)
def test_which_checkpoints_are_looked_at(config: Any, ours: bool) -> None:
    assert holds_fp8(config) is ours
