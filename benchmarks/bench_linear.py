"""`make bench`: block-FP8 linears of every backend on a device against the memory's limit and every peer.

Correctness first: nothing of ours is timed before it agrees with the fp64 oracle. Then, per shape, batch and, on a CPU,
thread count, all implementations in turn in one process (`testing.timing`); medians, and ratios of neighbours.

    python -m benchmarks.bench_linear                          # Qwen3-8B, all batches, 1 thread and all threads
    python -m benchmarks.bench_linear --rows 1 --threads 1     # the decode step's limit only
    python -m benchmarks.bench_linear --threads 1,2,half,all   # the NUMA layout is printed, and goes into the CSV
    python -m benchmarks.bench_linear --isa avx2               # a CPU held to an instruction set; only it is timed
    python -m benchmarks.bench_linear --device cuda            # device time in a graph; npu likewise (not run yet)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers import peers
from benchmarks.processors import numa_layout, thread_counts
from benchmarks.shapes import MODELS, ROWS
from benchmarks.steps import Steps, steps
from qwen3_fp8_ascend.backends import cpu, select_backend
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.provenance import provenance
from qwen3_fp8_ascend.testing.contenders import Peer, Weights, able, framework, ours
from qwen3_fp8_ascend.testing.devices import Device, open_device
from qwen3_fp8_ascend.testing.judges import CALC_DIFF, Problem, calc_diff, random_problem
from qwen3_fp8_ascend.testing.timing import Timing, cache_bytes, interleave, settle

RESULTS = Path(__file__).parent / "results"
OURS = "w8a8"
PEAK = "multiply-adds"
console = Console(width=max(140, Console().width))


def bench(
    device: Annotated[str, typer.Option(help="cpu, cuda or npu.")] = "cpu",
    model: Annotated[str, typer.Option(help=f"Shapes of {', '.join(MODELS)}.")] = "qwen3-8b",
    rows: Annotated[list[int] | None, typer.Option(help="Tokens in the batch; repeatable.")] = None,
    threads: Annotated[list[str] | None, typer.Option(help="Threads of a CPU: numbers, half, all; 1,2,half.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Only these layers; repeatable.")] = None,
    isa: Annotated[str | None, typer.Option(help="Instruction set of a CPU's kernels; default: all.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these beside w8a8 and the limits; repeatable.")] = None,
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
    if isa is not None:
        cpu.set_isa(isa)
    try:
        counts = thread_counts(threads or ["1", "all"], torch.get_num_threads()) if device == "cpu" else [1]
    except ValueError as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(2) from error
    limit = "read" if device == "cpu" else "copy"
    contenders = _contenders(here, first, isa, only and {OURS, limit, PEAK, *only})
    sweep = Sweep(here, contenders, rows or list(ROWS), counts, seconds, limit)
    chosen = {"isa": cpu.isa()} if device == "cpu" else {}
    facts = provenance() | {"model": model, "device": here.name, "backend": first} | chosen
    if device == "cpu":
        facts["numa"] = numa_layout()
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
    shapes = {name: size for name, size in MODELS[model].items() if not shape or name in shape}
    kind = "linear" if device == "cpu" else f"linear-{device}"
    path = output or RESULTS / f"{kind}-{model}-{datetime.now():%Y%m%d-%H%M}.csv"
    console.print(f"each layer goes into {path} when it is measured", highlight=False)
    found: list[dict[str, Any]] = []
    for layer in _measure(sweep, shapes):
        found += layer
        _write(_frame(found, facts), path)
    _print(_frame(found, facts))
    console.print(f"wrote {path}", highlight=False)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is timed for each layer: every contender, at each batch and thread count, `seconds` a round."""

    device: Device
    contenders: list[Peer]
    batches: list[int]
    threads: list[int]
    seconds: float
    limit: str


def _measure(sweep: Sweep, shapes: dict[str, tuple[int, int]]) -> Iterator[list[dict[str, Any]]]:
    """Rows of each layer."""
    with steps(console, len(shapes) * len(sweep.batches) * len(sweep.threads)) as said:
        for name, (n, k) in shapes.items():
            yield _measure_layer(sweep, name, n, k, said)


