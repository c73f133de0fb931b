"""Read the header of a safetensors file, and nothing else of it; believe nothing that it says.

Source: https://huggingface.co/docs/safetensors (format): 8 bytes little-endian header length, a JSON object
``{name: {"dtype", "shape", "data_offsets"}}`` with an optional ``__metadata__`` of strings, then the data, which the
tensors cover without holes or overlaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from qwen3_fp8_ascend.checkpoints.anomaly import fault
from qwen3_fp8_ascend.checkpoints.strict_json import DAMAGED, parse_object, regular_size
from qwen3_fp8_ascend.errors import describe

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Every dtype of the format, with its size."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_BITS = (1 << 64) - 1
"""safetensors multiplies sizes in 64 bits and torch makes strides of them, both also where another size is 0."""

MAX_RANK = 64
MAX_NAME = 512
MAX_PARTS = 32
"""Of a tensor's name, between dots; an ignore list is looked up once for each."""

PIECE_BYTES = 1 << 18
METADATA = "__metadata__"
LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; `begin` and `end` are byte positions in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What a safetensors file holds; `tensors` is sorted by name."""

    file: str
    size: int
    header_bytes: int
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]


def read_header(path: Path) -> FileHeader:
    """Read and check a safetensors file's header; the data is not touched.

    Raises:
        BlockFp8Error: the file is unreadable, truncated or has trailing bytes, the header is not the format's, a
            dtype is unknown, a shape is not made of non-negative integers, or the data ranges do not fit the
            shapes, overlap, or leave holes. The message names file and tensor.
    """
    size = regular_size(path)
    text = _read_header_text(path, size)
    document = parse_object(text, path.name, "the safetensors header", size)
    metadata = _check_metadata(document.pop(METADATA, {}), path.name)
    data_begin = LENGTH_BYTES + len(text)
    tensors = [_parse_entry(name, entry, path.name, data_begin) for name, entry in document.items()]
    _check_coverage(tensors, path.name, data_begin, size)
    return FileHeader(path.name, size, len(text), tuple(sorted(tensors, key=lambda t: t.name)), metadata)


def _read_header_text(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            prefix = file.read(LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            available = size - LENGTH_BYTES
            if len(prefix) < LENGTH_BYTES or available < 2:
                raise fault(
                    "the file is too short to be a safetensors file", file=path.name, got=f"{size} bytes", fix=DAMAGED
                )
            if length > MAX_HEADER_BYTES or length < 2:
                raise fault(
                    "this is not a safetensors file: its first 8 bytes are no header length",
                    file=path.name,
                    expected=f"2 to {MAX_HEADER_BYTES}",
                    got=length,
                    fix=_hint(prefix) or DAMAGED,
                )
            if length > available:
                raise fault(
                    "the file is truncated within its header",
                    file=path.name,
                    expected=f"at least {LENGTH_BYTES + length} bytes",
                    got=f"{size} bytes",
                    fix="the download is incomplete; download the file again",
                )
            text = _read_text(file, length, path.name)
    except OSError as error:
        raise fault("the file cannot be read", file=path.name, got=error.strerror) from None
    if not text.startswith(b"{"):
        raise fault(
            "this is not a safetensors file: its header does not begin with '{'",
            file=path.name,
            got=repr(text[:8]),
            fix=_hint(prefix) or DAMAGED,
        )
    if len(text) != length:
        raise fault("the file shrank while it was read", file=path.name, expected=length, got=len(text))
    return text


def _read_text(file: BinaryIO, length: int, name: str) -> bytes:
    """Read an object's JSON text piece by piece, so that a hole or what is no object costs one of them."""
    pieces: list[bytes] = []
    while length and (piece := file.read(min(length, PIECE_BYTES))):
        if not pieces and not piece.startswith(b"{"):
            return piece
        if b"\0" in piece:
            raise fault(
                "the header holds zero bytes, as files do whose download was not finished",
                file=name,
                fix="download the file again",
            )
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def _hint(prefix: bytes) -> str | None:
    if prefix == b"version ":
        return "this is a Git LFS pointer, not the file itself; run `git lfs pull`"
    if prefix.startswith(b"PK\3\4"):
        return "this is a zip archive, as torch.save writes them, under another name; pickles are never loaded"
    return None


