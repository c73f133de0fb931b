"""Damage to config.json."""

from __future__ import annotations

from typing import Any

from tests.fuzz.choices import Choices
from tests.fuzz.damages import Damage
from tests.fuzz.drafts import BLOCK, Draft
from tests.fuzz.values import HUGE, NUMBERS, odd_value

CONFIG_KEYS = ("architectures", "model_type", "num_hidden_layers", "text_config", "dtype", "compression_config")
QUANTIZATION_KEYS = (
    "quant_method",
    "fmt",
    "activation_scheme",
    "weight_block_size",
    "modules_to_not_convert",
    "ignored_layers",
    "scale_fmt",
    "expert_dtype",
    "routed_experts_quant_method",
    "modules_to_convert",
    "config_groups",
    "format",
    "ignore",
    "sparsity_config",
    "kv_cache_scheme",
    "quant_algo",
    "quantization",
    "producer",
    "\x1b[2J",
)
QUANTIZATION_VALUES: tuple[Any, ...] = (
    "fp8",
    "awq",
    "compressed-tensors",
    "modelopt",
    "FP8_PB_WO",
    "fp4",
    {"quant_algo": "FP8_PB_WO", "exclude_modules": ["*"]},
    {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
    "e4m3",
    "e5m2",
    "static",
    "ue8m0",
    None,
    [32, 4],
    [64, 4],
    [128, 128],
    [1, 1],
    [1, 1 << 20],
    [1 << 20, 1],
    [1 << 20, 1 << 20],
    [0, 8],
    [-8, 8],
    [8],
    [8, 8, 8],
    [8.0, 8],
    [True, 8],
    [1 << 62, 1 << 62],
    "88",
    ["lm_head", "q_proj"],
    ["model"],
    ["", "."],
    ["\x1b[2J", "\ud800"],
    [1],
    "lm_head",
)


def _quantization(draft: Draft) -> dict[str, Any]:
    found = draft.config.get("quantization_config")
    if not isinstance(found, dict):
        found = draft.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    return found


def change_quantization(draft: Draft, choices: Choices) -> None:
    value = odd_value(choices) if choices.one_in(3) else choices.pick(QUANTIZATION_VALUES)
    _quantization(draft)[choices.pick(QUANTIZATION_KEYS)] = value


ENTRIES = (
    "re:.*",
    "re:.*down_proj$",
    "re:(a*)*b",
    "re:(.*a.*){9}",
    "re:(?!x)",
    "re:[",
    "*",
    "*.down_proj",
    "model.layers.*",
    r"model\.layers\.\d+",
    "model.language_model.layers.0",
    "qkv_proj",
    "self_attn",
    "*a" * 60,
    "re:" + "(" * 300,
    "re:" + "a{64}" * 90,
    "x" * 3000,
    ".",
    "",
)
"""Of ignore lists: names and patterns, sound and evil."""


def change_ignored(draft: Draft, choices: Choices) -> None:
    """Entries for whichever key the container has."""
    entries = [choices.pick(ENTRIES) for _ in range(1 + choices.below(40))]
    for key in ("modules_to_not_convert", "ignore", "exclude_modules"):
        _quantization(draft)[key] = entries


def change_group(draft: Draft, choices: Choices) -> None:
    """A value deep in a config group of compressed-tensors, or a further group."""
    groups = _quantization(draft).get("config_groups")
    if not isinstance(groups, dict):
        groups = _quantization(draft)["config_groups"] = {}
    group = groups.get("group_0")
    group = dict(group) if isinstance(group, dict) else {}
    groups[choices.pick(("group_0", "group_1", "", "\x1b[2J", "x" * 300))] = group
    part = choices.pick(("weights", "input_activations", "targets", "format", "output_activations"))
    if choices.below(2) and isinstance(group.get(part), dict):
        key = choices.pick(("num_bits", "type", "strategy", "block_structure", "group_size", "dynamic", "symmetric"))
        value = odd_value(choices) if choices.below(2) else choices.pick((8, "float", "8x8", [128, 128], True, None))
        group[part] = group[part] | {key: value}
    else:
        group[part] = odd_value(choices) if choices.below(2) else choices.pick((["fc1"], [""], ["XAttention"], None))


def change_container(draft: Draft, choices: Choices) -> None:
    """Another container's words for what the tensors are."""
    found = _quantization(draft)
    found["quant_method"] = choices.pick(("fp8", "compressed-tensors", "compressed_tensors", "modelopt", "ModelOpt"))
    if choices.below(2):
        found["quant_algo"] = choices.pick(("FP8_PB_WO", "fp8_block_scales", "FP8", "NVFP4"))


def change_block(draft: Draft, choices: Choices) -> None:
    _quantization(draft)["weight_block_size"] = [choices.pick(NUMBERS + HUGE) for _ in range(2)]


def lose_quantization_key(draft: Draft, choices: Choices) -> None:
    _quantization(draft).pop(choices.pick(QUANTIZATION_KEYS), None)


def move_quantization(draft: Draft, choices: Choices) -> None:
    found = draft.config.pop("quantization_config", None)
    place = choices.below(3)
    if place == 0:
        draft.config["text_config"] = {"quantization_config": found, "num_hidden_layers": odd_value(choices)}
    elif place == 1:
        draft.config["compression_config"] = found


def change_config(draft: Draft, choices: Choices) -> None:
    draft.config[choices.pick(CONFIG_KEYS)] = odd_value(choices)


def replace_quantization(draft: Draft, choices: Choices) -> None:
    draft.config["quantization_config"] = odd_value(choices)


def change_experts(draft: Draft, choices: Choices) -> None:
    """What config.json says of experts, or that of a language model within another."""
    keys = ("num_experts", "num_local_experts", "moe_intermediate_size", "hidden_size", "hidden_act", "swiglu_limit")
    if choices.one_in(4):
        draft.config["text_config"] = {key: draft.config.pop(key) for key in keys if key in draft.config}
    key = choices.pick(keys)
    values: tuple[Any, ...] = ("gelu", 0, 1, 7, 32, 1 << 62, None, True)
    draft.config[key] = odd_value(choices) if choices.one_in(3) else choices.pick(values)


CONFIGS: tuple[Damage, ...] = (
    change_quantization,
    change_block,
    change_ignored,
    change_group,
    change_container,
    lose_quantization_key,
    move_quantization,
    change_config,
    replace_quantization,
    change_experts,
)
