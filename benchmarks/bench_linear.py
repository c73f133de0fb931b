"""`make bench`: block-FP8 linears of every backend on a device against the memory's limit and every peer.

Correctness first: nothing of ours is timed before it agrees with the fp64 oracle. Then, per shape, batch and, on a CPU,
thread count, all implementations in turn in one process (`testing.timing`); medians, and ratios of neighbours.

    python -m benchmarks.bench_linear                          # Qwen3-8B, all batches, 1 thread and all threads
    python -m benchmarks.bench_linear --rows 1 --threads 1     # the decode step's limit only
    python -m benchmarks.bench_linear --device cuda            # device time in a graph; npu likewise (not run yet)
"""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.peers import peers
from benchmarks.shapes import MODELS, ROWS
from qwen3_fp8_ascend.backends import cpu, select_backend
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.provenance import provenance
from qwen3_fp8_ascend.testing.contenders import Peer, Weights, able, framework, ours
from qwen3_fp8_ascend.testing.devices import open_device
from qwen3_fp8_ascend.testing.judges import CALC_DIFF, Problem, calc_diff, random_problem
from qwen3_fp8_ascend.testing.timing import Timing, cache_bytes, interleave

RESULTS = Path(__file__).parent / "results"
OURS = "w8a8"
console = Console(width=max(140, Console().width))


def bench(
    device: Annotated[str, typer.Option(help="cpu, cuda or npu.")] = "cpu",
    model: Annotated[str, typer.Option(help=f"Shapes of {', '.join(MODELS)}.")] = "qwen3-8b",
    rows: Annotated[list[int] | None, typer.Option(help="Tokens in the batch; repeatable.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Threads of a CPU; repeatable.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Only these layers; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each table row's round of implementations.")] = 4.0,
    output: Annotated[Path | None, typer.Option(help="CSV to write; default: benchmarks/results/.")] = None,
) -> None:
    """Measure and print; exit code 1 if a result is wrong."""
    torch.set_grad_enabled(False)
    try:
        here = open_device(device)
        first = select_backend(None, here.place.type).name
    except BlockFp8Error as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(2) from error
    batches = rows or list(ROWS)
    counts = (threads or sorted({1, torch.get_num_threads()})) if device == "cpu" else [1]
    shapes = {name: size for name, size in MODELS[model].items() if not shape or name in shape}
    contenders = []
    for peer in (*ours(here), *framework(here), *peers(here)):
        if reason := peer.unavailable():
            console.print(f"[yellow]not measured:[/] {peer.name}: {reason}")
        else:
            # The backend that serves here needs no name of its own.
            contenders.append(dataclasses.replace(peer, name=peer.name.removeprefix(f"{first} ")))
    facts = provenance() | {"model": model, "device": here.name, "backend": first}
    facts |= {"isa": cpu.isa()} if device == "cpu" else {}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
    limit = "read" if device == "cpu" else "copy"
    found: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(shapes) * len(batches) * len(counts))
        for name, (n, k) in shapes.items():
            problem = random_problem(max(batches), (n,), k)
            there = problem.to(here.place)
            rotated = max(140_000_000, 2 * cache_bytes(here))
            weights = Weights(there.weight, there.scale, rotated, here)
            prepared = {}
            for peer in contenders:
                progress.update(task, description=f"{name}: laying out {peer.name}")
                prepared[peer.name] = peer.prepare(weights)
            for m in batches:
                x = there.x[:m].contiguous()
                timed, reasons = able(prepared, x, {peer.name for peer in contenders if peer.backend})
                for peer_name, reason in reasons.items():
                    progress.console.print(f"{name}, m = {m}: {peer_name} is left out: {reason}", markup=False)
                peers_here = [peer for peer in contenders if peer.name in timed]
                errors = {c.name: _error(problem, x, timed[c.name], c) for c in peers_here if c.backend}
                for count in counts:
                    progress.update(task, description=f"{name} m={m} threads={count}")
                    torch.set_num_threads(count)
                    timings = interleave(timed, seconds=seconds, device=here)
                    found += [
                        _row(peer, timings, errors, limit) | {"layer": name, "n": n, "k": k, "m": m, "threads": count}
                        for peer in peers_here
                    ]
                    torch.set_num_threads(max(counts))
                    progress.advance(task)
            del prepared, weights
    frame = pd.DataFrame(found)
    frame["gflops"] = 2 * frame.m * frame.n * frame.k / frame.median_ms / 1e6
    frame["gb_per_s"] = frame.bytes_per_weight * frame.n * frame.k / frame.median_ms / 1e6
    for key, value in facts.items():
        frame[key] = value
    kind = "linear" if device == "cpu" else f"linear-{device}"
    path = output or RESULTS / f"{kind}-{model}-{datetime.now():%Y%m%d-%H%M}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g")
    _print(frame)
    console.print(f"wrote {path}", highlight=False)


