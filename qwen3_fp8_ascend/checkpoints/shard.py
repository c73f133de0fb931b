"""Read rows of tensors from safetensors files, and write a file tensor by tensor, without holding either in memory.

Plain reads and writes at byte positions instead of memory maps: a source that shrinks under a map kills the process.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from qwen3_fp8_ascend.checkpoints.anomaly import fault
from qwen3_fp8_ascend.checkpoints.header import DTYPE_BITS, LENGTH_BYTES, METADATA, TensorEntry
from qwen3_fp8_ascend.format import BlockSize

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""The dtypes that conversions compute with; every other one is copied as bytes."""

SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
COPY_BYTES = 4 << 20

TILE_ELEMENTS = 1 << 18
"""Weights converted at a time: enough to keep the cores busy, few enough to stay in cache and to cost no memory."""


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class Tile(NamedTuple):
    """Part of a matrix: `rows` x `columns` from `row` and `column` on."""

    row: int
    rows: int
    column: int
    columns: int

    def pieces(self, k: int, itemsize: int) -> Iterator[tuple[int, slice]]:
        """Where it lies in a matrix of k columns: offsets of contiguous bytes, and which of the tile's they are."""
        height = self.rows if self.columns == k else 1
        size = height * self.columns * itemsize
        for number in range(self.rows // height if size else 0):
            offset = ((self.row + number * height) * k + self.column) * itemsize
            yield offset, slice(number * size, (number + 1) * size)


def tiles(n: int, k: int, block: BlockSize, *, whole_blocks: bool) -> Iterator[Tile]:
    """Cover an (n, k) matrix by tiles of about `TILE_ELEMENTS` elements, each of several blocks or within one.

    `whole_blocks`: no tile is smaller than a block, however large that is. A matrix without elements has no tiles,
    however long its other side.
    """
    if not n * k:
        return
    width = TILE_ELEMENTS // min(n, block.n) if whole_blocks else TILE_ELEMENTS
    for column, columns in _spans(k, block.k, width, whole_blocks):
        for row, rows in _spans(n, block.n, max(1, TILE_ELEMENTS // columns), whole_blocks):
            yield Tile(row, rows, column, columns)


def _spans(size: int, unit: int, limit: int, whole_units: bool) -> Iterator[tuple[int, int]]:
    """Cut 0 to `size` into pieces of at most `limit`, each of whole units or within one: (start, length)."""
    step = min(max(1, limit // unit) * unit, size)
    inner = step if whole_units else min(step, limit)
    for start in range(0, size, step):
        end = min(start + step, size)
        for position in range(start, end, inner):
            yield position, min(inner, end - position)


class ShardReader:
    """Reads tensors of a folder's safetensors files; files are opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read_tile(self, tensor: TensorEntry, tile: Tile) -> torch.Tensor:
        """Part of a 2-D tensor.

        Shapes: -> (tile.rows, tile.columns) in the tensor's dtype.
        """
        dtype, k = TORCH_DTYPES[tensor.dtype], tensor.shape[1]
        if not tile.rows * tile.columns:
            return torch.empty(tile.rows, tile.columns, dtype=dtype)
        data = bytearray(tile.rows * tile.columns * dtype.itemsize)
        view = memoryview(data)
        for offset, piece in tile.pieces(k, dtype.itemsize):
            self._read_into(tensor, tensor.begin + offset, view[piece])
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(tile.rows, tile.columns)

    def chunks(self, tensor: TensorEntry) -> Iterator[bytearray]:
        """The tensor's bytes in pieces of bounded size."""
        for position in range(tensor.begin, tensor.end, COPY_BYTES):
            yield self._read(tensor, position, min(COPY_BYTES, tensor.end - position))

    def _read(self, tensor: TensorEntry, position: int, length: int) -> bytearray:
        data = bytearray(length)
        self._read_into(tensor, position, memoryview(data))
        return data

    def _read_into(self, tensor: TensorEntry, position: int, view: memoryview) -> None:
        if tensor.file not in self._descriptors:
            self._descriptors[tensor.file] = os.open(self._folder / tensor.file, os.O_RDONLY | os.O_CLOEXEC)
        done = 0
        while done < len(view):
            got = os.preadv(self._descriptors[tensor.file], [view[done:]], position + done)
            if got == 0:
                raise fault("the file shrank while it was read", file=tensor.file, tensor=tensor.name)
            done += got


class ShardWriter:
    """Writes one safetensors file whose tensors are known beforehand; each may be written piece by piece.

    The layout depends on the tensors only (widest dtype first, then by name, as safetensors itself does), so equal
    content makes equal bytes.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        text, self._begin, self.size = lay_out(tensors, metadata)
        self._unwritten = {tensor.name: tensor.nbytes for tensor in tensors}
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _reserve(self._descriptor, self.size)
            self._write(0, text)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                missing = sorted(name for name, left in self._unwritten.items() if left)
                if missing:
                    raise RuntimeError(f"tensors were not written completely: {missing[:3]}")
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, name: str, offset: int, data: torch.Tensor | bytearray) -> None:
        """Write a piece of a tensor at a byte offset within it."""
        piece = data.contiguous().view(torch.uint8).flatten().numpy().data if isinstance(data, torch.Tensor) else data
        self._write(self._begin[name] + offset, piece)
        self._unwritten[name] -= len(piece)

    def write_tile(self, name: str, k: int, tile: Tile, data: torch.Tensor) -> None:
        """Write part of a 2-D tensor with k columns."""
        view = data.contiguous().view(torch.uint8).flatten().numpy().data
        for offset, piece in tile.pieces(k, data.element_size()):
            self._write(self._begin[name] + offset, view[piece])
        self._unwritten[name] -= len(view)

    def _write(self, position: int, data: bytes | bytearray | memoryview) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], position + done)


def _reserve(descriptor: int, size: int) -> None:
    """Claim the space now, so that a full disk is found before the work is done."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot reserve
            raise


def lay_out(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The first bytes of a safetensors file (length and header), where each tensor begins, and the file's size."""
    entries: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    position = 0
    for tensor in sorted(tensors, key=lambda t: (-DTYPE_BITS[t.dtype], t.name)):
        end = position + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        offsets[tensor.name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data_begin = LENGTH_BYTES + len(text)
    begin = {name: data_begin + offset for name, offset in offsets.items()}
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, begin, data_begin + position
