"""Measure the neighbours of each line of `triton_kernels/nvidia/shapes.py` on the GPU that is there. Not run yet.

For each number of tokens and each of Qwen3-8B's linears: tiles and splits beside the table's are compiled, compared
with what the table's own shape gives, and timed in turn in a CUDA graph with weights that are in no cache. What the
table has is marked; the figures say what would be better, and by how much.

    python -m benchmarks.nvidia_shapes                        # about ten minutes on an H100 (estimate)
    python -m benchmarks.nvidia_shapes --tokens 16 --layer o
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from qwen3_fp8_ascend.testing.devices import open_device
from qwen3_fp8_ascend.testing.judges import random_problem, rel_l2
from qwen3_fp8_ascend.testing.timing import Contender, cache_bytes, interleave
from qwen3_fp8_ascend.triton_kernels.nvidia.shapes import Chip, Cut, Tile, cut_for, stage_bytes

TOKENS = (1, 16, 32, 64, 128, 512)
SAME = 1e-2
"""Relative L2 of bf16 results that differ in the order of fp32 additions alone is far below."""
console = Console()


def neighbours(cut: Cut, tokens: int, chip: Chip, k_blocks: int) -> Iterator[Cut]:
    """The table's choice, and what is near it and fits."""
    yield cut
    tile = cut.tile
    rows = sorted({tile.block_m, max(16, tile.block_m // 2)})
    for block_m, block_n, warps, stages, w_first, split in itertools.product(
        rows, (32, 64, 128), (4, 8), (2, 3, 4, 5, 6), (False, True), (1, 2, 3, 4, 6, 8)
    ):
        other = Cut(Tile(block_m, block_n, warps, stages, w_first, tile.programs), split)
        small = block_m * block_n <= warps * 32 * 64  # else sums and products of a thread exceed its registers
        enough = split == 1 or ceil_div(k_blocks, split) >= 4
        whole = (split - 1) * ceil_div(k_blocks, split) < k_blocks
        fits = stages * stage_bytes(other.tile, 2) <= chip.shared_kib << 10
        if small and enough and whole and fits and replace(other.tile, wide_rows=tile.wide_rows) != tile:
            yield other


def run(
    x: torch.Tensor, copies: list[tuple[torch.Tensor, ...]], how: Activation, cut: Cut
) -> Callable[[int], torch.Tensor]:
    """A linear with the cut, of the call's number."""

    def call(number: int) -> torch.Tensor:
        codes, scale, spans = copies[number % len(copies)]
        return launch.linear(x, codes, scale, spans, how, None, cut)

    return call


def bench(
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens; repeatable.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(QWEN3_8B)}; repeatable.")] = None,
    activation: Annotated[str, typer.Option(help="w8a8 or w8a16.")] = "w8a16",
    programs: Annotated[int, typer.Option(help="Leave out cuts of fewer programs.")] = 64,
    output: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
) -> None:
    """Print the five fastest cuts beside the table's."""
    torch.set_grad_enabled(False)
    device, how, found = open_device("cuda"), Activation.parse(activation), []
    chip, cores = chip_of(device.place), cores_of(device.place)
    for name, m in itertools.product(layer or QWEN3_8B, tokens or TOKENS):
        n, k = QWEN3_8B[name]
        there = random_problem(m, (n,), k).to(device.place)
        copies = [
            backend.pack(there.weight, there.scale, there.grid)
            for _ in range(max(2, ceil_div(cache_bytes(device), n * k)))
        ]
        table = cut_for(m, n // 128, n, k // 128, chip, cores, 2)
        want = run(there.x, copies, how, table)(0)
        contenders: dict[str, Contender] = {}
        cuts = dict.fromkeys(neighbours(table, m, chip, k // 128))
        for cut in cuts:
            count = ceil_div(m, cut.tile.block_m) * (n // cut.tile.block_n) * cut.split_k
            if cut != table and count < programs:
                continue
            try:
                got = run(there.x, copies, how, cut)(0)
            except Exception as error:  # what does not compile or fit is no candidate
                console.print(f"{name}, {m} tokens, {cut}: {type(error).__name__}", highlight=False)
                continue
            if rel_l2(got, want) > SAME:
                raise SystemExit(f"{name}, {m} tokens, {cut}: wrong by {rel_l2(got, want):.1e}")
            contenders[str(cut)] = run(there.x, copies, how, cut)
        timings = interleave(contenders, seconds=0, device=device, least=3)
        best = sorted(timings, key=lambda text: timings[text].median)
        for text in dict.fromkeys([*best[:5], str(table)]):
            mark, us = "  <- table" if text == str(table) else "", timings[text].median * 1e6
            console.print(f"{name:8} {m:4} {us:8.1f} us  {text}{mark}", highlight=False)
            found.append({"layer": name, "m": m, "us": us, "cut": text, "table": bool(mark)} | provenance())
    if output is not None:
        pd.DataFrame(found).to_csv(output, index=False)


if __name__ == "__main__":
    typer.run(bench)