def _check_metadata(metadata: Any, file: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fault(f"{METADATA} is not an object of strings", file=file, fix=DAMAGED)
    try:
        for text in chain(metadata.keys(), metadata.values()):
            text.encode()
    except UnicodeEncodeError:
        raise fault(f"{METADATA} has half a surrogate pair, which is no text", file=file, fix=DAMAGED) from None
    return metadata


def _parse_entry(name: str, entry: Any, file: str, data_begin: int) -> TensorEntry:
    if not is_tensor_name(name):
        raise fault(
            "a tensor's name is empty, too long, or has unprintable characters", file=file, got=ascii(name[:100])
        )
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fault(
            "the header's entry of a tensor has other keys than the format's",
            file=file,
            tensor=name,
            expected="dtype, shape, data_offsets",
            got=_keys(entry),
            fix=DAMAGED,
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fault(
            "a tensor's dtype is none of the format's",
            file=file,
            tensor=name,
            expected=", ".join(DTYPE_BITS),
            got=describe(dtype, 80),
        )
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(size) for size in shape):
        raise fault(
            "a tensor's shape is not a list of non-negative integers",
            file=file,
            tensor=name,
            got=describe(shape),
            fix=DAMAGED,
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise fault(
            "a tensor's data_offsets are not two non-negative integers",
            file=file,
            tensor=name,
            got=describe(offsets),
            fix=DAMAGED,
        )
    begin, end = offsets
    if math.prod(size or 1 for size in shape) * DTYPE_BITS[dtype] > MAX_BITS:
        raise fault(
            "a tensor's shape is larger than any memory",
            file=file,
            tensor=name,
            expected="sizes, apart from zeros, whose product can be counted",
            got=describe(shape),
            fix=DAMAGED,
        )
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if begin > end or bits != 8 * (end - begin):
        raise fault(
            "a tensor's data range does not fit its dtype and shape",
            file=file,
            tensor=name,
            expected=f"{bits} bits ({dtype} {shape})"[:200],
            got=f"{8 * (end - begin)} bits (offsets {begin} to {end})",
            fix=DAMAGED,
        )
    return TensorEntry(name, dtype, tuple(shape), file, data_begin + begin, data_begin + end)


def _check_coverage(tensors: list[TensorEntry], file: str, data_begin: int, size: int) -> None:
    position = data_begin
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
        if tensor.begin != position:
            overlap = tensor.begin < position
            raise fault(
                "two tensors overlap in the file" if overlap else "bytes before a tensor belong to no tensor",
                file=file,
                tensor=tensor.name,
                expected=f"offset {position - data_begin}",
                got=f"offset {tensor.begin - data_begin}",
                fix=DAMAGED,
            )
        position = tensor.end
    if position > size:
        raise fault(
            "the file is truncated",
            file=file,
            tensor=next(t.name for t in tensors if t.end > size),
            expected=f"{position} bytes",
            got=f"{size} bytes",
            fix="the download is incomplete; download the file again",
        )
    if position < size:
        raise fault(
            "the file has trailing bytes that belong to no tensor",
            file=file,
            expected=f"{position} bytes",
            got=f"{size} bytes",
            fix=DAMAGED,
        )


def is_plain_text(name: str) -> bool:
    """Whether a name can be shown in a terminal and kept in a table as it is."""
    return 0 < len(name) <= MAX_NAME and name.isprintable()


def is_tensor_name(name: str) -> bool:
    """Whether a tensor of a model may be called so."""
    return is_plain_text(name) and name.count(".") < MAX_PARTS


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _keys(entry: Any) -> str:
    return ascii([key[:40] for key in list(entry)[:8]]) if isinstance(entry, dict) else type(entry).__name__
