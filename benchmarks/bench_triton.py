"""Times the Triton backend on an NVIDIA GPU or an Ascend NPU against the bandwidth limit and its peers.

    python -m benchmarks.bench_triton [--rows 1 16 128] [--out benchmarks/results/triton_DEVICE.csv]

For each Qwen3-8B linear and m: correctness against the fp64 oracle first, then every contender interleaved in one
process, medians of --rounds rounds. Weights rotate through copies that together exceed any L2 cache. The limit is
a copy of the same number of bytes, measured in the same loop. Without a device it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import QWEN3_8B
from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.format import Activation

ROOT = Path(__file__).resolve().parent.parent
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
CACHE_BYTES = 512 << 20
ERROR_LIMIT = 3e-3  # relative L2 of a bf16 output: its own rounding is 1.7e-3
CALLS = 20
COLUMNS = (
    *("device", "operation", "m", "n", "k", "contender", "median_us", "p20_us", "p80_us", "gb_per_s"),
    *("share_of_copy_bandwidth", "speedup_over_bf16", "rel_l2"),
)


def find_device() -> torch.device | None:
    """An NVIDIA GPU or an NPU, whichever is there."""
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    try:
        import torch_npu  # noqa: F401
    except ImportError:
        return None
    return torch.device("npu:0") if getattr(torch, "npu").is_available() else None  # noqa: B009


def device_name(device: torch.device) -> str:
    return str(getattr(torch, device.type).get_device_name())


def seconds(call: Callable[[int], Any], device: torch.device) -> float:
    """Time of one of `CALLS` calls, by events on the device."""
    module = getattr(torch, device.type)
    start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
    start.record()
    for i in range(CALLS):
        call(i)
    end.record()
    module.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / CALLS


def vllm_block_kernel() -> Callable[..., Any] | None:
    """vLLM's own Triton block-FP8 matmul, if vLLM is here."""
    try:
        from vllm.model_executor.layers.quantization.utils.fp8_utils import (
            per_token_group_quant_fp8,
            w8a8_triton_block_scaled_mm,
        )
    except ImportError:
        return None

    def run(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        codes, x_scale = per_token_group_quant_fp8(x, 128)
        return w8a8_triton_block_scaled_mm(codes, weight, x_scale, scale, [128, 128], x.dtype)

    return run


def contenders(
    n: int, k: int, m: int, device: torch.device
) -> tuple[dict[str, Callable[[int], Any]], dict[str, float]]:
    """What is timed for one shape, and the error of each; every one is checked here.

    Raises:
        SystemExit: ours is wrong.
    """
    torch.manual_seed(0)
    copies = max(2, -(-CACHE_BYTES // (n * k)))
    weight = (torch.randn(n, k) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(n // 128, k // 128) * 1e-3 + 1e-4
    x = torch.randn(m, k).bfloat16()
    rows = slice(0, min(m, 8))
    on_device, scale_there = x.to(device), scale.to(device)
    weights = [weight.to(device) for _ in range(copies)]
    packed = [ops.pack_weight(w, scale_there, backend="triton") for w in weights]
    expanded = [reference.dequantize_weight(weight, scale).to(device) for _ in range(max(2, copies // 2))]
    raw = [w.view(torch.int8) for w in weights]
    target = torch.empty_like(raw[0])
    timed: dict[str, Callable[[int], Any]] = {
        "w8a8": lambda i: ops.block_linear(on_device, packed[i % copies]),
        "w8a16": lambda i: ops.block_linear(on_device, packed[i % copies], None, Activation.W8A16),
        "bf16": lambda i: torch.nn.functional.linear(on_device, expanded[i % len(expanded)]),
        "dequantize, matmul": lambda i: torch.nn.functional.linear(
            on_device, ops.dequantize_weight(weights[i % copies], scale_there, backend="triton")
        ),
        # Reads and writes n * k / 2 bytes each: as many bytes as the weight has.
        "copy": lambda i: target[: n // 2].copy_(raw[i % copies][: n // 2]),
    }
    if device.type == "cuda" and (peer := vllm_block_kernel()) is not None:
        timed["vLLM Triton"] = lambda i: peer(on_device, weights[i % copies], scale_there)
    errors = {}
    for name, call in timed.items():
        if name == "copy":
            continue
        activation = Activation.W8A8 if name in ("w8a8", "vLLM Triton") else Activation.W8A16
        oracle = reference.block_linear(x[rows], weight, scale, activation=activation, compute_dtype=torch.float64)
        out = call(0)[rows].cpu().double()
        errors[name] = float((out - oracle).norm() / oracle.norm())
        if name in ("w8a8", "w8a16") and not errors[name] <= ERROR_LIMIT:
            raise SystemExit(f"{name} at m={m}, n={n}, k={k} is wrong: relative L2 {errors[name]:.2e}")
    return timed, errors


def measure(name: str, m: int, shape: tuple[int, int], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of one shape, all contenders interleaved."""
    n, k = shape
    timed, errors = contenders(n, k, m, device)
    for call in timed.values():
        seconds(call, device)  # compiles, warms
    samples: dict[str, list[float]] = {contender: [] for contender in timed}
    for _ in range(rounds):
        for contender, call in timed.items():
            samples[contender].append(seconds(call, device))
    medians = {contender: statistics.median(values) for contender, values in samples.items()}
    bandwidth = n * k / medians["copy"]
    rows = []
    for contender, values in samples.items():
        moved = n * k * (2 if contender == "bf16" else 1)
        ordered = sorted(values)
        rows.append(
            {
                "device": device_name(device),
                "operation": name,
                "m": m,
                "n": n,
                "k": k,
                "contender": contender,
                "median_us": round(medians[contender] * 1e6, 2),
                "p20_us": round(ordered[len(ordered) // 5] * 1e6, 2),
                "p80_us": round(ordered[len(ordered) * 4 // 5] * 1e6, 2),
                "gb_per_s": round(moved / medians[contender] * 1e-9, 1),
                "share_of_copy_bandwidth": round(moved / medians[contender] / bandwidth, 3),
                "speedup_over_bf16": round(medians["bf16"] / medians[contender], 3),
                "rel_l2": f"{errors[contender]:.2e}" if contender in errors else "",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="values of m")
    parser.add_argument("--linears", nargs="+", default=list(QWEN3_8B), choices=list(QWEN3_8B))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/triton_DEVICE.csv")
    arguments = parser.parse_args()
    device = find_device()
    if device is None or os.environ.get("TRITON_INTERPRET") == "1":
        print("not run: torch sees neither an NVIDIA GPU nor an Ascend NPU", file=sys.stderr)
        raise SystemExit(2)
    slug = "".join(c if c.isalnum() else "-" for c in device_name(device).lower())
    out = arguments.out or ROOT / "benchmarks" / "results" / f"triton_{slug}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for name in arguments.linears:
            for m in arguments.rows:
                for row in measure(name, m, QWEN3_8B[name], arguments.rounds, device):
                    writer.writerow(row)
                    print(" ".join(f"{value}" for value in row.values()), flush=True)
                file.flush()
    print(f"written: {out}")


if __name__ == "__main__":
    main()
