"""What both backends of Triton kernels ask before a launch: is Triton there, and can its kernels read a tensor."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import DEFAULT_BLOCK

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)


def has_triton() -> bool:
    """Whether the package is installed: a folder of that name on sys.path would be one too, but an empty one."""
    return importlib.util.find_spec("triton") is not None and importlib.util.find_spec("triton.language") is not None


def device_module(device_type: str) -> Any:
    """torch.cuda or torch.npu; the latter is there once torch_npu has been imported."""
    if device_type == "npu":
        importlib.import_module("torch_npu")
    return getattr(torch, device_type)


def check_operand(what: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Refuse what the kernels cannot read.

    Raises:
        BlockFp8Error: wrong dtype, device or number of dimensions, or as `check_current`.
    """
    if tensor.dtype not in dtypes:
        raise BlockFp8Error(f"{what} has the wrong dtype", expected=" or ".join(map(str, dtypes)), got=tensor.dtype)
    if tensor.device != device:
        raise BlockFp8Error(f"{what} is on the wrong device", expected=device, got=tensor.device)
    if tensor.dim() != 2:
        raise BlockFp8Error(f"{what} has two dimensions", got=tuple(tensor.shape))
    check_current(what, device)


def check_current(what: str, device: torch.device) -> None:
    """Refuse operands on another device than Triton launches on.

    Raises:
        BlockFp8Error: names both.
    """
    if device.type not in ("cuda", "npu"):
        return
    current = device_module(device.type).current_device()
    if device.index != current:
        raise BlockFp8Error(
            f"{what} is not on the current device, on which Triton launches",
            expected=f"{device.type}:{current}",
            got=device,
            fix=f"call it within torch.{device.type}.device({device.index})",
        )


def check_group(block_k: int) -> None:
    """Refuse to quantize in groups of another size than the kernels have.

    Raises:
        BlockFp8Error: names both sizes.
    """
    if block_k != DEFAULT_BLOCK.k:
        raise BlockFp8Error(
            "the Triton kernels quantize groups of one size",
            expected=DEFAULT_BLOCK.k,
            got=block_k,
            fix="choose the backend `cpu` or `reference`",
        )