def _measure_layer(sweep: Sweep, name: str, n: int, k: int, said: Steps) -> list[dict[str, Any]]:
    """Rows of one layer; its packed weights are gone when this returns."""
    here = sweep.device
    problem = random_problem(max(sweep.batches), (n,), k)
    there = problem.to(here.place)
    weights = Weights(there.weight, there.scale, max(140_000_000, 2 * cache_bytes(here)), here)
    prepared = {}
    for contender in sweep.contenders:
        said.begin(f"{name}: laying out {contender.name}")
        prepared[contender.name] = contender.prepare(weights)
    found = []
    for m in sweep.batches:
        x = there.x[:m].contiguous()
        timed, reasons = able(prepared, x, {c.name for c in sweep.contenders if c.backend})
        for left_out, reason in reasons.items():
            console.print(f"{name}, m = {m}: {left_out} is left out: {reason}", markup=False)
        timed_here = [c for c in sweep.contenders if c.name in timed]
        errors = {c.name: _error(problem, x, timed[c.name], c) for c in timed_here if c.backend}
        if m == sweep.batches[0]:
            said.begin(f"{name}: settling")
            settle(timed, weights.copies(1), here)
        for count in sweep.threads:
            said.begin(f"{name} m={m} threads={count}")
            torch.set_num_threads(count)
            timings = interleave(timed, seconds=sweep.seconds, device=here)
            where = {"layer": name, "n": n, "k": k, "m": m, "threads": count}
            found += [_row(contender, timings, errors, sweep.limit) | where for contender in timed_here]
            torch.set_num_threads(max(sweep.threads))
            share = f"{timings[OURS].speedup_over(timings[sweep.limit]):.0%} of the {sweep.limit}"
            said.end(f"{name} m={m} threads={count}: {timings[OURS].median * 1e3:.3f} ms, {share}")
    return found


def _contenders(here: Device, first: str, isa: str | None, only: Collection[str] | None) -> list[Peer]:
    """What can run here, of `only` if given; the backend that serves here, `first`, needs no name of its own."""
    found = []
    for peer in (*ours(here), *framework(here), *peers(here)):
        name = peer.name.removeprefix(f"{first} ")
        of_other_isas = isa is not None and name.startswith(f"{OURS}, ")
        if of_other_isas or (only and name not in only):
            continue
        if reason := peer.unavailable():
            console.print(f"[yellow]not measured:[/] {peer.name}: {reason}")
        else:
            found.append(dataclasses.replace(peer, name=name))
    return found


def _write(frame: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g")


def _frame(found: list[dict[str, Any]], facts: dict[str, str]) -> pd.DataFrame:
    """The rows with speeds, and with what every published number has to name."""
    frame = pd.DataFrame(found)
    frame["gflops"] = 2 * frame.m * frame.n * frame.k / frame.median_ms / 1e6
    frame["gb_per_s"] = frame.bytes_per_weight * frame.n * frame.k / frame.median_ms / 1e6
    for key, value in facts.items():
        frame[key] = value
    return frame


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
        "of_peak": timing.speedup_over(timings[PEAK]) if PEAK in timings else float("nan"),
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
    limits = _limits(frame)
    others = [name for name in frame.implementation.unique() if name not in (OURS, *limits)]
    for count, part in frame.groupby("threads"):
        shares = [f"of {name}" for name in limits]
        table = Table("layer", "m", "ms", "GB/s", "GFLOP/s", *shares, *(f"x {o}" for o in others), "calc_diff")
        title = f"{OURS}, {count} thread{'s' * (count != 1)}: of the {limits[0]} of the same bytes"
        table.title = title + (f" and of as many {PEAK}" if PEAK in limits else "") + "; times faster than"
        for (layer, m), group in part.groupby(["layer", "m"], sort=False):
            rows = group.set_index("implementation")
            ours = rows.loc[OURS]
            table.add_row(
                layer,
                str(m),
                f"{ours.median_ms:.3f}",
                f"{ours.gb_per_s:.1f}",
                f"{ours.gflops:.0f}",
                *(f"{share:.0%}" for share in (ours.of_limit, ours.of_peak)[: len(limits)]),
                *(f"{rows.loc[o].ours_speedup:.2f}" for o in others),
                f"{ours.calc_diff:.0e}",
            )
        console.print(table)
        _print_layer(part, others)


def _limits(frame: pd.DataFrame) -> list[str]:
    """What nothing can be faster than: the memory, and where it was measured, the multiplier."""
    return [frame.limit.iloc[0], *([PEAK] if PEAK in set(frame.implementation) else [])]


def _print_layer(part: pd.DataFrame, others: list[str]) -> None:
    """The layers together, as one decoder layer runs them: sums of medians."""
    sums = part.pivot_table(index="m", columns="implementation", values="median_ms", aggfunc="sum")
    limits = _limits(part)
    shares = [f"of {name}" for name in limits]
    table = Table("m", "ms", *shares, *(f"x {o}" for o in others), title="all layers together (sums of medians)")
    for m, row in sums.iterrows():
        of_limits = (f"{row[name] / row[OURS]:.0%}" for name in limits)
        table.add_row(str(m), f"{row[OURS]:.3f}", *of_limits, *(f"{row[o] / row[OURS]:.2f}" for o in others))
    console.print(table)


if __name__ == "__main__":
    typer.run(bench)
