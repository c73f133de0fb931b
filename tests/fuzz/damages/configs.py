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
)
QUANTIZATION_VALUES: tuple[Any, ...] = (
    "fp8",
    "awq",
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
    lose_quantization_key,
    move_quantization,
    change_config,
    replace_quantization,
    change_experts,
)
