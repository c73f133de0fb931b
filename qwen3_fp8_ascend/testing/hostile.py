"""Checkpoint folders that mean harm: one generator for hypothesis, for a coverage-guided fuzzer and for runs in bulk.

`hostile_folder` begins with a small sound checkpoint and damages it in a few places, from the inside (a tensor, a
header's entry, a key of config.json) to the outside (bytes, links, pickles), so that the deep checks are reached as
well as the first ones. Every decision comes from `Choices`; an input *is* its choices, whoever made them, and can be
kept in a file and made again. Small attacks made large are in `large_attacks`. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qwen3_fp8_ascend.checkpoints.folder import CONFIG, INDEX, SINGLE
from qwen3_fp8_ascend.checkpoints.header import DTYPE_BITS, METADATA
from qwen3_fp8_ascend.format import BlockSize, scale_shape

T = TypeVar("T")

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

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OUTSIDE = "secret"
"""A file beside the checkpoint folder (`OUTSIDE`.safetensors, .json) that no checkpoint may lead to."""

PICKLE = b"cposix\nsystem\n(S'touch PICKLE_WAS_LOADED'\ntR."
"""Runs a command when it is unpickled."""

HOLE = 1 << 40


class Choices:
    """Decisions taken from a byte string; when it is used up every decision is the first alternative."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def below(self, count: int) -> int:
        """An integer from 0 to `count` - 1."""
        return int.from_bytes(self._next(_width(count)), "little") % count

    def take(self, most: int) -> bytes:
        """Bytes as they come, up to `most`."""
        size = self.below(most + 1)
        return self._next(size).ljust(size, b"\0")

    def _next(self, size: int) -> bytes:
        piece = self._data[self._position : self._position + size]
        self._position += size
        return piece

    def pick(self, alternatives: Sequence[T]) -> T:
        """One of several."""
        return alternatives[self.below(len(alternatives))]

    def one_in(self, count: int) -> bool:
        """True once in `count` times, and never when the choices are used up."""
        return self.below(count) == count - 1


class DrawnChoices(Choices):
    """Decisions drawn elsewhere, by hypothesis for instance; `data` replays them through `Choices`."""

    def __init__(self, draw: Callable[[int], int]) -> None:
        super().__init__(b"")
        self._draw = draw
        self.data = b""

    def below(self, count: int) -> int:
        value = self._draw(count) if count > 1 else 0
        self.data += value.to_bytes(_width(count), "little")
        return value

    def _next(self, size: int) -> bytes:
        return bytes(self.below(256) for _ in range(size))


def _width(count: int) -> int:
    """Bytes for a choice among so many."""
    return ((count - 1).bit_length() + 7) // 8


def random_choices(seed: int, number: int, size: int = 256) -> bytes:
    """The choices of one input of a run in bulk."""
    return random.Random(f"{seed}/{number}").randbytes(size)


@dataclass(frozen=True)
class Sparse:
    """A file of `size` bytes that begins with `head` and goes on with a hole; `described`: by a header, as data."""

    head: bytes
    size: int
    described: bool = False


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Pipe:
    """A named pipe, which blocks whoever opens it."""


@dataclass(frozen=True)
class Folder:
    """A folder in place of a file."""


Content = bytes | Sparse | Link | Pipe | Folder


@dataclass
class HostileFolder:
    """Files by relative name, and what was done to them."""

    files: dict[str, Content]
    damages: list[str] = field(default_factory=list)

    def size(self, *, data: bool) -> int:
        """Bytes that a reader has before it: holes count in JSON, where they are data, and for who reads all `data`."""
        total = 0
        for name, content in self.files.items():
            if isinstance(content, bytes):
                total += len(content)
            elif isinstance(content, Sparse):
                small = content.size < HOLE and (data or not name.endswith(".safetensors"))
                total += content.size if small or content.described else len(content.head)
        return total

    def write(self, folder: Path) -> None:
        """Write it into an empty folder."""
        for name, content in self.files.items():
            path = os.path.join(os.fsencode(folder), name.encode("utf-8", "surrogateescape"))
            if "/" in name:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            if isinstance(content, Link):
                os.symlink(content.target, path)
            elif isinstance(content, Pipe):
                os.mkfifo(path)
            elif isinstance(content, Folder):
                os.mkdir(path)
            else:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                try:
                    os.write(descriptor, content if isinstance(content, bytes) else content.head)
                    if isinstance(content, Sparse):
                        os.ftruncate(descriptor, content.size)
                finally:
                    os.close(descriptor)


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
_CODES = bytes(byte if byte & 0x7F != 0x7F else byte - 1 for byte in _NOISE)
_BF16 = b"".join(struct.pack("<H", (0x3C00 + (i * 37) % 0x400) | (0x8000 * (i & 1))) for i in range(2048))


