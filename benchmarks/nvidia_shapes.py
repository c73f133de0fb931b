"""Measure what `triton_kernels/nvidia/shapes.py` might say, on the GPU that is there.

For each number of tokens and each of Qwen3-8B's linears: tiles and splits beside the table's are compiled, by all cores
at once, compared with what the table's own shape gives, and timed in a CUDA graph with weights that are in no cache.
The fastest are timed again in turn, also with other numbers of K blocks fetched ahead. What the table has is marked.

    python -m benchmarks.nvidia_shapes                        # minutes on an H100 with 16 cores
    python -m benchmarks.nvidia_shapes --tokens 16 --layer o
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.console import Console

from benchmarks.shapes import QWEN3_8B
from qwen3_fp8_ascend.backends.nvidia import backend, launch
from qwen3_fp8_ascend.backends.nvidia.device import chip_of, cores_of
from qwen3_fp8_ascend.format import Activation, ceil_div
from qwen3_fp8_ascend.provenance import provenance
from qwen3_fp8_ascend.testing.devices import Device, open_device
from qwen3_fp8_ascend.testing.judges import random_problem, rel_l2
from qwen3_fp8_ascend.testing.timing import CALLS, Contender, cache_bytes, interleave
from qwen3_fp8_ascend.triton_kernels.nvidia import shapes
from qwen3_fp8_ascend.triton_kernels.nvidia.shapes import Chip, Cut, Tile, blocks_ahead, cut_for, stage_bytes

TOKENS = (16, 64, 512)
SAME = 1e-2
"""Relative L2 of bf16 results that differ in the order of fp32 additions alone is far below."""
FEW = 64
"""Tokens up to which memory is the limit: many programs and stages."""
AHEAD = (0, 2, 4, 8, 16, 32)
QUANTIZERS = ((1, 1), (2, 1), (4, 1), (4, 2), (8, 2), (8, 4), (16, 4), (32, 8))
"""Groups and warps of a program."""
BEST = 6
"""How many are timed again."""
console = Console(width=200)


def near(table: Cut, tokens: int, chip: Chip, k_blocks: int, how: Activation) -> Iterator[Cut]:
    """The table's choice, and what could be in its place and fits."""
    yield table
    few = tokens <= FEW
    rows = sorted({max(16, tokens), max(16, tokens // 2)}) if few else [64, 128, 256]
    depths, splits = (
        ((2, 3, 4, 6), (1, 2, 3, 4, 6, 8)) if tokens <= 16 else ((2, 3, 4), (1, 2, 3, 4) if few else (1, 2))
    )
    early = (False, True) if how is not Activation.W8A16 and tokens > 16 else (True,)
    for block_m, block_n, warps, stages, w_first, scales_early, split in itertools.product(
        rows, (64, 128), (4, 8), depths, (False, True), early, splits
    ):
        ahead = min(8, blocks_ahead(ceil_div(k_blocks, split))) if few else 0
        tile = Tile(block_m, block_n, warps, stages, w_first, table.tile.programs, scales_early, ahead)
        small = block_m * block_n <= warps * 32 * 64  # else sums and products of a thread exceed its registers
        enough = split == 1 or ceil_div(k_blocks, split) >= 4
        whole = (split - 1) * ceil_div(k_blocks, split) < k_blocks
        fits = stages * stage_bytes(tile, 2) <= chip.shared_kib << 10
        if small and enough and whole and fits:
            yield Cut(tile, split)


def compile_one(cut: Cut, tokens: int, how: Activation) -> str | None:
    """In a process of its own: have Triton put the kernel into its cache; the reason why it cannot, or None."""
    torch.set_grad_enabled(False)
    there = random_problem(1, (128,), 128).to("cuda")
    codes = torch.zeros(128, 128 * 64, dtype=torch.uint8, device="cuda")
    scale = torch.ones(1, 64, device="cuda")
    spans = launch.spans_of(there.grid, codes.device)
    try:
        # 64 blocks of K: what is a multiple of 16 is compiled for that.
        launch.linear(
            torch.zeros(tokens, 128 * 64, dtype=torch.bfloat16, device="cuda"), codes, scale, spans, how, None, cut
        )
        torch.cuda.synchronize()
    except Exception as error:  # what does not compile or fit is no candidate
        return f"{type(error).__name__}: {error}"
    return None


def compiled(cuts: Sequence[Cut], tokens: int, how: Activation, pool: ProcessPoolExecutor) -> list[Cut]:
    """Those that compile."""
    reasons = dict(zip(cuts, pool.map(compile_one, cuts, repeat(tokens), repeat(how), chunksize=4), strict=True))
    for cut, reason in reasons.items():
        if reason:
            console.print(f"{tokens} tokens, {cut}: {reason[:200]}", highlight=False, markup=False)
    return [cut for cut, reason in reasons.items() if reason is None]


def run(
    x: torch.Tensor, copies: list[tuple[torch.Tensor, ...]], how: Activation, cut: Cut
) -> Callable[[int], torch.Tensor]:
    """A linear with the cut, of the call's number."""

    def call(number: int) -> torch.Tensor:
        codes, scale, spans = copies[number % len(copies)]
        return launch.linear(x, codes, scale, spans, how, None, cut)

    return call


def right(call: Contender, want: torch.Tensor, what: str) -> Contender:
    """The contender itself, if it computes what the table's does."""
    got = call(0)
    assert isinstance(got, torch.Tensor)
    if not rel_l2(got, want) <= SAME:
        raise SystemExit(f"{what}: wrong by {rel_l2(got, want):.1e}")
    return call


def once(call: Contender, device: Device) -> float:
    """Seconds of a call, by the best of three replays of a graph that is dropped again."""

    def calls() -> None:
        for number in range(CALLS):
            call(number)

    replay, _ = device.capture(calls)
    return min(device.seconds(replay) for _ in range(3)) / CALLS


def quantizers(layer: Sequence[str], device: Device) -> None:
    """Print the time of quantization and linear together, for each form of the first; `shapes.quantize_shape`."""
    chosen = shapes.quantize_shape
    for name, m in itertools.product(layer, (1, 16, 64, 512)):
        n, k = QWEN3_8B[name]
        there = random_problem(m, (n,), k).to(device.place)
        size = max(2, ceil_div(cache_bytes(device), n * k))
        copies = [backend.pack(there.weight, there.scale, there.grid) for _ in range(size)]
        table = cut_for(m, n // 128, n, k // 128, chip_of(device.place), cores_of(device.place), 2, True)
        times = {}
        for shape in QUANTIZERS:
            shapes.quantize_shape = lambda groups, shape=shape: shape  # type: ignore[misc]
            times[shape] = once(run(there.x, copies, Activation.W8A8, table), device)
        shapes.quantize_shape = chosen
        line = ", ".join(f"{shape} {times[shape] * 1e6:.1f}" for shape in sorted(times, key=times.__getitem__))
        console.print(f"{name:8} {m:4} tokens, {m * k // 128} groups, us: {line}", highlight=False)


def bench(
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens; repeatable.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(QWEN3_8B)}; repeatable.")] = None,
    activation: Annotated[list[str] | None, typer.Option(help="w8a8 or w8a16; repeatable.")] = None,
    quantize: Annotated[bool, typer.Option("--quantize", help="The quantization's form alone.")] = False,
    output: Annotated[Path | None, typer.Option(help="CSV to write, with everything that was timed.")] = None,
) -> None:
    """Print the fastest cuts beside the table's."""
    torch.set_grad_enabled(False)
    device, found = open_device("cuda"), []
    chip, cores = chip_of(device.place), cores_of(device.place)
    origin = provenance() | {"device": device.name}
    if quantize:
        quantizers(layer or list(QWEN3_8B), device)
        return
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))

    def note(name: str, m: int, how: Activation, cut: Cut, table: Cut, seconds: float, turn: str) -> None:
        line = {"layer": name, "m": m, "computes": str(how), "us": seconds * 1e6, "turn": turn, "split": cut.split_k}
        line |= {
            part: getattr(cut.tile, part)
            for part in ("block_m", "block_n", "warps", "stages", "w_first", "scales_early", "ahead")
        }
        found.append(line | {"table": cut == table} | origin)

    for m, text in itertools.product(tokens or TOKENS, activation or ("w8a16", "w8a8")):
        how = Activation.parse(text)
        for name in layer or QWEN3_8B:
            n, k = QWEN3_8B[name]
            there = random_problem(m, (n,), k).to(device.place)
            size = max(2, ceil_div(cache_bytes(device), n * k))
            copies = [backend.pack(there.weight, there.scale, there.grid) for _ in range(size)]
            table = cut_for(m, n // 128, n, k // 128, chip, cores, 2, how is not Activation.W8A16)
            want = run(there.x, copies, how, table)(0)

            times = {}
            for cut in compiled(list(dict.fromkeys(near(table, m, chip, k // 128, how))), m, how, pool):
                times[cut] = once(right(run(there.x, copies, how, cut), want, f"{name}, {m} tokens, {cut}"), device)
                note(name, m, how, cut, table, times[cut], "alone")
            best = sorted(times, key=times.__getitem__)[:BEST]
            ahead = [replace(c, tile=replace(c.tile, ahead=a)) for c in best[:3] for a in AHEAD if a <= k // 128]
            final = [table, *best, *compiled(ahead, m, how, pool)]
            contenders = {cut: run(there.x, copies, how, cut) for cut in dict.fromkeys(final)}
            for cut, call in contenders.items():
                right(call, want, f"{name}, {m} tokens, {cut}")
            timings = interleave({str(cut): call for cut, call in contenders.items()}, seconds=0.3, device=device)
            order = sorted(contenders, key=lambda cut: timings[str(cut)].median)
            for cut in dict.fromkeys([*order[:BEST], table]):
                mark, us = "  <- table" if cut == table else "", timings[str(cut)].median * 1e6
                t = cut.tile
                shape = f"{t.block_m} x {t.block_n}, {t.warps} warps, {t.stages} stages, W first {t.w_first:d}"
                shape += f", split {cut.split_k}, ahead {t.ahead}{mark}"
                console.print(f"{name:8} {text:5} {m:4} {us:8.1f} us  {shape}", highlight=False)
            for cut in contenders:
                note(name, m, how, cut, table, timings[str(cut)].median, "in turn")
            if output is not None:
                pd.DataFrame(found).to_csv(output, index=False)


if __name__ == "__main__":
    typer.run(bench)
