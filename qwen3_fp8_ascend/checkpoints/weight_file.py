"""The header of a safetensors file, read by the safetensors library; refusals become our errors.

The library checks that the header is the format's and that the tensors cover the file without holes or overlaps. Here
stands what it leaves open: how much memory a header may take, keys that stand twice, and names and shapes that no
model has.

Source: https://huggingface.co/docs/safetensors (format): 8 bytes little-endian header length, a JSON object
``{name: {"dtype", "shape", "data_offsets"}}`` with an optional ``__metadata__`` of strings, then the data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from safetensors import SafetensorError, safe_open

from qwen3_fp8_ascend.checkpoints.anomaly import CheckpointError, fault
from qwen3_fp8_ascend.checkpoints.strict_json import DAMAGED, check_memory, regular_size
from qwen3_fp8_ascend.errors import describe, printable

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
"""Every dtype of the format, with its size."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_BITS = (1 << 64) - 1
"""torch makes strides of sizes in 64 bits, also where another size is 0; the library looks at their product only."""

MAX_RANK = 64
MAX_NAME = 512
MAX_PARTS = 32
"""Of a tensor's name, between dots; an ignore list is looked up once for each."""

PIECE_BYTES = 1 << 18
METADATA = "__metadata__"
LENGTH_BYTES = 8
STRINGS_OF_A_TENSOR = 5
"""Its name, three keys, and the dtype."""

DATA_END = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,19})\s*\]')
DOWNLOAD_AGAIN = "the download is incomplete; download the file again"

REFUSALS = (
    (r"unknown variant", "a tensor's dtype is none of the format's"),
    (r"invalid offset|InvalidOffset", "two tensors overlap in the file, or bytes before a tensor belong to no tensor"),
    (r"invalid shape|TensorInvalidInfo|subbytes", "a tensor's data range does not fit its dtype and shape"),
    (r"overflow|ValidationOverflow", "a tensor's shape is larger than any memory"),
    (r"invalid JSON|InvalidHeaderDeserialization", "the safetensors header is not valid JSON of the format"),
    (r"invalid UTF-8|InvalidHeader", "the safetensors header is not valid JSON: it is no text"),
)
"""The library's words, those of 0.8 and those before, and what they say of a file; the first that fits counts."""

UNCOVERED = re.compile("not fully covered|MetadataIncompleteBuffer")


class TensorEntry(NamedTuple):
    """One tensor of a file; a checkpoint has up to 200,000, so they are made in the fastest way."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What a safetensors file holds; `tensors` is sorted by name."""

    file: str
    size: int
    header_bytes: int
    tensors: tuple[TensorEntry, ...]


def read_header(path: Path) -> FileHeader:
    """Read and check a safetensors file's header; the data is not touched.

    Raises:
        BlockFp8Error: the file is unreadable, truncated or has trailing bytes, the header is not the format's, a
            dtype is unknown, a shape is not made of non-negative integers, or the data ranges do not fit the
            shapes, overlap, or leave holes. The message names the file, and the tensor where the library does.
    """
    size = regular_size(path)
    text = _read_text(path, size)
    check_memory(text, path.name, "the safetensors header", size)
    try:
        with open_file(path, "np") as file:
            tensors = tuple(_entry(name, file, path.name) for name in sorted(file.keys()))
            metadata = file.metadata()
    except SafetensorError as error:
        raise _explain(error, path.name, size, text) from None
    except MemoryError:  # the library maps a file to read its header
        raise fault(
            "the file is larger than the address space that this process may use", file=path.name, got=f"{size} bytes"
        ) from None
    except OSError as error:
        raise fault("the file cannot be read", file=path.name, got=error.strerror or error) from None
    _check_keys(text, len(tensors), metadata, path.name)
    return FileHeader(path.name, size, len(text), tensors)


def open_file(path: Path, framework: str) -> safe_open:
    """Open a file with the library, which then reads tensors by pread(2), if it can (0.8).

    A file that shrinks under a memory map, the library's other way, kills the process.
    """
    try:
        return safe_open(path, framework=framework, backend="pread")
    except TypeError:
        return safe_open(path, framework=framework)


