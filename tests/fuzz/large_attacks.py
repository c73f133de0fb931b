"""Small attacks made large: `HEAVY[name](size)` is a hostile folder of about `size` bytes. Nothing imports torch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from qwen3_fp8_ascend.checkpoints.folder import CONFIG, INDEX, SINGLE
from qwen3_fp8_ascend.format import BlockSize, scale_shape
from tests.fuzz.drafts import TWO_FILES, Raw, dump_json, sound_checkpoint
from tests.fuzz.folders import HOLE, Content, HostileFolder, Sparse


def _header_file(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def _with_header(text: bytes, data: bytes = b"", **config: Any) -> HostileFolder:
    settings = sound_checkpoint().config | config
    return HostileFolder({SINGLE: _header_file(text, data), CONFIG: dump_json(settings)})


def _fill(size: int, piece: bytes) -> bytes:
    return b",".join([piece] * (size // (len(piece) + 1) + 1))


def _numbered(size: int, form: str, extra: int = 0) -> bytes:
    """Members of an object, `form` with a number for ``#``, of `size` bytes in all."""
    count = size // (len(form) + 5 + extra) + 1
    return b",".join(form.replace("#", f"{i:06}").encode() for i in range(count))


_EMPTY = '"dtype":"U8","shape":[0],"data_offsets":[0,0]'
_EMPTY_FP8 = '"dtype":"F8_E4M3","shape":[0,0],"data_offsets":[0,0]'
_DOTS = "a." * 500


def _config_file(size: int, **config: Any) -> HostileFolder:
    draft = sound_checkpoint()
    draft.config |= config
    draft.lay_out()
    draft.render()
    return HostileFolder(draft.files)


def _quantization_file(**changes: Any) -> HostileFolder:
    draft = sound_checkpoint()
    draft.config["quantization_config"] |= changes
    draft.lay_out()
    draft.render()
    return HostileFolder(draft.files)


def _index_file(text: bytes) -> HostileFolder:
    draft = sound_checkpoint(files=2)
    draft.lay_out()
    draft.render()
    draft.files[INDEX] = text
    return HostileFolder(draft.files)


