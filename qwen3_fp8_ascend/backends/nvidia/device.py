"""The GPU that a launch goes to: whether it can, its line in the table of shapes, its multiprocessors."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.triton_kernels.nvidia import shapes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unusable() -> str | None:
    """The reason why these kernels cannot run here, or None."""
    # A folder that happens to be called `triton` on sys.path is a package too, but an empty one.
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.language") is None:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no NVIDIA GPU"
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


def check_current(what: str, device: torch.device) -> None:
    """Refuse operands on another device than Triton launches on.

    Raises:
        BlockFp8Error: names both.
    """
    if device.type == "cuda" and device.index != (current := torch.cuda.current_device()):
        raise BlockFp8Error(
            f"{what} is not on the current device, on which Triton launches",
            expected=f"cuda:{current}",
            got=device,
            fix=f"call it within torch.cuda.device({device.index})",
        )
