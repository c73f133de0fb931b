"""A small sound checkpoint that is damaged from the inside to the outside before it is written."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3_fp8_ascend.checkpoints.folder import CONFIG, INDEX, SINGLE
from qwen3_fp8_ascend.checkpoints.weight_file import DTYPE_BITS, METADATA
from qwen3_fp8_ascend.containers import COMPRESSED_TENSORS, FP8, MODELOPT, SCALE_ENDINGS
from qwen3_fp8_ascend.format import (
    DEFAULT_BLOCK,
    FP32_SCALES,
    UE8M0_SCALES,
    BlockFp8Config,
    BlockSize,
    scale_shape,
)
from tests.fuzz.folders import Content

BLOCK = BlockSize(32, 4)
"""The smallest that every backend takes."""

HIDDEN, INNER = 20, 40
HEADS, KV_HEADS, HEAD_SIZE = 12, 6, 4
LINEARS: Mapping[str, tuple[int, int]] = {
    "model.layers.0.self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN),
    "model.layers.0.self_attn.k_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
    "model.layers.0.self_attn.v_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
    "model.layers.1.mlp.gate_proj": (INNER, HIDDEN),
    "model.layers.1.mlp.up_proj": (INNER, HIDDEN),
    "model.layers.1.mlp.down_proj": (HIDDEN, INNER),
}
"""The sound checkpoint's linear layers: merged when served, ragged in blocks of `BLOCK`."""

EXPERTS, EXPERT_INNER = 2, 32
EXPERT_FORMS = (None, "one by one", "fused", "stacked")
"""How a draft has experts, which are in the layer that has no other MLP: all of a layer in two tensors, or in three."""


@dataclass(frozen=True)
class Form:
    """In whose words a draft's config is, what it says of scales, and their dtype in the files."""

    container: str = FP8
    scale_fmt: str = FP32_SCALES
    scales: str = "F32"

    @property
    def block(self) -> BlockSize:
        """ModelOpt has no other blocks than 128 x 128: each of the draft's weights is then one ragged block."""
        return DEFAULT_BLOCK if self.container == MODELOPT else BLOCK


FORMS = (
    Form(),
    Form(scales="BF16"),
    Form(COMPRESSED_TENSORS),
    Form(COMPRESSED_TENSORS, scales="BF16"),
    Form(MODELOPT),
    Form(scale_fmt=UE8M0_SCALES),
    Form(scale_fmt=UE8M0_SCALES, scales="F8_E8M0"),
    Form(),
)

TWO_FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Raw:
    """JSON text that `json` would not write."""

    text: bytes


@dataclass
class Pairs:
    """A JSON object that may have a key twice."""

    items: list[tuple[str, Any]]


def dump_json(value: Any) -> bytes:
    """JSON text of data, `Raw` and `Pairs` included."""
    pieces: list[bytes] = []

    def stand_in(item: Raw | Pairs) -> str:
        if isinstance(item, Raw):
            pieces.append(item.text)
        else:
            members = (json.dumps(key).encode() + b":" + dump_json(held) for key, held in item.items)
            pieces.append(b"{" + b",".join(members) + b"}")
        return f"stand-in {len(pieces) - 1}"

    text = json.dumps(value, default=stand_in).encode()
    for number, piece in enumerate(pieces):
        text = text.replace(b'"stand-in %d"' % number, piece)
    return text


