"""`make bench`: block-FP8 linears on this machine's CPU against the memory's limit and every peer.

Correctness first: nothing is timed before it agrees with the fp64 oracle. Then, per shape, batch and thread count,
all implementations in turn in one process (`measure.interleave`); medians, and ratios of neighbours.

    python -m benchmarks.bench_linear                          # Qwen3-8B, all batches, 1 thread and all threads
    python -m benchmarks.bench_linear --rows 1 --threads 1     # the decode step's limit only
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.measure import Timing, cache_bytes, interleave
from benchmarks.peers import PEERS, Weights
from benchmarks.shapes import MODELS, ROWS
from qwen3_fp8_ascend.backends import cpu, select_backend
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.provenance import provenance
from qwen3_fp8_ascend.testing.judges import CALC_DIFF, Problem, calc_diff, random_problem

RESULTS = Path(__file__).parent / "results"
OURS = "w8a8"
console = Console(width=max(140, Console().width))


def bench(
    model: Annotated[str, typer.Option(help=f"Shapes of {', '.join(MODELS)}.")] = "qwen3-8b",
    rows: Annotated[list[int] | None, typer.Option(help="Tokens in the batch; repeatable.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Threads; repeatable.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Only these layers; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each table row's round of implementations.")] = 4.0,
    output: Annotated[Path | None, typer.Option(help="CSV to write; default: benchmarks/results/.")] = None,
) -> None:
    """Measure and print; exit code 1 if a result is wrong."""
    torch.set_grad_enabled(False)
    batches, counts = rows or list(ROWS), threads or sorted({1, torch.get_num_threads()})
    shapes = {name: size for name, size in MODELS[model].items() if not shape or name in shape}
    peers = []
    for peer in PEERS:
        if reason := peer.unavailable():
            console.print(f"[yellow]not measured:[/] {peer.name}: {reason}")
        else:
            peers.append(peer)
    select_backend("cpu", "cpu")
    facts = provenance() | {"model": model, "isa": cpu.isa()}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
    found: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(shapes) * len(batches) * len(counts))
        for name, (n, k) in shapes.items():
            problem = random_problem(max(batches), (n,), k)
            weights = Weights(problem.weight, problem.scale, max(140_000_000, 2 * cache_bytes()))
            prepared = {}
            for peer in peers:
                progress.update(task, description=f"{name}: laying out {peer.name}")
                prepared[peer.name] = peer.prepare(weights)
            for m in batches:
                x = problem.x[:m].contiguous()
                errors: dict[str, float] = {
                    c: _error(problem, x, prepared[c](x), c) for c in ("w8a8", "w8a16") if c in prepared
                }
                for count in counts:
                    progress.update(task, description=f"{name} m={m} threads={count}")
                    torch.set_num_threads(count)
                    timings = interleave({p.name: prepared[p.name](x) for p in peers}, seconds=seconds)
                    found += [
                        _row(peer.name, peer.bytes_per_weight, peer.computes, timings, errors)
                        | {"layer": name, "n": n, "k": k, "m": m, "threads": count}
                        for peer in peers
                    ]
                    torch.set_num_threads(max(counts))
                    progress.advance(task)
            del prepared
    frame = pd.DataFrame(found)
    frame["gflops"] = 2 * frame.m * frame.n * frame.k / frame.median_ms / 1e6
    frame["gb_per_s"] = frame.bytes_per_weight * frame.n * frame.k / frame.median_ms / 1e6
    for key, value in facts.items():
        frame[key] = value
    path = output or RESULTS / f"linear-{model}-{datetime.now():%Y%m%d-%H%M}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g")
    _print(frame)
    console.print(f"wrote {path}", highlight=False)


def _row(
    name: str, bytes_per_weight: int, computes: str, timings: dict[str, Timing], errors: dict[str, float]
) -> dict[str, Any]:
    timing = timings[name]
    return {
        "implementation": name,
        "computes": computes,
        "bytes_per_weight": bytes_per_weight,
        "median_ms": timing.median * 1e3,
        "p20_ms": timing.p20 * 1e3,
        "p80_ms": timing.p80 * 1e3,
        "rounds": len(timing.seconds),
        "read_limit": timing.speedup_over(timings["read"]),
        "ours_speedup": timings[OURS].speedup_over(timing),
        "calc_diff": errors.get(name, float("nan")),
    }


def _error(problem: Problem, x: torch.Tensor, run: Any, computes: str) -> float:
    """calc_diff from the fp64 oracle on the first rows; stops the benchmark if it is too large."""
    rows = min(len(x), 4)
    part = Problem(x[:rows], problem.weight, problem.scale)
    error = calc_diff(run(0)[:rows], part.oracle(Activation.W8A8 if computes == "w8a8" else Activation.W8A16))
    if error > CALC_DIFF:
        console.print(
            f"[red]{computes} is wrong:[/] calc_diff {error:.2e} at {tuple(x.shape)} x {problem.weight.shape}"
        )
        raise typer.Exit(1)
    return error


def _print(frame: pd.DataFrame) -> None:
    """One table a thread count: our time and rates, and our speed-up over each of the others."""
    others = [name for name in frame.implementation.unique() if name not in (OURS, "read")]
    for count, part in frame.groupby("threads"):
        table = Table("layer", "m", "ms", "GB/s", "GFLOP/s", "of read", *(f"x {o}" for o in others), "calc_diff")
        table.title = (
            f"{OURS}, {count} thread{'s' * (count != 1)}: of the raw read of the same bytes; times faster than"
        )
        for (layer, m), group in part.groupby(["layer", "m"], sort=False):
            rows = group.set_index("implementation")
            ours = rows.loc[OURS]
            table.add_row(
                layer,
                str(m),
                f"{ours.median_ms:.3f}",
                f"{ours.gb_per_s:.1f}",
                f"{ours.gflops:.0f}",
                f"{ours.read_limit:.0%}",
                *(f"{rows.loc[o].ours_speedup:.2f}" for o in others),
                f"{ours.calc_diff:.0e}",
            )
        console.print(table)
        _print_layer(part, others)


def _print_layer(part: pd.DataFrame, others: list[str]) -> None:
    """The layers together, as one decoder layer runs them: sums of medians."""
    sums = part.pivot_table(index="m", columns="implementation", values="median_ms", aggfunc="sum")
    table = Table("m", "ms", "of read", *(f"x {o}" for o in others), title="all layers together (sums of medians)")
    for m, row in sums.iterrows():
        ratios = (f"{row[o] / row[OURS]:.2f}" for o in others)
        table.add_row(str(m), f"{row[OURS]:.3f}", f"{row['read'] / row[OURS]:.0%}", *ratios)
    console.print(table)


if __name__ == "__main__":
    typer.run(bench)