def sound_checkpoint(*, quantized: bool = True, files: int = 1) -> Draft:
    """A small decoder that `inspect` and the conversions accept, in block FP8 or in bf16."""
    tensors: list[Tensor] = []
    for module, (n, k) in LINEARS.items():
        if quantized:
            rows, columns = scale_shape(n, k, BLOCK)
            scale = b"".join(struct.pack("<f", 2.0 ** -(i % 9)) for i in range(rows * columns))
            tensors.append(Tensor(f"{module}.weight", "F8_E4M3", (n, k), _CODES[: n * k]))
            tensors.append(Tensor(f"{module}.weight_scale_inv", "F32", (rows, columns), scale))
        else:
            tensors.append(Tensor(f"{module}.weight", "BF16", (n, k), _BF16[: 2 * n * k]))
    for name, shape in (("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (3, HIDDEN))):
        tensors.append(Tensor(name, "BF16", shape, _BF16[: 2 * math.prod(shape)]))
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "hidden_size": HIDDEN,
    }
    if quantized:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(BLOCK),
            "modules_to_not_convert": ["lm_head"],
        }
    if files == 1:
        return Draft(quantized, {SINGLE: tensors}, config)
    half = len(tensors) // 2
    return Draft(quantized, {SHARDS[0]: tensors[:half], SHARDS[1]: tensors[half:]}, config)


# What can be chosen for a value.

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
    *SHARDS,
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


def _file(draft: Draft, choices: Choices) -> str:
    return choices.pick(sorted(draft.tensors))


def _tensor(draft: Draft, choices: Choices) -> Tensor:
    tensors = draft.tensors[_file(draft, choices)]
    if not tensors:
        tensors.append(Tensor("a", "U8", (1,), b"\0"))
    return choices.pick(tensors)


def _tensor_with(draft: Draft, choices: Choices, suffix: str) -> Tensor:
    found = [t for tensors in draft.tensors.values() for t in tensors if t.name.endswith(suffix)]
    return choices.pick(found) if found else _tensor(draft, choices)


# Damage to tensors: the file stays consistent, what it says is wrong.


def change_dtype(draft: Draft, choices: Choices) -> None:
    tensor = _tensor(draft, choices)
    tensor.dtype = choices.pick(sorted(DTYPE_BITS))
    tensor.resize()


def change_shape(draft: Draft, choices: Choices) -> None:
    tensor = _tensor(draft, choices)
    tensor.shape = odd_shape(choices)
    tensor.resize()


def transpose(draft: Draft, choices: Choices) -> None:
    tensor = _tensor_with(draft, choices, choices.pick((".weight", "_inv")))
    tensor.shape = tensor.shape[::-1]


def rename_tensor(draft: Draft, choices: Choices) -> None:
    _tensor(draft, choices).name = choices.pick(NAMES)


def rename_to_sibling(draft: Draft, choices: Choices) -> None:
    _tensor(draft, choices).name = _tensor(draft, choices).name


def drop_tensor(draft: Draft, choices: Choices) -> None:
    tensors = draft.tensors[_file(draft, choices)]
    if tensors:
        tensors.pop(choices.below(len(tensors)))


def drop_all_tensors(draft: Draft, choices: Choices) -> None:
    draft.tensors[_file(draft, choices)].clear()


def add_tensor(draft: Draft, choices: Choices) -> None:
    tensor = Tensor(choices.pick(NAMES), choices.pick(sorted(DTYPE_BITS)), odd_shape(choices), _CODES[:8])
    tensor.resize()
    draft.tensors[_file(draft, choices)].append(tensor)


def add_empty_pair(draft: Draft, choices: Choices) -> None:
    """A weight without any element and scales that fit it, both as long as one likes."""
    n, k = choices.pick(((0, 1 << 62), (1 << 62, 0), (1 << 40, 0), (0, 0), (0, 1 << 31)))
    scale = scale_shape(n, k, BLOCK)
    module = f"model.layers.{choices.below(3)}.mlp.fc1"
    tensors = draft.tensors[_file(draft, choices)]
    tensors.append(Tensor(f"{module}.weight", "F8_E4M3" if draft.quantized else "BF16", (n, k), b""))
    if draft.quantized:
        tensors.append(Tensor(f"{module}.weight_scale_inv", "F32", scale, b""))


def copy_between_files(draft: Draft, choices: Choices) -> None:
    draft.tensors[_file(draft, choices)].append(_tensor(draft, choices))