def _read_text(path: Path, size: int) -> bytes:
    """The header's JSON text."""
    try:
        with path.open("rb") as file:
            prefix = file.read(LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < LENGTH_BYTES or size < LENGTH_BYTES + 2:
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
            if length > size - LENGTH_BYTES:
                raise fault(
                    "the file is truncated within its header",
                    file=path.name,
                    expected=f"at least {LENGTH_BYTES + length} bytes",
                    got=f"{size} bytes",
                    fix=DOWNLOAD_AGAIN,
                )
            text = _read_object(file, length, path.name)
    except OSError as error:
        raise fault("the file cannot be read", file=path.name, got=error.strerror) from None
    if not text.startswith(b"{"):
        raise fault(
            "this is not a safetensors file: its header does not begin with '{'",
            file=path.name,
            got=repr(text[:8]),
            fix=_hint(prefix) or DAMAGED,
        )
    return text


def _read_object(file: BinaryIO, length: int, name: str) -> bytes:
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


def _explain(error: SafetensorError, file: str, size: int, text: bytes) -> CheckpointError:
    """The library's refusal as our error; it does not say how long the file should be, so that is read here."""
    words = str(error).removeprefix("Error while deserializing header: ")
    expected = LENGTH_BYTES + len(text) + max((int(match[1]) for match in DATA_END.finditer(text)), default=0)
    if UNCOVERED.search(words) and size != expected:
        short = size < expected
        return fault(
            "the file is truncated" if short else "the file has trailing bytes that belong to no tensor",
            file=file,
            expected=f"{expected} bytes",
            got=f"{size} bytes",
            fix=DOWNLOAD_AGAIN if short else DAMAGED,
        )
    what = next((what for part, what in REFUSALS if re.search(part, words)), "the safetensors library refuses the file")
    return fault(what, file=file, got=printable(words, 300), fix=DAMAGED)


def _entry(name: str, file: safe_open, file_name: str) -> TensorEntry:
    if not is_tensor_name(name):
        raise fault(
            "a tensor's name is empty, too long, or has unprintable characters", file=file_name, got=ascii(name[:100])
        )
    found = file.get_slice(name)
    dtype, shape = found.get_dtype(), tuple(found.get_shape())
    if dtype not in DTYPE_BITS:
        raise fault("a tensor's dtype is not known here", file=file_name, tensor=name, got=printable(dtype, 80))
    if len(shape) > MAX_RANK:
        raise fault(
            "a tensor's shape has more sizes than any tensor can have",
            file=file_name,
            tensor=name,
            expected=f"at most {MAX_RANK}",
            got=len(shape),
            fix=DAMAGED,
        )
    if 0 in shape and math.prod(size or 1 for size in shape) * DTYPE_BITS[dtype] > MAX_BITS:
        raise fault(
            "a tensor's shape is larger than any memory",
            file=file_name,
            tensor=name,
            expected="sizes, apart from zeros, whose product can be counted",
            got=describe(list(shape)),
            fix=DAMAGED,
        )
    return TensorEntry(name, dtype, shape, file_name)


def _check_keys(text: bytes, tensors: int, metadata: Mapping[str, str] | None, file: str) -> None:
    """Refuse keys that stand twice, of which the library keeps the last, and those that it passes over.

    Either makes more strings in the header than its tensors and metadata account for.
    """
    expected = STRINGS_OF_A_TENSOR * tensors + (0 if metadata is None else 1 + 2 * len(metadata))
    found = text.replace(rb"\\", b"").replace(rb"\"", b"").count(b'"') // 2
    if found != expected:
        raise fault(
            "the header has a key twice, or keys that are not the format's",
            file=file,
            expected=f"{expected} strings for {tensors} tensors and their metadata",
            got=f"{found} strings",
            fix=DAMAGED,
        )


def is_plain_text(name: str) -> bool:
    """Whether a name can be shown in a terminal and kept in a table as it is."""
    return 0 < len(name) <= MAX_NAME and name.isprintable()


def is_tensor_name(name: str) -> bool:
    """Whether a tensor of a model may be called so."""
    return is_plain_text(name) and name.count(".") < MAX_PARTS
