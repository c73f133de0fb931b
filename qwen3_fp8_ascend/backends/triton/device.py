"""The device that Triton launches on: which one it is, its configuration and its cores."""

from __future__ import annotations

import functools
from typing import Any

import torch

from qwen3_fp8_ascend.backends import soc
from qwen3_fp8_ascend.backends.triton_host import INTERPRETED, device_module, has_triton
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.triton_kernels.configuration import (
    INTERPRETER,
    Architecture,
    architecture,
)


@functools.cache
def unusable() -> str | None:
    if not has_triton():
        return "triton is not installed (triton-ascend on an NPU)"
    if INTERPRETED:
        return None
    try:
        chip_of(current_device_type())
    except BlockFp8Error as error:
        return str(error).replace("\n", ";")
    return None


def current_device_type() -> str:
    """The device that torch sees, of those that Triton compiles for.

    Raises:
        BlockFp8Error: it sees none, or torch_npu does not load.
    """
    if INTERPRETED:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if (missing := soc.missing_npu()) is None:
        return "npu"
    raise BlockFp8Error("torch sees no NVIDIA GPU, and no NPU can be used", got=missing)


@functools.cache
def chip_of(device_type: str) -> Architecture:
    if device_type == "cpu":
        return INTERPRETER
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return architecture(f"cuda:{major}{minor}")
    return architecture(device_module(device_type).get_device_name())


@functools.cache
def cores_of(device_type: str, index: int | None) -> tuple[int, int]:
    """How many programs the persistent grids of cube and of vector kernels have: one per core."""
    if device_type == "cpu":
        return 2, 2
    if device_type == "cuda":
        count = torch.cuda.get_device_properties(index).multi_processor_count
        return count, 4 * count
    from triton.runtime.driver import driver

    properties = driver.active.utils.get_device_properties(index)
    return properties["num_aicore"], properties["num_vectorcore"]


def linear_options(chip: Architecture, device_type: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(chip.linear_options)
    if device_type == "npu":
        options["enable_auto_bind_sub_block"] = chip.bind_sub_block
    return options