def poison_scales(draft: Draft, choices: Choices) -> None:
    tensor = _tensor_with(draft, choices, "_inv")
    position = 4 * choices.below(max(1, len(tensor.data) // 4))
    bits = struct.pack("<I", choices.pick(SCALE_BITS))
    tensor.data = (tensor.data[:position] + bits + tensor.data[position + 4 :])[: len(tensor.data)]


def poison_weights(draft: Draft, choices: Choices) -> None:
    """NaN codes in FP8, NaN or infinity in bf16."""
    tensor = _tensor_with(draft, choices, ".weight")
    position = 2 * choices.below(max(1, len(tensor.data) // 2))
    bits = choices.pick((b"\x7f\x7f", b"\xff\xff", b"\x80\x7f", b"\x80\xff", b"\x01\x7f"))
    tensor.data = (tensor.data[:position] + bits + tensor.data[position + 2 :])[: len(tensor.data)]


# Damage to headers and the index: lies about the file.


def _header_entry(draft: Draft, choices: Choices) -> tuple[Pairs, int]:
    header = draft.headers[_file(draft, choices)]
    return header, choices.below(len(header.items))


def _lie(draft: Draft, choices: Choices, key: str, value: Any) -> None:
    header, at = _header_entry(draft, choices)
    name, entry = header.items[at]
    if isinstance(entry, dict):
        header.items[at] = (name, entry | {key: value})


def lie_about_dtype(draft: Draft, choices: Choices) -> None:
    dtypes = (*sorted(DTYPE_BITS), "F8_E4M4", "f32", "F8_E4M3FN")
    _lie(draft, choices, "dtype", odd_value(choices) if choices.one_in(3) else choices.pick(dtypes))


def lie_about_shape(draft: Draft, choices: Choices) -> None:
    value = odd_value(choices) if choices.one_in(3) else [choices.pick(NUMBERS + HUGE) for _ in range(choices.below(4))]
    _lie(draft, choices, "shape", value)


def lie_about_offsets(draft: Draft, choices: Choices) -> None:
    value = odd_value(choices) if choices.one_in(3) else [choices.pick(NUMBERS + HUGE) for _ in range(2)]
    _lie(draft, choices, "data_offsets", value)


def shift_offsets(draft: Draft, choices: Choices) -> None:
    header, at = _header_entry(draft, choices)
    entry = header.items[at][1]
    if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
        by = choices.pick((1, -1, 4, -4, 1 << 40, -(1 << 40)))
        entry["data_offsets"] = [offset + by if isinstance(offset, int) else offset for offset in entry["data_offsets"]]


def overlap(draft: Draft, choices: Choices) -> None:
    """A tensor that takes another's bytes."""
    header, at = _header_entry(draft, choices)
    other = choices.pick(header.items)[1]
    if isinstance(other, dict) and isinstance(header.items[at][1], dict) and "data_offsets" in other:
        header.items[at][1]["data_offsets"] = other["data_offsets"]


def extra_key(draft: Draft, choices: Choices) -> None:
    _lie(draft, choices, choices.pick(("x", "", "stride", "Dtype")), odd_value(choices))


def lost_key(draft: Draft, choices: Choices) -> None:
    header, at = _header_entry(draft, choices)
    entry = header.items[at][1]
    if isinstance(entry, dict) and entry:
        entry.pop(choices.pick(sorted(entry)))


def replace_entry(draft: Draft, choices: Choices) -> None:
    header, at = _header_entry(draft, choices)
    header.items[at] = (header.items[at][0], odd_value(choices))


def repeat_entry(draft: Draft, choices: Choices) -> None:
    header, at = _header_entry(draft, choices)
    header.items.append(header.items[at])


def change_metadata(draft: Draft, choices: Choices) -> None:
    header = draft.headers[_file(draft, choices)]
    header.items[0] = (METADATA, odd_value(choices) if choices.below(2) else {choices.pick(NAMES): odd_value(choices)})


def change_index(draft: Draft, choices: Choices) -> None:
    if not isinstance(draft.index, dict):
        draft.index = {"weight_map": {t.name: file for file, tensors in draft.tensors.items() for t in tensors}}
    weight_map = draft.index.get("weight_map")
    if not isinstance(weight_map, dict) or choices.one_in(6):
        draft.index = draft.index | {"weight_map": odd_value(choices)} if choices.below(4) else odd_value(choices)
        return
    name = choices.pick(sorted(weight_map)) if weight_map and choices.below(2) else choices.pick(NAMES)
    action = choices.below(4)
    if action == 0:
        weight_map[name] = choices.pick(FILE_NAMES)
    elif action == 1:
        weight_map.pop(name, None)
    elif action == 2:
        weight_map[name] = odd_value(choices)
    else:
        draft.index["weight_map"] = Pairs([*weight_map.items(), (name, choices.pick(FILE_NAMES))])


# Damage to config.json.

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


# Damage to bytes.

JUNK = (
    b"",
    b"{}",
    b"[]",
    b"<html>not found</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    b"\xef\xbb\xbf{}",
    '{"a":1}'.encode("utf-16"),
    b'{"a":1,"a":2}',
    b"{" * 1000,
    b"[" * 100_000,
    b'{"a":' * 3000,
    b"\x00" * 64,
    struct.pack("<Q", 2) + b"{}",
    struct.pack("<Q", 8) + b"{}      ",
    struct.pack("<Q", 10) + b'{"":{}}   ',
    struct.pack("<Q", 100_000_000) + b"{",
    b"PK\x03\x04" + bytes(60),
    PICKLE,
)


def _bytes_of(draft: Draft, choices: Choices) -> tuple[str, bytearray]:
    name = choices.pick(sorted(draft.files))
    content = draft.files[name]
    return name, bytearray(content if isinstance(content, bytes) else b"")


def mutate_bytes(draft: Draft, choices: Choices) -> None:
    """Flip, cut, insert or repeat, mostly within the first kilobytes, where headers and JSON are."""
    name, content = _bytes_of(draft, choices)
    for _ in range(1 + choices.below(4)):
        at = choices.below(max(1, min(len(content), 65536)))
        kind = choices.below(5)
        if kind == 0 and content:
            content[at] = choices.below(256)
        elif kind == 1:
            del content[at : at + 1 + choices.below(64)]
        elif kind == 2:
            content[at:at] = choices.take(8)
        elif kind == 3:
            content[at:at] = content[at : at + 1 + choices.below(64)]
        else:
            token = choices.pick(
                (b"{", b"}", b"[", b"]", b'"', b",", b"-", b"\\u0000", b"1e9", b"null", b"\xf0\x9f\x98\x80")
            )
            content[at : at + len(token)] = token
    draft.files[name] = bytes(content)


def cut_short(draft: Draft, choices: Choices) -> None:
    name, content = _bytes_of(draft, choices)
    draft.files[name] = bytes(content[: choices.below(len(content) + 1)])


def add_trailing(draft: Draft, choices: Choices) -> None:
    name, content = _bytes_of(draft, choices)
    draft.files[name] = bytes(content) + choices.pick((b"\0", b" ", b"\n", b"}", bytes(4096)))


def lie_about_length(draft: Draft, choices: Choices) -> None:
    name, content = _bytes_of(draft, choices)
    true = int.from_bytes(content[:8], "little")
    length = choices.pick(
        (true - 1, true + 1, true + 8, 0, 1, len(content), 100_000_000, 1 << 32, 1 << 63, (1 << 64) - 1)
    )
    draft.files[name] = struct.pack("<Q", length % (1 << 64)) + bytes(content[8:])


def replace_by_junk(draft: Draft, choices: Choices) -> None:
    name, _ = _bytes_of(draft, choices)
    draft.files[name] = choices.pick(JUNK)


def replace_by_choices(draft: Draft, choices: Choices) -> None:
    """Whatever bytes the fuzzer likes."""
    name, _ = _bytes_of(draft, choices)
    text = choices.take(200)
    draft.files[name] = struct.pack("<Q", len(text)) + text if choices.below(2) else text


def make_sparse(draft: Draft, choices: Choices) -> None:
    """A hole at the end, or a last tensor that fills it truthfully."""
    name, content = _bytes_of(draft, choices)
    draft.files[name] = Sparse(bytes(content), choices.pick((HOLE, len(content) + 1, 1 << 20)))


# Damage to the folder.


def _any_file(draft: Draft, choices: Choices) -> str:
    return choices.pick(sorted(draft.files))


LINKS = (
    f"../{OUTSIDE}.safetensors",
    f"../{OUTSIDE}.json",
    "/dev/zero",
    "/etc/passwd",
    "/proc/self/environ",
    "nowhere",
    ".",
    "..",
    "loop-a",
    "../../blobs/0123",
)


def link_outside(draft: Draft, choices: Choices) -> None:
    """A file that is a link: to a secret, a device, itself, or nowhere."""
    name = _any_file(draft, choices)
    target = choices.pick(LINKS)
    draft.files[name] = Link(name if target == "." and choices.below(2) else target)


def link_beside(draft: Draft, choices: Choices) -> None:
    """A link among the files that conversions carry over."""
    name = choices.pick(
        ("tokenizer.json", "sub/deep/vocab.txt", "LICENSE", "chat_template.jinja", "generation_config.json")
    )
    draft.files[name] = Link(choices.pick(LINKS))
    draft.files["loop-a"], draft.files["loop-b"] = Link("loop-b"), Link("loop-a")


def special_file(draft: Draft, choices: Choices) -> None:
    draft.files[_any_file(draft, choices)] = Pipe() if choices.below(2) else Folder()


def remove_file(draft: Draft, choices: Choices) -> None:
    if len(draft.files) > 1:
        draft.files.pop(_any_file(draft, choices))


def add_file(draft: Draft, choices: Choices) -> None:
    name = choices.pick(
        (
            "pytorch_model.bin",
            "consolidated.pth",
            "training_args.bin",
            "optimizer.pt",
            "model.safetensors.PKL",
            "tokenizer.json",
            "extra.safetensors",
            "model-00007-of-00099.safetensors",
            "model-99999-of-99999.safetensors",
            "journal.json",
            "a\nb\x1b[2J.txt",
            "\udcff\udcfe.txt",
            "\udcff.safetensors",
            ".git/config",
            "sub/" * 40 + "x",
            "model.gguf",
            "a" * 255,
        )
    )
    draft.files[name] = PICKLE if choices.below(2) else choices.take(40)


def pickles_only(draft: Draft, choices: Choices) -> None:
    """The weights as pickles, which must never be loaded."""
    for name in [name for name in draft.files if name.endswith(".safetensors") or name == INDEX]:
        draft.files.pop(name)
    draft.files[choices.pick(("pytorch_model.bin", "model.pt", "weights.pkl", "a.ckpt", "model.pth"))] = PICKLE
    if choices.below(2):
        draft.files["pytorch_model.bin.index.json"] = b'{"weight_map": {"a": "pytorch_model.bin"}}'


def weights_are_pickles(draft: Draft, choices: Choices) -> None:
    """A pickle under the name of a safetensors file."""
    names = [name for name in draft.files if name.endswith(".safetensors")]
    if names:
        draft.files[choices.pick(names)] = PICKLE


Damage = Callable[[Draft, Choices], None]

TENSORS: tuple[Damage, ...] = (
    change_dtype,
    change_shape,
    transpose,
    rename_tensor,
    rename_to_sibling,
    drop_tensor,
    drop_all_tensors,
    add_tensor,
    add_empty_pair,
    copy_between_files,
    poison_scales,
    poison_weights,
)
HEADERS: tuple[Damage, ...] = (
    lie_about_dtype,
    lie_about_shape,
    lie_about_offsets,
    shift_offsets,
    overlap,
    extra_key,
    lost_key,
    replace_entry,
    repeat_entry,
    change_metadata,
    change_index,
)
CONFIGS: tuple[Damage, ...] = (
    change_quantization,
    change_block,
    lose_quantization_key,
    move_quantization,
    change_config,
    replace_quantization,
)
BYTES: tuple[Damage, ...] = (
    mutate_bytes,
    cut_short,
    add_trailing,
    lie_about_length,
    replace_by_junk,
    replace_by_choices,
    make_sparse,
)
FOLDERS: tuple[Damage, ...] = (
    link_outside,
    link_beside,
    special_file,
    remove_file,
    add_file,
    pickles_only,
    weights_are_pickles,
)
STAGES = (TENSORS, HEADERS, CONFIGS, BYTES, FOLDERS)


def hostile_folder(
    choices: Choices,
    *,
    quantized: bool | None = None,
    stages: Sequence[Sequence[Damage]] = STAGES,
    only: Callable[[str], bool] | None = None,
) -> HostileFolder:
    """A checkpoint folder with up to three damages of the given stages; none once in a while.

    `quantized` fixes what the sound checkpoint is; `only` keeps the files that a reader of single files needs.
    """
    is_quantized = not choices.one_in(4) if quantized is None else quantized
    draft = sound_checkpoint(quantized=is_quantized, files=1 + choices.below(2))
    wanted = [choices.pick(choices.pick(stages)) for _ in range(choices.pick((0, 1, 1, 2, 3, 1, 2, 1)))]
    damages: list[str] = []

    def apply(*stage: Sequence[Damage]) -> None:
        for damage in wanted:
            if any(damage in kind for kind in stage):
                damage(draft, choices)
                damages.append(damage.__name__)

    apply(TENSORS)
    draft.lay_out()
    apply(HEADERS, CONFIGS)
    draft.render()
    if only is not None:
        draft.files = {name: content for name, content in draft.files.items() if only(name)}
    apply(BYTES)
    apply(FOLDERS)
    return HostileFolder(draft.files, damages)
