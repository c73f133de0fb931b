"""Which Ascend chip this is, and what that means for block FP8."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    """A family of chips that look alike to a kernel.

    names: prefixes of `torch_npu.npu.get_device_name()`. fp8_matmul: whether its matrix unit multiplies e4m3, with a
    stock operator for 128x128 scales.
    """

    name: str
    machines: str
    names: tuple[str, ...]
    fp8_matmul: bool


# A prefix that begins with another one stands before it.
GENERATIONS = (
    Generation("A5", "Ascend 950", ("Ascend950", "Ascend910_95"), fp8_matmul=True),
    Generation("A3", "Atlas A3 (910C)", ("Ascend910_93",), fp8_matmul=False),
    Generation("A2", "Atlas A2 (910B)", ("Ascend910B",), fp8_matmul=False),
)


def generation_of(name: str) -> Generation | None:
    """The generation of a chip by the name torch_npu gives it, None for one that block FP8 is not written for."""
    return next((g for g in GENERATIONS if name.startswith(g.names)), None)


_failures: list[Exception] = []
"""What the first import of torch_npu ended in. A second one ends in what the first left behind, which is no reason."""


@functools.cache
def device_name() -> str | None:
    """`torch_npu`'s name for the current NPU, None without torch_npu or without an NPU it can see.

    Raises:
        Exception: torch_npu is installed and does not load. The kind depends on what of CANN is missing: a plain
            Exception if ASCEND_HOME_PATH names no folder.
    """
    if importlib.util.find_spec("torch_npu") is None:
        return None
    if _failures:
        raise _failures[0]
    try:
        npu = importlib.import_module("torch_npu").npu
    except Exception as error:
        _failures.append(error)
        raise
    return npu.get_device_name() if npu.is_available() else None


def missing_npu() -> str | None:
    """Why no NPU can be used from this process, or None."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        name = device_name()
    except Exception as error:
        return "torch_npu does not load: " + " ".join(str(error).split())
    if name is None:
        return "torch_npu sees no NPU"
    if generation_of(name) is None:
        return f"this NPU is {name}, on which block FP8 has no path; there is one on {known_chips()}"
    return None


def known_chips() -> str:
    """The chips that block FP8 is written for, by the names torch_npu gives them."""
    return ", ".join(f"{g.machines} = {' or '.join(f'{name}*' for name in g.names)}" for g in reversed(GENERATIONS))


def chip_without_path() -> str | None:
    """The name of an NPU that can be used but that block FP8 is not written for, or None."""
    try:
        name = device_name()
    except Exception:
        return None
    return name if name is not None and generation_of(name) is None else None


def current_generation() -> Generation | None:
    """The generation of the NPU that this process uses, None without one that is supported."""
    if missing_npu() is not None:
        return None
    name = device_name()
    return generation_of(name) if name else None
