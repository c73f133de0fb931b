"""Which tensors of a checkpoint are the linear weights that block FP8 is for, judged by name and shape."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from qwen3_fp8_ascend.format import WEIGHT_SUFFIX

LAYER = re.compile(r"^(?P<prefix>(?:.+\.)?)layers\.(?P<index>\d{1,6})\.(?P<rest>.+)$")

ENCODER_WORDS = ("vision", "visual", "audio", "image", "encoder")
"""A stack of layers below such a module is not the decoder."""

UNQUANTIZED_WORDS = ("norm", "embed", "router", "conv")
"""Part of the names of modules whose 2-D weights are no linear layers, or too delicate for 8 bits."""

MTP_WORDS = ("eh_proj", "shared_head")
"""Modules around the decoder layer for multi-token prediction, which releases keep in bf16 and vLLM unquantized."""

MTP_NAME = re.compile(r"(?:^|\.)mtp(?:_layers)?\.")
"""Where that layer is no number among the others: ``mtp.layers.0``, ``model.mtp_layers.0``."""

ROUTER_GATES = ("gate", "shared_expert_gate")
"""Whole last names of expert routers; ``gate_proj`` is none of them."""

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Linear layers that vLLM merges into one, so that they must agree on being quantized."""

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
PROJECTIONS = {GATE: GATE, UP: UP, DOWN: DOWN, "w1": GATE, "w3": UP, "w2": DOWN}
"""Names of an expert's three linears in checkpoints, and which one each is."""

EXPERT = re.compile(
    r"^(?P<layer>(?:.+\.)?experts)\.(?P<expert>\d{1,6})\.(?P<projection>gate_proj|up_proj|down_proj|w1|w2|w3)"
    r"\.(?P<kind>weight|weight_scale_inv|weight_scale|bias)$"
)
"""An expert's tensors, as official FP8 releases have them."""

GATE_UP = "gate_up_proj"
FUSED_EXPERTS = re.compile(r"^(?P<layer>(?:.+\.)?experts)\.(?P<projection>gate_up_proj|down_proj)$")
"""All experts of a layer in one tensor: (experts, n, k), gate above up, or each transposed (`fused_layout`)."""

STACKED_EXPERTS = re.compile(r"^(?P<block>(?:.+\.)?moe)\.(?P<projection>gate_proj|up_proj|down_proj)\.weight$")
"""A projection of all experts of a layer in one tensor, (experts, n, k), beside their router: Step-3.5."""

FUSED_SCALES = re.compile(r"^(?:.+\.)?experts\.(?:gate_up_proj|down_proj)_scale(?:_inv)?$")


def module_of(tensor: str) -> str:
    """``model.layers.0.mlp.up_proj.weight`` -> ``model.layers.0.mlp.up_proj``."""
    return tensor.rpartition(".")[0]


def layer_index(name: str) -> int | None:
    """Number of the decoder layer that a module or tensor belongs to, or None."""
    match = LAYER.match(name)
    return None if match is None or is_of_encoder(match["prefix"]) else int(match["index"])


@functools.lru_cache(maxsize=1024)  # a checkpoint's layers have few prefixes, and are asked about many times
def is_of_encoder(name: str) -> bool:
    """Whether a module, or what is below it, is no part of the decoder: what sees or hears."""
    return _has_word(name, ENCODER_WORDS)


def is_linear_weight(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether this is the weight of any linear module: 2-D, and neither an embedding nor a norm nor a convolution."""
    last = module_of(tensor).rpartition(".")[2]
    return tensor.endswith(WEIGHT_SUFFIX) and len(shape) == 2 and not _has_word(last, ("norm", "embed", "conv"))


def is_decoder_linear(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether this is a linear weight inside a decoder layer, router gates excluded: what `quantize` quantizes."""
    if not is_linear_weight(tensor, shape) or layer_index(tensor) is None:
        return False
    module = module_of(tensor)
    match = LAYER.match(module)
    within = match["rest"] if match else ""
    return module.rpartition(".")[2] not in ROUTER_GATES and not _has_word(within, UNQUANTIZED_WORDS + MTP_WORDS)


def is_fused_experts(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds a projection of all experts of a layer: three dimensions, without ``.weight``."""
    return len(shape) == 3 and FUSED_EXPERTS.match(tensor) is not None


def is_stacked_experts(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is one projection of all experts of a layer: three dimensions, named as a linear layer is."""
    return len(shape) == 3 and STACKED_EXPERTS.match(tensor) is not None


def is_of_all_experts(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds all experts of a layer, in either of these ways."""
    return is_fused_experts(tensor, shape) or is_stacked_experts(tensor, shape)


def experts_of(tensor: str, shape: tuple[int, ...]) -> str | None:
    """The layer of experts that a weight belongs to, by vLLM's name for it, or None: ``model.layers.3.mlp.experts``."""
    if is_stacked_experts(tensor, shape):
        return f"{tensor.rsplit('.', 2)[0]}.experts"
    if "experts." not in tensor:
        return None
    match = EXPERT.match(tensor) or FUSED_EXPERTS.match(tensor)
    return None if match is None else match["layer"]


class FusedLayout(NamedTuple):
    """The sizes of a layer's experts that are in two tensors, and whether their matrices are transposed on disk."""

    experts: int
    intermediate: int
    hidden: int
    transposed: bool


def fused_layout(gate_up: tuple[int, ...], down: tuple[int, ...]) -> FusedLayout | None:
    """How two tensors hold all experts of a layer; None if they do not fit each other.

    Shapes: gate_up (E, 2I, H), gate above up, and down (E, H, I); or, as Qwen3-VL-MoE and Llama 4 have them, (E, H, 2I)
        and (E, I, H). No pair is both: 2I would be I.
    """
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0]:
        return None
    if (gate_up[1], gate_up[2]) == (2 * down[2], down[1]):
        return FusedLayout(down[0], down[2], down[1], transposed=False)
    if (gate_up[2], gate_up[1]) == (2 * down[1], down[2]):
        return FusedLayout(down[0], down[1], down[2], transposed=True)
    return None


def expert_weight(fused: str, expert: int, projection: str) -> str:
    """The name of one expert's weight that is a part of a fused tensor: ``experts.7.gate_proj.weight``."""
    return f"{fused.rpartition('.')[0]}.{expert}.{projection}.weight"


def matches_any(module: str, globs: Iterable[str]) -> bool:
    """Whether a module's name, or its weight's, matches one of the shell-style patterns."""
    return any(fnmatchcase(module, glob) or fnmatchcase(module + WEIGHT_SUFFIX, glob) for glob in globs)


def _has_word(module: str, words: Iterable[str]) -> bool:
    lowered = module.lower()
    return any(word in lowered for word in words)
