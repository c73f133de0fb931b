"""Measure what `triton_kernels/nvidia/shapes.py` might say, on the GPU that is there.

For each number of tokens and each of Qwen3-8B's linears: tiles and splits beside the table's are compiled, by all cores
at once, compared with what the table's own shape gives, and timed among the four linears of a layer, of which the
others are the table's, in a CUDA graph with weights that are in no cache: launches overlap, so that a shape which is
fast by itself may keep the next launch out. The fastest are timed again in turn, also with other numbers of K blocks
fetched ahead. What the table has is marked.

    python -m benchmarks.nvidia_shapes                        # minutes on an H100 with 16 cores
    python -m benchmarks.nvidia_shapes --tokens 16 --layer o
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console

from benchmarks.shapes import QWEN3_8B
from qwen3_fp8_ascend.backends.nvidia import backend, launch
from qwen3_fp8_ascend.backends.nvidia.device import chip_of, cores_of
from qwen3_fp8_ascend.format import Activation, BlockGrid, ceil_div
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
    whole_batch = 1 << (max(16, tokens) - 1).bit_length()  # a tile's sizes are powers of two
    rows = sorted({whole_batch, max(16, whole_batch // 2)}) if few else [64, 128, 256]
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
    codes = torch.zeros(128, 128 * 64, dtype=torch.uint8, device="cuda")
    scale = torch.ones(1, 64, device="cuda")
    spans = launch.spans_of(BlockGrid((128,), codes.shape[1]), codes.device)
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
    reasons = dict(
        zip(
            cuts, pool.map(compile_one, cuts, itertools.repeat(tokens), itertools.repeat(how), chunksize=4), strict=True
        )
    )
    for cut, reason in reasons.items():
        if reason:
            console.print(f"{tokens} tokens, {cut}: {reason[:200]}", highlight=False, markup=False)
    return [cut for cut, reason in reasons.items() if reason is None]


class Layer:
    """The linears of a layer on the device, with as many copies of their weights as no cache holds."""

    def __init__(self, tokens: int, device: Device) -> None:
        self.x: dict[str, torch.Tensor] = {}
        self.copies: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        for name, (n, k) in QWEN3_8B.items():
            there = random_problem(tokens, (n,), k).to(device.place)
            size = max(2, ceil_div(cache_bytes(device), n * k))
            self.x[name] = there.x
            self.copies[name] = [backend.pack(there.weight, there.scale, there.grid) for _ in range(size)]

    def linear(self, name: str, m: int, how: Activation, cut: Cut | None, number: int = 0) -> torch.Tensor:
        """One linear of m tokens; the table's if there is no cut."""
        codes, scale, spans = self.copies[name][number % len(self.copies[name])]
        return launch.linear(self.x[name][:m], codes, scale, spans, how, None, cut)

    def together(self, m: int, how: Activation, name: str = "", cut: Cut | None = None) -> Contender:
        """All linears one after the other, one of them with the cut."""
        return lambda number: [
            self.linear(other, m, how, cut if other == name else None, number) for other in self.copies
        ]


