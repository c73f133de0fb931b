"""The GPU that a launch goes to: whether it can, its line in the table of shapes, its multiprocessors."""

from __future__ import annotations

import functools

import torch

from qwen3_fp8_ascend.backends.gpu import missing_gpu
from qwen3_fp8_ascend.backends.triton_host import INTERPRETED, has_triton
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.triton_kernels.nvidia import shapes


@functools.cache
def unusable() -> str | None:
    """The reason why these kernels cannot run here, or None."""
    if not has_triton():
        return "triton is not installed"
    if INTERPRETED:
        return None
    if (missing := missing_gpu()) is not None:
        return missing
    try:
        chip_of(torch.device("cuda", torch.cuda.current_device()))
    except BlockFp8Error as error:
        return str(error).replace("\n", ";")
    return None


@functools.cache
def chip_of(device: torch.device) -> shapes.Chip:
    """The line of a device. Of several GPUs in a machine each has its own."""
    if device.type != "cuda":
        return shapes.INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return shapes.chip(10 * major + minor)


@functools.cache
def cores_of(device: torch.device) -> int:
    """Its multiprocessors."""
    return 4 if device.type != "cuda" else int(torch.cuda.get_device_properties(device).multi_processor_count)
