"""The device that tests of public operations run on: `pytest --device npu`, else the CPU."""

from __future__ import annotations

import pytest

from qwen3_fp8_ascend.backends import available_backends
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.testing.devices import Device, open_device

_chosen: list[Device] = []


def choose(kind: str) -> None:
    """Called once, before tests are collected.

    Raises:
        pytest.UsageError: there is no such device.
    """
    try:
        _chosen[:] = [open_device(kind)]
    except BlockFp8Error as error:
        raise pytest.UsageError(str(error)) from error


def device() -> Device:
    """The chosen one."""
    return _chosen[0] if _chosen else open_device("cpu")


def backends() -> list[object]:
    """Parameters: each backend for the device, skipped with its reason where it cannot run."""
    return [
        pytest.param(s.name, marks=pytest.mark.skipif(not s.usable, reason=f"{s.name}: {s.reason}"))
        for s in available_backends()
        if device().place.type in s.device_types
    ]
