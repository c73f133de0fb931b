"""Estimates the time of Qwen3-8B's linears, or of Qwen3-30B-A3B's experts, from the Ascend C emulator's counters.

    python -m benchmarks.ascendc_estimate --chip 910B3 --rows 1 4 8 16 32 64
    python -m benchmarks.ascendc_estimate --chip 910B3 --experts 1 16 64

Nothing here was measured on an NPU. The kernels of csrc/ascend run in the emulator at full shape; it counts what they
do and adds up published costs of instructions and paths (tests/support/ascendc_emulator/chip.h names every source).
The BF16 column is a lower bound: weights streamed once at the nominal HBM rate, everything else hidden.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import QWEN3_8B
from qwen3_fp8_ascend.backends import ascendc
from qwen3_fp8_ascend.format import BlockGrid

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "support" / "ascendc_emulator"
SOURCES = ROOT / "csrc" / "ascend"
KERNELS = ("group_quantize", "block_dequantize", "block_linear", "block_grouped_linear", "block_gemv")

EXPERTS, TOP_K = 128, 8
EXPERT_LINEARS = {"gate_up": (1536, 2048), "down": (2048, 768)}
"""Qwen3-30B-A3B: (n, k) of an expert's two linears."""

SAMPLE = 20
"""Most experts that are emulated. More are extrapolated from this many and half of it: cores share experts out evenly,
and every expert costs the same but for its rows."""

PATHS = ("HBM->UB", "UB->L2", "L2->L1", "L1->L0B", "L0C->L2", "L2->UB")


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the estimate needs beside the emulator's own table; sources there."""

    cube_cores: int
    mhz: float
    hbm_gb_per_s: float

    @property
    def hertz(self) -> float:
        return self.mhz * 1e6


CHIPS = {
    "910B1": Chip(24, 1850, 1600),
    "910B3": Chip(20, 1800, 1600),
    "910B4": Chip(20, 1500, 800),
    "910_9391": Chip(24, 1850, 1600),
}


@dataclasses.dataclass(frozen=True)
class Row:
    linear: str
    m: int
    kernel: str
    microseconds: float
    busiest: str
    bf16_microseconds: float
    bytes_a_weight: dict[str, float]
    repeats: float
    """Vector instructions of 256 bytes for each 256 weights."""

    @property
    def ratio(self) -> float:
        return self.bf16_microseconds / self.microseconds


def build(folder: Path) -> Path:
    """The kernels on the emulator, optimized and without sanitizers."""
    executable = folder / "run_kernel"
    sources = [SOURCES / "kernels" / f"{name}.cpp" for name in KERNELS]
    sources.append(ROOT / "tests" / "ascendc" / "run_kernel.cpp")
    command = ["g++", "-std=c++17", "-O2", "-march=native", f"-I{EMULATOR}", f"-I{SOURCES}", *map(str, sources)]
    subprocess.run([*command, "-o", str(executable), "-pthread"], check=True)
    return executable