@dataclass
class Tensor:
    """A tensor of a draft: its data always fits its dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def resize(self) -> None:
        size = (math.prod(self.shape) * DTYPE_BITS[self.dtype] + 7) // 8
        if size > 1 << 16:
            self.shape, size = (), DTYPE_BITS[self.dtype] // 8 or 1
        self.data = (self.data * (size // max(1, len(self.data)) + 1))[:size] if self.data else bytes(size)


@dataclass
class Draft:
    """A checkpoint while it is being damaged; each stage fills the next field from the ones before."""

    quantized: bool
    tensors: dict[str, list[Tensor]]
    config: dict[str, Any]
    index: Any = None
    headers: dict[str, Pairs] = field(default_factory=dict)
    files: dict[str, Content] = field(default_factory=dict)

    def lay_out(self) -> None:
        """Headers and the index as a sound writer makes them."""
        for file, tensors in self.tensors.items():
            entries: list[tuple[str, Any]] = [(METADATA, {"format": "pt"})]
            position = 0
            for tensor in tensors:
                end = position + len(tensor.data)
                entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
                entries.append((tensor.name, entry))
                position = end
            self.headers[file] = Pairs(entries)
        if len(self.tensors) > 1:
            self.index = {
                "metadata": {"total_size": 1},
                "weight_map": {tensor.name: file for file, tensors in self.tensors.items() for tensor in tensors},
            }

    def render(self) -> None:
        """The bytes of all files."""
        for file, header in self.headers.items():
            text = dump_json(header)
            data = b"".join(tensor.data for tensor in self.tensors[file])
            self.files[file] = struct.pack("<Q", len(text)) + text + data
        if self.index is not None:
            self.files[INDEX] = dump_json(self.index)
        self.files[CONFIG] = dump_json(self.config)


_NOISE = random.Random(0).randbytes(4096)
CODES = bytes(byte if byte & 0x7F != 0x7F else byte - 1 for byte in _NOISE)
_BF16 = b"".join(struct.pack("<H", (0x3C00 + (i * 37) % 0x400) | (0x8000 * (i & 1))) for i in range(4096))


def _power_of_two(exponent: int, dtype: str) -> bytes:
    """2 ** exponent, which every dtype of scales has."""
    biased = 127 + exponent
    return {"F32": struct.pack("<I", biased << 23), "BF16": struct.pack("<H", biased << 7)}.get(dtype, bytes([biased]))


def _weights(name: str, shape: tuple[int, ...], form: Form | None) -> list[Tensor]:
    """A weight (n, k), or those of several experts, with its scales unless it is bf16 (no form)."""
    size = math.prod(shape)
    if form is None:
        return [Tensor(name, "BF16", shape, _BF16[: 2 * size])]
    scales = (*shape[:-2], *scale_shape(shape[-2], shape[-1], form.block))
    scale = b"".join(_power_of_two(-(i % 9), form.scales) for i in range(math.prod(scales)))
    codes = Tensor(name, "F8_E4M3", shape, CODES[:size])
    return [codes, Tensor(name + SCALE_ENDINGS[form.container], form.scales, scales, scale)]


def _experts(form: str) -> dict[str, tuple[int, ...]]:
    block, gate, down = _expert_block(form), (EXPERT_INNER, HIDDEN), (HIDDEN, EXPERT_INNER)
    if form == "fused":
        return {
            f"{block}.experts.gate_up_proj": (EXPERTS, 2 * EXPERT_INNER, HIDDEN),
            f"{block}.experts.down_proj": (EXPERTS, *down),
        }
    shapes = {"gate_proj": gate, "up_proj": gate, "down_proj": down}
    if form == "stacked":
        return {f"{block}.{name}.weight": (EXPERTS, *shape) for name, shape in shapes.items()}
    return {f"{block}.experts.{e}.{name}.weight": shape for e in range(EXPERTS) for name, shape in shapes.items()}


def _expert_block(form: str | None) -> str:
    return "model.layers.0.moe" if form == "stacked" else "model.layers.0.mlp"


def sound_checkpoint(
    *, quantized: bool = True, files: int = 1, experts: str | None = None, form: Form = FORMS[0]
) -> Draft:
    """A small decoder that `inspect` and the conversions accept, in block FP8 or in bf16.

    experts: one of `EXPERT_FORMS`. form: one of `FORMS`, how it is quantized.
    """
    tensors: list[Tensor] = []
    for module, linear in LINEARS.items():
        tensors += _weights(f"{module}.weight", linear, form if quantized else None)
    if experts is not None:
        for name, matrices in _experts(experts).items():
            tensors += _weights(name, matrices, form if quantized else None)
        tensors += _weights(f"{_expert_block(experts)}.gate.weight", (EXPERTS, HIDDEN), None)
    for name, shape in (("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (3, HIDDEN))):
        tensors.append(Tensor(name, "BF16", shape, _BF16[: 2 * math.prod(shape)]))
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "hidden_size": HIDDEN,
    }
    if experts is not None:
        config |= {"num_experts": EXPERTS, "moe_intermediate_size": EXPERT_INNER, "hidden_act": "silu"}
    if quantized:
        ignored = ("lm_head", f"{_expert_block(experts)}.gate")
        said = BlockFp8Config(form.block, ignored, form.scale_fmt, form.container)
        config["quantization_config"] = said.to_dict()
    if files == 1:
        return Draft(quantized, {SINGLE: tensors}, config)
    half = len(tensors) // 2
    return Draft(quantized, {TWO_FILES[0]: tensors[:half], TWO_FILES[1]: tensors[half:]}, config)
