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

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""The dtypes that conversions compute with; every other one is copied as bytes."""

SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
COPY_BYTES = 16 << 20


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


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

    def read_rows(self, tensor: TensorEntry, start: int, rows: int) -> torch.Tensor:
        """Rows `start` to `start + rows` of a 2-D tensor.

        Shapes: -> (rows, k) in the tensor's dtype.
        """
        dtype, k = TORCH_DTYPES[tensor.dtype], tensor.shape[1]
        if not rows * k:
            return torch.empty(rows, k, dtype=dtype)
        row_bytes = k * dtype.itemsize
        data = self._read(tensor, tensor.begin + start * row_bytes, rows * row_bytes)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(rows, k)

    def chunks(self, tensor: TensorEntry) -> Iterator[bytearray]:
        """The tensor's bytes in pieces of bounded size."""
        for position in range(tensor.begin, tensor.end, COPY_BYTES):
            yield self._read(tensor, position, min(COPY_BYTES, tensor.end - position))

    def _read(self, tensor: TensorEntry, position: int, length: int) -> bytearray:
        if tensor.file not in self._descriptors:
            self._descriptors[tensor.file] = os.open(self._folder / tensor.file, os.O_RDONLY | os.O_CLOEXEC)
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length:
            got = os.preadv(self._descriptors[tensor.file], [view[done:]], position + done)
            if got == 0:
                raise fault("the file shrank while it was read", file=tensor.file, tensor=tensor.name)
            done += got
        return data


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