def bf16_microseconds(n: int, k: int, m: int, chip: Chip) -> float:
    """The stock product at its best: the larger of streaming the weights and multiplying them."""
    streaming = 2 * n * k / (chip.hbm_gb_per_s * 1e9)
    cube = -(-m // 16) * (n / 16) * (k / 16) / chip.cube_cores / chip.hertz
    return max(streaming, cube) * 1e6


def write(path: Path, tensor: torch.Tensor) -> None:
    path.write_bytes(tensor.flatten().view(torch.uint8).numpy().tobytes())


def estimate(
    executable: Path, folder: Path, linears: Sequence[str], rows: Sequence[int], chip_name: str
) -> Iterator[Row]:
    chip = CHIPS[chip_name]
    for linear in linears:
        n, k = QWEN3_8B[linear]
        grid = BlockGrid((n,), k)
        codes = torch.randint(0, 0x7F, (n, k), dtype=torch.uint8).view(torch.float8_e4m3fn)
        names = ("packed", "scale", "spans")
        for name, tensor in zip(names, ascendc.pack(codes, torch.rand(grid.scale_shape), grid), strict=True):
            write(folder / name, tensor)
        files = [f"{name}={folder / name}" for name in ("x", *names, "out")]
        settings = [f"n={n}", f"k={k}", "dtype=1", "activation=0", f"cores={chip.cube_cores}", f"chip={chip_name}"]
        for m in rows:
            write(folder / "x", torch.randn(m, k).to(torch.bfloat16))
            for kernel in ("block_linear", "block_gemv") if m == 1 else ("block_linear",):
                command = [str(executable), kernel, f"m={m}", *settings, *files]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                counters = json.loads(done.stdout)
                busy: dict[str, float] = counters["busy"]
                yield Row(
                    linear,
                    m,
                    kernel,
                    counters["cycles"] / chip.hertz * 1e6,
                    f"{max(busy, key=lambda pipe: busy[pipe])} {max(busy.values()) / counters['cycles']:.0%}",
                    bf16_microseconds(n, k, m, chip),
                    {path: count / (n * k) for path, count in counters["bytes"].items()},
                    sum(counters["vector_repeats"].values()) / (n * k / 256),
                )


def zeros(path: Path, size: int) -> None:
    """A file of zeros that takes no room: what the emulator counts does not depend on codes."""
    with path.open("wb") as file:
        file.truncate(size)


def emulate_experts(
    executable: Path, folder: Path, linear: str, counts: torch.Tensor, chip_name: str
) -> dict[str, Any]:
    """The counters of a grouped linear whose experts have these numbers of rows, shapes (`EXPERTS`,)."""
    n, k = EXPERT_LINEARS[linear]
    tiles, units, rows = -(-n // 128), -(-n // 128) * -(-k // 128), int(counts.sum())
    dtype = torch.bfloat16 if linear == "gate_up" else torch.float32  # as `grouped.block_experts` has it
    zeros(folder / "packed", EXPERTS * units * 128 * 128)
    zeros(folder / "scale", EXPERTS * units * 32)
    spans = torch.tensor([[tile * 128, 128, 0, 0, 0, 0, 0, 0] for tile in range(tiles)], dtype=torch.int32)
    write(folder / "spans", spans.repeat(EXPERTS, 1))
    write(folder / "ends", counts.cumsum(0))
    write(folder / "x", torch.randn(rows, k).to(dtype))
    files = [f"{name}={folder / name}" for name in ("x", "packed", "scale", "spans", "ends", "out")]
    settings = [f"m={rows}", f"n={n}", f"k={k}", f"dtype={1 if dtype == torch.bfloat16 else 2}", "activation=0"]
    settings += [f"cores={CHIPS[chip_name].cube_cores}", f"chip={chip_name}"]
    command = [str(executable), "block_grouped_linear", *settings, *files]
    out: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return out


def emulate_gemv_of_experts(executable: Path, folder: Path, linear: str, chip_name: str) -> dict[str, Any]:
    """The counters of `block_gemv` for one row and the weights of `TOP_K` experts, one below the other.

    What a kernel for one token of experts on vector cores alone could at best do: it would read each expert's own row
    and the list of ends besides.
    """
    n, k = EXPERT_LINEARS[linear]
    n *= TOP_K
    tiles, k_blocks = -(-n // 128), -(-k // 128)
    zeros(folder / "packed", tiles * k_blocks * 128 * 128)
    zeros(folder / "scale", tiles * k_blocks * 32)
    spans = torch.tensor([[tile * 128, 128, 0, 0, 0, 0, 0, 0] for tile in range(tiles)], dtype=torch.int32)
    write(folder / "spans", spans)
    dtype = torch.bfloat16 if linear == "gate_up" else torch.float32
    write(folder / "x", torch.randn(1, k).to(dtype))
    files = [f"{name}={folder / name}" for name in ("x", "packed", "scale", "spans", "out")]
    settings = ["m=1", f"n={n}", f"k={k}", f"dtype={1 if dtype == torch.bfloat16 else 2}", "activation=0"]
    settings += [f"cores={CHIPS[chip_name].cube_cores}", f"chip={chip_name}"]
    command = [str(executable), "block_gemv", *settings, *files]
    out: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return out


def estimate_experts(executable: Path, folder: Path, tokens: Sequence[int], chip_name: str) -> Iterator[Row]:
    """Both grouped linears of a layer, for tokens that are sent to `TOP_K` experts at random.

    For one token also what `block_gemv` takes for as many weights (`emulate_gemv_of_experts`).
    """
    chip = CHIPS[chip_name]
    for m in tokens:
        counts = torch.bincount(torch.rand(m, EXPERTS).topk(TOP_K).indices.flatten(), minlength=EXPERTS)
        touched = counts.nonzero().flatten()
        for linear, (n, _) in EXPERT_LINEARS.items():
            counters: list[dict[str, Any]] = []
            tiles_of_a_core: list[int] = []
            numbers = [len(touched)] if len(touched) <= SAMPLE else [SAMPLE // 2, SAMPLE]
            for number in numbers:
                sample = torch.zeros_like(counts).index_copy(0, touched[:number], counts[touched[:number]])
                counters.append(emulate_experts(executable, folder, linear, sample, chip_name))
                tiles_of_a_core.append(-(-number * -(-n // 128) // chip.cube_cores))
            last = counters[-1]
            cycles = last["cycles"]
            if len(counters) == 2:
                of_a_tile = (cycles - counters[0]["cycles"]) / (tiles_of_a_core[1] - tiles_of_a_core[0])
                every_tile = -(-len(touched) * -(-n // 128) // chip.cube_cores)
                cycles += of_a_tile * (every_tile - tiles_of_a_core[1])
            yield of_experts(linear, len(touched), m, "block_grouped_linear", cycles, last, numbers[-1], chip)
            if m == 1:
                bound = emulate_gemv_of_experts(executable, folder, linear, chip_name)
                yield of_experts(linear, TOP_K, m, "block_gemv, a bound", bound["cycles"], bound, TOP_K, chip)


def of_experts(
    linear: str, touched: int, m: int, kernel: str, cycles: float, counters: dict[str, Any], emulated: int, chip: Chip
) -> Row:
    """A row for `touched` experts from the counters of an emulation of `emulated` of them."""
    n, k = EXPERT_LINEARS[linear]
    weights, busy = emulated * n * k, counters["busy"]
    return Row(
        f"{linear} of {touched} experts",
        m,
        kernel,
        cycles / chip.hertz * 1e6,
        f"{max(busy, key=lambda pipe: busy[pipe])} {max(busy.values()) / counters['cycles']:.0%}",
        2 * touched * n * k / (chip.hbm_gb_per_s * 1e9) * 1e6,
        {path: count / weights for path, count in counters["bytes"].items()},
        sum(counters["vector_repeats"].values()) / (weights / 256),
    )


def markdown(rows: Sequence[Row], chip: str) -> Iterator[str]:
    yield (
        f"| linear | m | kernel | FP8 on {chip}, us (estimated) | busiest pipe | BF16, us (estimated, lower bound) "
        f"| ratio (estimated) | bytes a weight (counted): {', '.join(PATHS)} "
        "| vector repeats for 256 weights (counted) |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        traffic = ", ".join(f"{row.bytes_a_weight.get(path, 0):.2f}" for path in PATHS)
        yield (
            f"| {row.linear} | {row.m} | {row.kernel} | {row.microseconds:.1f} | {row.busiest} "
            f"| {row.bf16_microseconds:.1f} | {row.ratio:.2f} | {traffic} | {row.repeats:.1f} |"
        )
    yield ""
    yield (
        f"| m | kernel | the linears together on {chip}, us (estimated) | BF16, us (estimated, lower bound) "
        "| ratio (estimated) |"
    )
    yield "|---|---|---|---|---|"
    for m, kernel in sorted({(row.m, row.kernel) for row in rows}):
        group = [row for row in rows if (row.m, row.kernel) == (m, kernel)]
        fp8, bf16 = sum(row.microseconds for row in group), sum(row.bf16_microseconds for row in group)
        yield f"| {m} | {kernel} | {fp8:.0f} | {bf16:.0f} | {bf16 / fp8:.2f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS, default="910B3")
    parser.add_argument("--linears", nargs="+", choices=QWEN3_8B, default=list(QWEN3_8B))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--experts", nargs="+", type=int, metavar="TOKENS", help="experts instead, for these tokens")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        executable = build(Path(name))
        found = (
            estimate_experts(executable, Path(name), options.experts, options.chip)
            if options.experts
            else estimate(executable, Path(name), options.linears, options.rows, options.chip)
        )
        for row in found:
            print(f"{row.linear} m={row.m} {row.kernel}: {row.microseconds:.1f} us (estimated)", file=sys.stderr)
            rows.append(row)
    print("\n".join(markdown(rows, options.chip)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
