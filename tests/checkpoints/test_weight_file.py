"""Headers are believed in nothing: every lie is a BlockFp8Error, and what is accepted means the same to others."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from qwen3_fp8_ascend.checkpoints import weight_file
from qwen3_fp8_ascend.checkpoints.weight_file import DTYPE_BITS, read_header
from qwen3_fp8_ascend.errors import BlockFp8Error
from tests.fuzz.format_judge import tensors_of
from tests.support.checkpoint_folders import raw_file, write_sparse
from tests.support.own_time import within

VALID = save(
    {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(5, 3, dtype=torch.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1),
        "model.norm.weight": torch.ones(7, dtype=torch.bfloat16),
        "empty": torch.ones(0, 4),
        "scalar": torch.tensor(3),
    },
    {"format": "pt"},
)


def parse(tmp_path: Path, content: bytes) -> Any:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return read_header(path)


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    header = parse(tmp_path, VALID)
    assert [t.name for t in header.tensors] == sorted(t.name for t in header.tensors)
    assert {t.name: (t.dtype, t.shape) for t in header.tensors} == tensors_of(tmp_path / "model.safetensors")
    assert (header.size, header.header_bytes) == (len(VALID), int.from_bytes(VALID[:8], "little"))


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_knows_every_dtype_of_the_format(tmp_path: Path, dtype: str) -> None:
    entry = {"dtype": dtype, "shape": [4, 8], "data_offsets": [0, 4 * DTYPE_BITS[dtype]]}
    (tensor,) = parse(tmp_path, raw_file({"a": entry}, 4 * DTYPE_BITS[dtype])).tensors
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (dtype, (4, 8), 4 * DTYPE_BITS[dtype])


def test_metadata_of_any_text_is_no_key(tmp_path: Path) -> None:
    """The check for keys that stand twice counts strings, whatever they hold."""
    texts = ['"', '\\"', "\\\\", '{"a": "\\"b\\""}', "é😀\n", "data_offsets", ""]
    metadata = {f"{i}{text}": text for i, text in enumerate(texts)}
    content = raw_file({"__metadata__": metadata, 'a"\\b': entry()}, 8)
    (tensor,) = parse(tmp_path, content).tensors
    assert tensor.name == 'a"\\b'
    parse(tmp_path, raw_file({"__metadata__": {}, "a": entry()}, 8))


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ENTRY = json.dumps(entry()).encode()
SPELLED = ENTRY.replace(b"dtype", b"d\\u0074ype")
TWICE = b'{"a":%b,"a":%b}'

LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too short"),
    "length only": (struct.pack("<Q", 2), "too short"),
    "length beyond the file": (raw_file({"a": entry()}, 8, length=10_000), "truncated within its header"),
    "length of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "no header length"),
    "length beyond the limit": (struct.pack("<Q", 100_000_001) + b"{}", "no header length"),
    "length zero": (struct.pack("<Q", 0) + b"{}", "no header length"),
    "torch.save under another name": (b"PK\x03\x04\0\0\0\0" + bytes(70_000_000), "pickles are never loaded"),
    "header of zeros": (struct.pack("<Q", 64) + b"{" + bytes(100), "zero bytes"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "not an object": (raw_file(b"[]", 0), "does not begin with"),
    "html": (raw_file(b"<html>not found</html>", 0), "does not begin with"),
    "not utf-8": (raw_file(b'{"\xff": 1}', 0), "not valid JSON"),
    "not json": (raw_file(b"{nonsense}", 0), "not valid JSON"),
    "garbage behind the object": (raw_file(b"{} {}", 0), "not valid JSON"),
    "deep nesting": (raw_file(b'{"a":' + b"[" * 5000, 0), "not valid JSON"),
    "nesting that is closed": (raw_file(b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", 0), "not valid JSON of the format"),
    "brackets only": (raw_file(b'{"a":[' + b"[]," * 99_999 + b"[]]}", 0), "far more memory"),
    "one character of four bytes": (raw_file('{"😀":"'.encode() + b"a" * 1_000_000 + b'"}', 0), "far more memory"),
    "endless integer": (raw_file(b'{"a":' + b"9" * 100_000 + b"}", 0), "not valid JSON"),
    "duplicate tensor": (raw_file(TWICE % (ENTRY, ENTRY), 8), "key twice"),
    "duplicate tensor, spelled otherwise": (
        raw_file(TWICE % (ENTRY.replace(b"dtype", b"d\\u0074ype"), ENTRY), 8),
        "key twice",
    ),
    "duplicate key of an entry": (raw_file(b'{"a":{"dtype":"F32",' + ENTRY[1:] + b"}", 8), "duplicate field"),
    "duplicate metadata": (raw_file(b'{"__metadata__":{"a":"","a":""}}', 0), "key twice"),
    "metadata null": (raw_file(b'{"__metadata__":null}', 0), "key twice"),
    "too many elements": (raw_file(b'{"a":[' + b"0," * (1 << 20) + b"0,0]}", 0), "more elements"),
    "metadata with half a surrogate pair": (
        raw_file(b'{"__metadata__": {"a": "\\ud800"}}', 0),
        "not valid JSON of the format",
    ),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}}, 0), "expected a string"),
    "entry no object": (raw_file({"a": 7}, 0), "expected struct"),
    "entry lacks a key": (raw_file({"a": {"dtype": "F32", "shape": []}}, 0), "missing field"),
    "entry has one more key": (raw_file({"a": entry() | {"x": 1}}, 8), "not the format's"),
    "empty name": (raw_file({"": entry()}, 8), "name"),
    "escape sequence in a name": (raw_file({"\x1b[31mred": entry()}, 8), "unprintable"),
    "lone surrogate in a name": (raw_file(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", 8), "hex escape"),
    "endless name": (raw_file({"a" * 5000: entry()}, 8), "too long"),
    "name of a thousand dots": (raw_file({"a." * 200: entry()}, 8), "too long"),
    "unknown dtype": (raw_file({"a": entry("F8_E4M4")}, 8), "dtype"),
    "dtype a list": (raw_file({"a": entry(["F32"])}, 8), "not valid JSON of the format"),
    "shape negative": (raw_file({"a": entry(shape=(-2, -1))}, 8), "expected usize"),
    "shape float": (raw_file({"a": entry(shape=(2.0,))}, 8), "expected usize"),
    "shape bool": (raw_file({"a": entry("U8", (True,), (0, 1))}, 1), "expected usize"),
    "shape a string": (raw_file({"a": entry(shape="2")}, 8), "expected a sequence"),
    "rank absurd": (raw_file({"a": entry("U8", [1] * 100, (0, 1))}, 1), "shape"),
    "shape product of 2^4000": (raw_file({"a": entry(shape=[(1 << 63) - 1] * 64)}, 8), "larger than any memory"),
    "overflow behind a zero": (raw_file({"a": entry("U8", [0, 1 << 62, 8], (0, 0))}, 0), "larger than any memory"),
    "overflow before a zero": (raw_file({"a": entry("U8", [1 << 62, 8, 0], (0, 0))}, 0), "larger than any memory"),
    "offsets reversed": (raw_file({"a": entry(offsets=(8, 0))}, 8), "invalid offset"),
    "offsets negative": (raw_file({"a": entry(offsets=(-8, 0))}, 8), "expected usize"),
    "offsets three": (raw_file({"a": entry(offsets=(0, 4, 8))}, 8), "expected 2 elements"),
    "offsets null": (raw_file({"a": entry(offsets=None)}, 8), "a tuple of size 2"),
    "bytes do not fit the shape": (raw_file({"a": entry(shape=(3,))}, 8), "does not fit"),
    "half a byte": (raw_file({"a": entry("F4", (3,), (0, 2))}, 2), "does not fit"),
    "overlap": (raw_file({"a": entry(), "b": entry(offsets=(4, 12))}, 12), "overlap"),
    "the same bytes twice": (raw_file({"a": entry(), "b": entry()}, 8), "overlap"),
    "hole at the beginning": (raw_file({"a": entry(offsets=(4, 12))}, 12), "belong to no tensor"),
    "hole in the middle": (raw_file({"a": entry(), "b": entry(offsets=(12, 20))}, 20), "belong to no tensor"),
    "truncated data": (raw_file({"a": entry()}, 7), "truncated"),
    "tensor far beyond the file": (raw_file({"a": entry("U8", (1 << 60,), (0, 1 << 60))}, 8), "truncated"),
    "trailing bytes": (raw_file({"a": entry()}, 9), "trailing"),
}


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_named(tmp_path: Path, lie: str) -> None:
    content, words = LIES[lie]
    with within(1), pytest.raises(BlockFp8Error) as caught:
        parse(tmp_path, content)
    assert words in str(caught.value)
    assert "model.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 2000
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)


def test_a_truncated_file_says_how_long_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(BlockFp8Error, match="truncated") as caught:
        parse(tmp_path, VALID[:-1])
    assert f"expected: {len(VALID)} bytes\n  got: {len(VALID) - 1} bytes" in str(caught.value)
    assert "download the file again" in str(caught.value)


def test_special_files_do_not_hang(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "blob")
    for name, words in (("pipe", "regular"), ("folder", "regular"), ("zero", "regular"), ("dangling", "leads nowhere")):
        with pytest.raises(BlockFp8Error, match=words):
            read_header(tmp_path / f"{name}.safetensors")
    with pytest.raises(BlockFp8Error, match="cannot be read"):
        read_header(tmp_path / "absent.safetensors")


def test_a_symlink_to_a_blob_is_fine(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(VALID)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    assert read_header(tmp_path / "model.safetensors").file == "model.safetensors"


def test_a_file_of_a_terabyte_is_read_by_its_header(tmp_path: Path) -> None:
    try:
        size = write_sparse(tmp_path / "model.safetensors", {"a": ("F32", (1 << 38,))})
    except OSError as error:
        pytest.skip(f"this file system cannot hold a sparse terabyte: {error}")
    assert read_header(tmp_path / "model.safetensors").size == size


def test_a_header_in_a_hole_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000) + b"{")
        file.truncate(1 << 30)
    tracemalloc.start()
    with pytest.raises(BlockFp8Error, match="zero bytes"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def agrees_with_the_format(path: Path) -> None:
    """A file is refused with our error, or another reading of the format finds the same names, dtypes and shapes."""
    try:
        with within(1):
            header = read_header(path)
    except BlockFp8Error as error:
        assert all(line.isprintable() for line in str(error).split("\n"))
        return
    assert {t.name: (t.dtype, t.shape) for t in header.tensors} == tensors_of(path)


FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.data())
def test_mutated_bytes_never_surprise(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        if kind == "flip" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 64))]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        else:
            content[at:at] = content[at : at + data.draw(st.integers(1, 64))]
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(content))
    agrees_with_the_format(path)


NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, 0.5, 1e400, None, True, "8", [], {}]),
)


@FUZZ
@given(st.data())
def test_lying_headers_never_surprise(tmp_path: Path, data: st.DataObject) -> None:
    names = st.sampled_from(["a", "b", "model.layers.0.mlp.up_proj.weight", "__metadata__", "", "\x00", "é", "\ud800"])
    value = st.one_of(
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*DTYPE_BITS, "F7", "", None, 3]),
                "shape": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=4)),
                "data_offsets": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3)),
            }
        ),
        NUMBERS,
    )
    header = data.draw(st.dictionaries(names, value, max_size=4))
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(text, data.draw(st.integers(0, 64))))
    agrees_with_the_format(path)


def test_an_older_library_reads_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 0.8 it knows no `backend` and has shorter words for what is wrong."""

    def before_0_8(path: Path, *, framework: str) -> Any:
        if path.name == "bad.safetensors":
            raise weight_file.SafetensorError('Error while deserializing header: InvalidOffset("a")')
        return safe_open(path, framework=framework)

    safe_open = weight_file.safe_open
    monkeypatch.setattr(weight_file, "safe_open", before_0_8)
    assert len(parse(tmp_path, VALID).tensors) == 5
    (tmp_path / "bad.safetensors").write_bytes(VALID)
    with pytest.raises(BlockFp8Error, match="overlap"):
        read_header(tmp_path / "bad.safetensors")
