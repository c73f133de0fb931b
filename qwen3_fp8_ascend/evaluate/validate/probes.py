"""What a device's arithmetic does, and how long it takes to answer: facts beside which its verdicts are read."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qwen3_fp8_ascend.evaluate.validate.cases import Case, Context, Found
from qwen3_fp8_ascend.testing.devices import Device
from qwen3_fp8_ascend.testing.timing import cache_bytes

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CALLS = 200


def probes(context: Context) -> Iterator[Case]:
    """All of them; none can fail but by an error."""
    for probe in (subnormals, division, nans, finite_codes, latency, copy_bandwidth):
        run = functools.partial(_measure, probe, context.device)
        yield Case(probe.__name__, run, 3 * cache_bytes(context.device) if probe is copy_bandwidth else 0)


def _measure(probe: Callable[[Device, torch.Generator], dict[str, Any]], device: Device, seed: int) -> Found:
    return Found(values=probe(device, torch.Generator().manual_seed(seed)))


def subnormals(device: Device, generator: torch.Generator) -> dict[str, Any]:
    """Whether they come out of the vector unit and of the matrix unit, by dtype."""
    found = {}
    for dtype in FLOATS:
        smallest = torch.finfo(dtype).smallest_normal
        small = torch.full((32, 32), smallest, dtype=dtype, device=device.place)
        halved = (small * 0.5).cpu().double()
        identity = torch.eye(32, dtype=dtype, device=device.place)
        through = ((small * 0.5) @ identity).cpu().double() if halved.any() else halved
        name = str(dtype).removeprefix("torch.")
        found[f"{name}, vector unit"] = "kept" if (halved == smallest / 2).all() else "lost"
        found[f"{name}, matrix unit"] = "kept" if (through == smallest / 2).all() else "lost"
    return found


def division(device: Device, generator: torch.Generator) -> dict[str, Any]:
    """Quotients of a million random fp32 pairs that are correctly rounded."""
    a, b = (torch.randn(1 << 20, generator=generator) * 2.0**8 for _ in range(2))
    exact = (a.double() / b.double()).float()
    right = ((a.to(device.place) / b.to(device.place)).cpu() == exact).double().mean()
    return {"fp32 quotients that are correctly rounded": float(right)}


def nans(device: Device, generator: torch.Generator) -> dict[str, Any]:
    """The bits of the NaN that the device makes, and whether a NaN of any payload wins in a maximum."""
    zero = torch.zeros(1, device=device.place)
    infinity = torch.full((1,), float("inf"), device=device.place)
    payloads = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7FF80000], dtype=torch.int32).view(torch.float32)
    among = torch.ones(4, 256)
    among[:, 77] = payloads
    largest = among.to(device.place).abs().amax(1).cpu()

    def bits(value: torch.Tensor) -> str:
        return f"{int(value.cpu().view(torch.int32)) & 0xFFFFFFFF:#010x}"

    return {
        "0 / 0": bits(zero / zero),
        "inf - inf": bits(infinity - infinity),
        "payloads that win in a maximum": f"{int(largest.isnan().sum())} of {len(payloads)}",
    }


def finite_codes(device: Device, generator: torch.Generator) -> dict[str, Any]:
    """The 254 finite e4m3 values, as the kernels see them (times 2^-8, subnormals among them), through both units."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float() * 2.0**-8
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        there = values.to(dtype).to(device.place)
        doubled = (there * 2).cpu().float()
        matrix = torch.diag(torch.ones(len(codes), dtype=dtype)).to(device.place) @ there[:, None].expand(-1, 16)
        name = str(dtype).removeprefix("torch.")
        found[f"{name}, vector unit"] = f"{int((doubled == values * 2).sum())} of {len(codes)}"
        found[f"{name}, matrix unit"] = f"{int((matrix.cpu().float() == values[:, None]).all(1).sum())} of {len(codes)}"
    return found


def latency(device: Device, generator: torch.Generator) -> dict[str, Any]:
    """Microseconds to launch a small operation, and to wait for one; medians of five rounds."""
    x = torch.zeros(16, device=device.place)

    def microseconds(wait: bool) -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            x.add_(1)
            if wait:
                device.synchronize()
        device.synchronize()
        return (time.perf_counter() - start) / CALLS * 1e6

    microseconds(True)
    return {
        "launch, us": sorted(microseconds(False) for _ in range(5))[2],
        "launch and synchronize, us": sorted(microseconds(True) for _ in range(5))[2],
    }


def copy_bandwidth(device: Device, generator: torch.Generator) -> dict[str, Any]:
    """Bytes read and written together by a copy that is in no cache."""
    source = torch.ones(cache_bytes(device), dtype=torch.uint8, device=device.place)
    target = torch.empty_like(source)
    taken = []
    for _ in range(9):
        device.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        taken.append(time.perf_counter() - start)
    return {"copy, GB/s": 2 * source.numel() / sorted(taken)[4] / 1e9}