def _row(peer: Peer, timings: dict[str, Timing], errors: dict[str, float], limit: str) -> dict[str, Any]:
    timing = timings[peer.name]
    return {
        "implementation": peer.name,
        "computes": peer.computes,
        "bytes_per_weight": peer.bytes_per_weight,
        "clock": timing.clock,
        "median_ms": timing.median * 1e3,
        "p20_ms": timing.p20 * 1e3,
        "p80_ms": timing.p80 * 1e3,
        "rounds": len(timing.seconds),
        "limit": limit,
        "of_limit": timing.speedup_over(timings[limit]),
        "ours_speedup": timings[OURS].speedup_over(timing),
        "calc_diff": errors.get(peer.name, float("nan")),
    }


def _error(problem: Problem, x: torch.Tensor, run: Any, peer: Peer) -> float:
    """calc_diff from the fp64 oracle on the first rows; stops the benchmark if it is too large."""
    rows = min(len(x), 4)
    part = Problem(x[:rows].cpu(), problem.weight, problem.scale)
    error = calc_diff(run(0)[:rows].cpu(), part.oracle(Activation(peer.computes)))
    if error > CALC_DIFF:
        console.print(
            f"[red]{peer.name} is wrong:[/] calc_diff {error:.2e} at {tuple(x.shape)} x {problem.weight.shape}"
        )
        raise typer.Exit(1)
    return error


def _print(frame: pd.DataFrame) -> None:
    """One table a thread count: our time and rates, and our speed-up over each of the others."""
    limit = frame.limit.iloc[0]
    others = [name for name in frame.implementation.unique() if name not in (OURS, limit)]
    for count, part in frame.groupby("threads"):
        table = Table("layer", "m", "ms", "GB/s", "GFLOP/s", f"of {limit}", *(f"x {o}" for o in others), "calc_diff")
        table.title = f"{OURS}, {count} thread{'s' * (count != 1)}: of the {limit} of the same bytes; times faster than"
        for (layer, m), group in part.groupby(["layer", "m"], sort=False):
            rows = group.set_index("implementation")
            ours = rows.loc[OURS]
            table.add_row(
                layer,
                str(m),
                f"{ours.median_ms:.3f}",
                f"{ours.gb_per_s:.1f}",
                f"{ours.gflops:.0f}",
                f"{ours.of_limit:.0%}",
                *(f"{rows.loc[o].ours_speedup:.2f}" for o in others),
                f"{ours.calc_diff:.0e}",
            )
        console.print(table)
        _print_layer(part, others)


def _print_layer(part: pd.DataFrame, others: list[str]) -> None:
    """The layers together, as one decoder layer runs them: sums of medians."""
    sums = part.pivot_table(index="m", columns="implementation", values="median_ms", aggfunc="sum")
    limit = part.limit.iloc[0]
    table = Table("m", "ms", f"of {limit}", *(f"x {o}" for o in others), title="all layers together (sums of medians)")
    for m, row in sums.iterrows():
        ratios = (f"{row[o] / row[OURS]:.2f}" for o in others)
        table.add_row(str(m), f"{row[OURS]:.3f}", f"{row[limit] / row[OURS]:.0%}", *ratios)
    console.print(table)


if __name__ == "__main__":
    typer.run(bench)