def _names(size: int, form: str) -> list[str]:
    return [form.replace("#", f"{i:06}") for i in range(size // (len(form) + 8) + 1)]


def _one_pair(n: int, k: int, block: BlockSize) -> HostileFolder:
    """A single FP8 layer of that shape with its scales; truthful, whatever the block."""
    rows, columns = scale_shape(n, k, block)
    module = "model.layers.0.mlp.fc1"
    codes, scale = n * k, 4 * rows * columns
    entries = {
        f"{module}.weight": {"dtype": "F8_E4M3", "shape": [n, k], "data_offsets": [0, codes]},
        f"{module}.weight_scale_inv": {
            "dtype": "F32",
            "shape": [rows, columns],
            "data_offsets": [codes, codes + scale],
        },
    }
    quantization = sound_checkpoint().config["quantization_config"] | {"weight_block_size": list(block)}
    data = bytes([0x38]) * codes + struct.pack("<f", 1.0) * (rows * columns)
    return _with_header(dump_json(entries), data, quantization_config=quantization, num_hidden_layers=1)


def _one_float(n: int, k: int, name: str = "model.layers.0.mlp.fc1.weight") -> HostileFolder:
    draft = sound_checkpoint(quantized=False)
    entries = {name: {"dtype": "BF16", "shape": [n, k], "data_offsets": [0, 2 * n * k]}}
    files: dict[str, Content] = {SINGLE: _header_file(dump_json(entries), b"\x80\x3f" * (n * k))}
    return HostileFolder(files | {CONFIG: dump_json(draft.config)})


def _many_files(size: int) -> HostileFolder:
    one = _header_file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\0")
    files: dict[str, Content] = {f"{i}.safetensors": one for i in range(min(3000, size // len(one) // 4 + 1))}
    return HostileFolder(files | {CONFIG: dump_json(sound_checkpoint().config)})


def _terabyte(size: int, name: str = "t#", layers: int = 2, **quantization: Any) -> HostileFolder:
    """As many tensors as the header can name, with a number for ``#``, in a file that looks large enough for them."""
    count = size // (90 + len(name)) + 1
    each = HOLE // count
    entries = {
        f"{name.replace('#', str(i))}.weight": {
            "dtype": "F8_E4M3",
            "shape": [1, each],
            "data_offsets": [i * each, (i + 1) * each],
        }
        for i in range(count)
    }
    head = _header_file(dump_json(entries))
    config = sound_checkpoint().config | {"num_hidden_layers": layers}
    config["quantization_config"] |= quantization
    files: dict[str, Content] = {SINGLE: Sparse(head, len(head) + each * count, described=True)}
    return HostileFolder(files | {CONFIG: dump_json(config)})


HEAVY: Mapping[str, Callable[[int], HostileFolder]] = {
    "lists in a header": lambda size: _with_header(b'{"a":[' + _fill(size, b"[]") + b"]}"),
    "objects in a header": lambda size: _with_header(b'{"a":[' + _fill(size, b"{}") + b"]}"),
    "numbers in a header": lambda size: _with_header(b'{"a":[' + _fill(size, b"999") + b"]}"),
    "strings in a header": lambda size: _with_header(b'{"a":[' + _fill(size, b'"ab"') + b"]}"),
    "keys in a header": lambda size: _with_header(b'{"a":{' + _numbered(size, '"#":0') + b"}}"),
    "deep header": lambda size: _with_header(b'{"a":' + b"[" * (size // 2) + b"]" * (size // 2) + b"}"),
    "deep header, not closed": lambda size: _with_header(b'{"a":' * (size // 5)),
    "endless integer": lambda size: _with_header(b'{"a":' + b"9" * size + b"}"),
    "endless fraction": lambda size: _with_header(b'{"a":0.' + b"9" * size + b"}"),
    "endless shape": lambda size: _with_header(
        b'{"a":{"dtype":"U8","shape":[' + _fill(size, b"9223372036854775807") + b'],"data_offsets":[0,0]}}'
    ),
    "white space": lambda size: _with_header(b"{" + b" " * size + b"}"),
    "wide characters": lambda size: _with_header('{"__metadata__":{"😀":"'.encode() + b"a" * size + b'"}}'),
    "escapes": lambda size: _with_header(b'{"__metadata__":{"a":"' + b"\\n" * (size // 2) + b'"}}'),
    "surrogates": lambda size: _with_header(b'{"__metadata__":{"a":"' + b"\\ud83d\\ude00" * (size // 12) + b'"}}'),
    "metadata": lambda size: _with_header(b'{"__metadata__":{' + _numbered(size, '"#":"#"', 5) + b"}}"),
    "empty tensors": lambda size: _with_header(b"{" + _numbered(size, f'"#":{{{_EMPTY}}}') + b"}"),
    "tensors of a byte": lambda size: _with_header(
        b"{"
        + b",".join(
            b'"t%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(size // 60)
        )
        + b"}",
        bytes(size // 60),
    ),
    "tensors in a terabyte": _terabyte,
    "dots in a terabyte": lambda size: _terabyte(size, f"{_DOTS}#"),
    "layers of as many kinds": lambda size: _terabyte(size, "model.layers.#.mlp.x#", layers=1 << 30),
    "some dots in a terabyte": lambda size: _terabyte(size, "a." * 30 + "#", ignored_layers=["a" * 20, "b"]),
    "names of a thousand dots": lambda size: _with_header(
        b"{" + _numbered(size, f'"{_DOTS}#.weight":{{{_EMPTY_FP8}}}') + b"}"
    ),
    "weights without scales": lambda size: _with_header(b"{" + _numbered(size, f'"#.weight":{{{_EMPTY_FP8}}}') + b"}"),
    "foreign scales": lambda size: _with_header(
        b'{"a.weight":{' + _EMPTY_FP8.encode() + b"}," + _numbered(size, f'"#.input_scale":{{{_EMPTY}}}') + b"}"
    ),
    "index of absent tensors": lambda size: _index_file(
        b'{"weight_map":{' + _numbered(size, f'"#":"{TWO_FILES[0]}"') + b"}}"
    ),
    "index of absent files": lambda size: _index_file(
        b'{"weight_map":{' + _numbered(size, '"#":"#.safetensors"', 5) + b"}}"
    ),
    "index of lists": lambda size: _index_file(b'{"weight_map":[' + _fill(size, b"[]") + b"]}"),
    "index of wide characters": lambda size: _index_file('{"😀":"'.encode() + b"a" * size + b'","weight_map":{}}'),
    "two ignore lists": lambda size: _quantization_file(
        ignored_layers=_names(size // 2, "a#"), modules_to_not_convert=_names(size // 2, "b#")
    ),
    "a list of patterns": lambda size: _quantization_file(modules_to_not_convert=_names(size, "re:.*(a|b)*#.*_proj$")),
    "patterns and many modules": lambda size: _terabyte(
        size, "model.layers." * 9 + "#", modules_to_not_convert=["re:(.*s.*)*x", "*r" * 40, "re:.*[ab]$", "self_attn"]
    ),
    "one endless pattern": lambda size: _quantization_file(modules_to_not_convert=["re:" + "(a|b)*" * (size // 6)]),
    "config groups": lambda size: _quantization_file(
        quant_method="compressed-tensors", config_groups={name: {"targets": ["Linear"]} for name in _names(size, "g#")}
    ),
    "targets of a group": lambda size: _quantization_file(
        quant_method="compressed-tensors", config_groups={"g": {"targets": _names(size, "t#"), "weights": {}}}
    ),
    "unknown keys": lambda size: _quantization_file(**dict.fromkeys(_names(size, "k#"), 1)),
    "ignore lists and dots": lambda size: _with_header(
        b"{" + _numbered(size, f'"{_DOTS}#.weight":{{{_EMPTY_FP8}}}') + b"}",
        quantization_config=sound_checkpoint().config["quantization_config"] | {"ignored_layers": ["x"]},
    ),
    "long value in config": lambda size: _quantization_file(fmt="x" * size),
    "long list in config": lambda size: _quantization_file(scale_fmt=Raw(b"[" + _fill(size, b"[]") + b"]")),
    "long model type": lambda size: _config_file(size, model_type=Raw(b"[" + _fill(size, b"0") + b"]")),
    "lists in config": lambda size: _config_file(size, x=Raw(b"[" + _fill(size, b"[]") + b"]")),
    "deep config": lambda size: _config_file(size, x=Raw(b"[" * (size // 2) + b"]" * (size // 2))),
    "blocks as wide as can be": lambda size: _one_pair(max(1, size // 64), 64, BlockSize(1, 1 << 20)),
    "blocks as high as can be": lambda size: _one_pair(max(1, size // 64), 64, BlockSize(1 << 20, 1)),
    "blocks as large as can be": lambda size: _one_pair(max(1, size // 64), 64, BlockSize(1 << 20, 1 << 20)),
    "blocks of one": lambda size: _one_pair(max(1, size // 5 // 64), 64, BlockSize(1, 1)),
    "one wide FP8 row": lambda size: _one_pair(1, size, BlockSize(128, 128)),
    "one high FP8 column": lambda size: _one_pair(size // 5, 1, BlockSize(128, 128)),
    "one wide row": lambda size: _one_float(1, size // 2),
    "one high column": lambda size: _one_float(size // 2, 1),
    "one tensor that stays": lambda size: _one_float(size // 2, 1, "model.embed_tokens.weight"),
    "many files": _many_files,
}
"""Every one is refused or read within a second and four times its bytes."""
