"""What stands where something else belongs: numbers, JSON, names, shapes."""

from __future__ import annotations

from typing import Any

from qwen3_fp8_ascend.checkpoints.folder import SINGLE
from qwen3_fp8_ascend.checkpoints.weight_file import METADATA
from tests.fuzz.choices import Choices
from tests.fuzz.drafts import TWO_FILES, Raw
from tests.fuzz.folders import OUTSIDE

NUMBERS = (0, 1, -1, 2, 7, 8, 9, 127, 128, 129, 1 << 20, (1 << 20) + 1, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40)
HUGE = ((1 << 53) + 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**19, 10**20, 10**40, -(1 << 63))
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0.5,
    -0.0,
    128.0,
    Raw(b"1e400"),
    Raw(b"NaN"),
    Raw(b"-Infinity"),
    "128",
    "fp8",
    "x" * 5000,
    ["x" * 300] * 20,
    "",
    [],
    {},
    [[]],
    "\ud800",
    "\x1b[2J\n",
    Raw(b"[" * 40 + b"]" * 40),
    Raw(b'{"a":' * 500 + b"1" + b"}" * 500),
    Raw(b"[" * 970 + b"]" * 970),
)
NO_JSON = (b"01", b'"\xff"', b"9" * 5000, b"[" * 2000 + b"]" * 2000, b"[" * 200_000, b"nul", b"'a'", b"")
NAMES = (
    "",
    METADATA,
    "a",
    "weight",
    ".weight",
    ".weight_scale_inv",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.weight_scale_inv",
    "model.layers.0.self_attn.q_proj.input_scale",
    "model.layers.0.self_attn.q_proj.weight_scale",
    "model.layers.1.mlp.experts.weight",
    "model.layers.0.mlp.experts.0.up_proj.weight",
    "model.layers.0.mlp.experts.1.down_proj.weight_scale_inv",
    "model.layers.0.mlp.experts.1.gate_proj.bias",
    "model.layers.0.mlp.experts.999999.gate_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.moe.up_proj.weight",
    "model.layers.0.moe.down_proj.weight_scale_inv",
    "model.layers.0.mlp.experts.down_proj_scale_inv",
    "model.layers.999999.mlp.up_proj.weight",
    "model.layers.99999999999999999999.mlp.up_proj.weight",
    "model.layers.٣.mlp.up_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "visual.layers.1.mlp.up_proj.weight",
    "." * 1000 + "weight",
    "a" * 1025,
    "layers." * 140 + "1.x.weight",
    "../" + OUTSIDE,
    "\x00",
    "\x1b[2J",
    "a\nb",
    "\u202e",
    "😀.weight",
    "\ud800",
)
FILE_NAMES = (
    f"../{OUTSIDE}.safetensors",
    f"/{OUTSIDE}.safetensors",
    "/dev/zero",
    "/etc/passwd",
    "./model.safetensors",
    "sub/../model.safetensors",
    "..\\secret.safetensors",
    "pytorch_model.bin",
    "config.json",
    "absent.safetensors",
    SINGLE,
    *TWO_FILES,
    "",
    "..",
    "\x00.safetensors",
    "a" * 300 + ".safetensors",
    "\x1b[2J.safetensors",
)
SCALE_BITS = (0x7FC00000, 0x7F800000, 0xFF800000, 0xBF800000, 0, 0x80000000, 1, 0x7F7FFFFF, 0x807FFFFF, 0xFFFFFFFF)
"""NaN, inf, -inf, -1, 0, -0, the smallest and the largest float, a negative subnormal, another NaN."""


def odd_value(choices: Choices) -> Any:
    """A JSON value that does not belong where it will stand."""
    kind = choices.below(5)
    if kind == 0:
        return Raw(choices.pick(NO_JSON)) if choices.one_in(12) else choices.pick(ODD)
    if kind == 1:
        return choices.pick(NUMBERS)
    if kind == 2:
        return choices.pick(HUGE)
    if kind == 3:
        return [odd_value(choices) for _ in range(choices.below(4))]
    return {choices.pick(NAMES[:9]): odd_value(choices) for _ in range(choices.below(3))}


def odd_shape(choices: Choices) -> tuple[int, ...]:
    """A shape of non-negative integers, of any rank and size; empty ones of absurd length among them."""
    shape = [
        choices.pick((1, 0, 2, 20, 24, 32, 40, 48, 129)) for _ in range(choices.pick((2, 2, 2, 1, 0, 3, 4, 64, 65)))
    ]
    if shape and 0 in shape and choices.below(2):
        for _ in range(1 + choices.below(2)):
            shape[choices.below(len(shape))] = choices.pick((1 << 20, 1 << 31, 1 << 40, 1 << 62))
        shape[choices.below(len(shape))] = 0
    return tuple(shape)