def check(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """Refuse what does not compute what the table's shape does."""
    if not rel_l2(got, want) <= SAME:
        raise SystemExit(f"{what}: wrong by {rel_l2(got, want):.1e}")


def once(call: Contender, device: Device) -> float:
    """Seconds of a call, by the best of three replays of a graph that is dropped again."""

    def calls() -> None:
        for number in range(CALLS):
            call(number)

    replay, _ = device.capture(calls)
    return min(device.seconds(replay) for _ in range(3)) / CALLS


def quantizers(layer: Layer, tokens: Sequence[int], device: Device) -> None:
    """Print the time of a layer for each form of the quantization; `shapes.quantize_shape`."""
    chosen = shapes.quantize_shape
    for m in tokens:
        times = {}
        for shape in QUANTIZERS:
            shapes.quantize_shape = lambda groups, shape=shape: shape  # type: ignore[misc]
            times[shape] = once(layer.together(m, Activation.W8A8), device)
        shapes.quantize_shape = chosen
        line = ", ".join(f"{shape} {times[shape] * 1e6:.1f}" for shape in sorted(times, key=times.__getitem__))
        console.print(f"{m:4} tokens, us of the layer: {line}", highlight=False)


def describe(cut: Cut) -> str:
    tile = cut.tile
    text = f"{tile.block_m} x {tile.block_n}, {tile.warps} warps, {tile.stages} stages, W first {tile.w_first:d}"
    return f"{text}, scales early {tile.scales_early:d}, split {cut.split_k}, ahead {tile.ahead}"


def search(
    layer: Layer, name: str, m: int, how: Activation, device: Device, pool: ProcessPoolExecutor
) -> Iterator[dict[str, Any]]:
    """Time one linear's cuts within the layer and print the fastest; a line for each that was timed."""
    n, k = QWEN3_8B[name]
    chip, cores, k_blocks = chip_of(device.place), cores_of(device.place), k // 128
    table = cut_for(m, n // 128, n, k_blocks, chip, cores, 2, how is not Activation.W8A16)
    want = layer.linear(name, m, how, table)

    def line(cut: Cut, seconds: float, turn: str) -> dict[str, Any]:
        return {"layer": name, "m": m, "computes": str(how), "us": seconds * 1e6, "turn": turn} | {
            "split": cut.split_k,
            **vars(cut.tile),
            "table": cut == table,
        }

    times = {}
    for cut in compiled(list(dict.fromkeys(near(table, m, chip, k_blocks, how))), m, how, pool):
        check(layer.linear(name, m, how, cut), want, f"{name}, {m} tokens, {cut}")
        times[cut] = once(layer.together(m, how, name, cut), device)
        yield line(cut, times[cut], "alone")
    best = sorted(times, key=times.__getitem__)[:BEST]
    ahead = [replace(cut, tile=replace(cut.tile, ahead=a)) for cut in best[:3] for a in AHEAD if a <= k_blocks]
    final = list(dict.fromkeys([table, *best, *compiled(ahead, m, how, pool)]))
    for cut in final:
        check(layer.linear(name, m, how, cut), want, f"{name}, {m} tokens, {cut}")
    contenders = {str(cut): layer.together(m, how, name, cut) for cut in final}
    timings = interleave(contenders, seconds=0.3, device=device)
    order = sorted(final, key=lambda cut: timings[str(cut)].median)
    for cut in dict.fromkeys([*order[:BEST], table]):
        mark = "  <- table" if cut == table else ""
        us = timings[str(cut)].median * 1e6
        console.print(f"{name:8} {how!s:5} {m:4} {us:8.1f} us of the layer  {describe(cut)}{mark}", highlight=False)
    yield from (line(cut, timings[str(cut)].median, "in turn") for cut in final)


def bench(
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens; repeatable.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(QWEN3_8B)}; repeatable.")] = None,
    activation: Annotated[list[str] | None, typer.Option(help="w8a8 or w8a16; repeatable.")] = None,
    quantize: Annotated[bool, typer.Option("--quantize", help="The quantization's form alone.")] = False,
    output: Annotated[Path | None, typer.Option(help="CSV to write, with everything that was timed.")] = None,
) -> None:
    """Print the fastest cuts beside the table's."""
    torch.set_grad_enabled(False)
    device, rows = open_device("cuda"), tokens or list(TOKENS)
    linears = Layer(max(rows), device)
    if quantize:
        quantizers(linears, rows, device)
        return
    origin, found = provenance() | {"device": device.name}, []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for m, text in itertools.product(rows, activation or ("w8a16", "w8a8")):
            for name in layer or QWEN3_8B:
                found += [line | origin for line in search(linears, name, m, Activation.parse(text), device, pool)]
                if output is not None:
                    pd.DataFrame(found).to_csv(output, index=False)


if __name__ == "__main__":
    typer.run(bench)
