"""Tensors out of safetensors files and into them, by the safetensors library."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qwen3_fp8_ascend.checkpoints.anomaly import fault
from qwen3_fp8_ascend.checkpoints.weight_file import TensorEntry, open_file
from qwen3_fp8_ascend.errors import printable

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What a weight can be dequantized to, and quantized from."""

FILE_METADATA = {"format": "pt"}
OS_ERROR = re.compile(r"\(os error (\d+)\)")


class WeightReader:
    """Reads tensors of a folder's weight files, each whole; files are opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, safe_open] = {}
        self._open = ExitStack()

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._files.clear()
        self._open.close()

    def read(self, tensor: TensorEntry) -> torch.Tensor:
        """A tensor in its own dtype and shape.

        Raises:
            BlockFp8Error: the file changed since its header was read, memory does not suffice, or torch has no such
                dtype.
        """
        try:
            if tensor.file not in self._files:
                handle = open_file(self._folder / tensor.file, "pt")
                self._files[tensor.file] = self._open.enter_context(handle)
            found: torch.Tensor = self._files[tensor.file].get_tensor(tensor.name)
        except MemoryError:
            raise fault(
                "a tensor does not fit into memory",
                file=tensor.file,
                tensor=tensor.name,
                got=f"{tensor.nbytes} bytes",
                fix="use a machine with more memory, or split the checkpoint into more files",
            ) from None
        except (SafetensorError, RuntimeError, OSError) as error:
            changed = isinstance(error, SafetensorError) and "Dtype not understood" not in str(error)
            raise fault(
                "the file shrank or was changed while it was read" if changed else "a tensor cannot be read",
                file=tensor.file,
                tensor=tensor.name,
                expected=f"{tensor.dtype} {list(tensor.shape)}",
                got=printable(str(error), 200),
            ) from None
        if tuple(found.shape) != tensor.shape:
            raise fault("the file shrank or was changed while it was read", file=tensor.file, tensor=tensor.name)
        return found


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], mode: int) -> None:
    """Write a safetensors file with those permissions, and wait until it is on the disk.

    The layout depends on the tensors only (widest dtype first, then by name), so equal content makes equal bytes.

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        save_file(dict(tensors), path, FILE_METADATA)
    except SafetensorError as error:
        code = OS_ERROR.search(str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    with path.open("rb") as file:
        os.fchmod(file.fileno(), mode)  # the library makes files private
        os.fsync(file.fileno())
