"""A layer of experts on this machine's CPU, against the read of the bytes that it touches and vLLM's bf16 experts.

Correctness first: nothing is timed before it agrees with the fp64 oracle. Then, for each batch and thread count, all
implementations in turn in one process (`interleave`); medians, and ratios of neighbours. Tokens go to experts
at random; in a round all implementations get the same ones, and copies of the weights take turns from round to round.

    python -m benchmarks.bench_experts --document      # all of it, and the table in docs/experts.md
    python -m benchmarks.bench_experts --rows 1 --threads 1
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.documents import insert_table
from benchmarks.peers import READ_AHEAD, best_read_ahead, vllm_operator_missing
from benchmarks.shapes import EXPERT_ROWS, EXPERTS, ExpertsShape
from benchmarks.steps import steps
from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import cpu, select_backend
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.provenance import provenance
from qwen3_fp8_ascend.testing.contenders import on_huge_pages
from qwen3_fp8_ascend.testing.experts import ExpertsProblem, oracle, random_experts
from qwen3_fp8_ascend.testing.judges import CALC_DIFF, calc_diff
from qwen3_fp8_ascend.testing.timing import Timing, cache_bytes, interleave, settle

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DOCUMENT = ROOT / "docs" / "experts.md"
OURS, READ, BF16 = "w8a8", "read", "vllm bf16"
ROUTINGS = 64
console = Console(width=max(140, Console().width))

Run = Callable[[int], object]
Packed = tuple[ops.PackedWeight, ops.PackedWeight]


class Tokens(NamedTuple):
    """A batch, and where its tokens go in each of several rounds."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    ids: list[torch.Tensor]

    @property
    def touched(self) -> list[int]:
        """Experts that are met, in each round."""
        return [len(ids.unique()) for ids in self.ids]


def bench(
    model: Annotated[str, typer.Option(help=f"Shape of {', '.join(EXPERTS)}.")] = "qwen3-30b-a3b",
    rows: Annotated[list[int] | None, typer.Option(help="Tokens in the batch; repeatable.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Threads; repeatable.")] = None,
    isa: Annotated[str | None, typer.Option(help="Instruction set; default: the machine's best.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each table row's round of implementations.")] = 10.0,
    output: Annotated[Path | None, typer.Option(help="CSV to write; default: benchmarks/results/.")] = None,
    document: Annotated[bool, typer.Option("--document", help="Renew the table in docs/experts.md.")] = False,
) -> None:
    """Measure and print; exit code 1 if a result is wrong."""
    torch.set_grad_enabled(False)
    select_backend("cpu", "cpu")
    if isa is not None:
        cpu.set_isa(isa)
    shape = EXPERTS[model]
    batches, counts = rows or list(EXPERT_ROWS), threads or sorted({1, torch.get_num_threads()})
    problem = random_experts(max(batches), shape.experts, shape.top_k, shape.hidden, shape.intermediate)
    with steps(console, len(batches) * len(counts)) as said:
        said.begin("laying out the weights")
        packed, bf16, memory = lay_out(problem)
        ahead = best_read_ahead(memory.chunk(len(READ_AHEAD)), seconds=3)
        facts = provenance() | {"model": model, "isa": cpu.isa(), "read_ahead": ahead}
        console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
        found: list[dict[str, Any]] = []
        for m in batches:
            tokens = route(problem.x[:m].contiguous(), shape)
            said.begin(f"m={m}: against the oracle")
            errors = {str(a): check(problem, packed[0], tokens, a) for a in Activation}
            runs = implementations(packed, bf16, memory, ahead, tokens, bytes_of_an_expert(problem))
            if m == batches[0]:
                said.begin("settling")
                settle(runs, ROUTINGS)
            for count in counts:
                said.begin(f"m={m} threads={count}")
                torch.set_num_threads(count)
                timings = interleave(runs, seconds=seconds)
                found += [
                    row(name, timings, errors) | {"m": m, "threads": count, "experts": sum(tokens.touched) / ROUTINGS}
                    for name in runs
                ]
                torch.set_num_threads(max(counts))
                share = f"{timings[OURS].speedup_over(timings[READ]):.0%} of the {READ}"
                said.end(f"m={m} threads={count}: {timings[OURS].median * 1e3:.3f} ms, {share}")
    frame = pd.DataFrame(found)
    flops = 2 * 3 * shape.hidden * shape.intermediate * shape.top_k * frame.m
    frame["gflops"] = flops / frame.median_ms / 1e6
    frame["gb_per_s"] = frame.bytes_per_weight * frame.experts * bytes_of_an_expert(problem) / frame.median_ms / 1e6
    for key, value in facts.items():
        frame[key] = value
    path = output or RESULTS / f"experts-{model}-{cpu.isa()}-{datetime.now():%Y%m%d-%H%M}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g")
    show(frame)
    console.print(f"wrote {path}", highlight=False)
    if document:
        insert_table(DOCUMENT, f"experts {cpu.isa()}", markdown(frame, path))


def lay_out(problem: ExpertsProblem) -> tuple[list[Packed], list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Copies of the layer in FP8 and bf16, each set larger than the caches, and as many bytes to read."""
    layer_bytes = problem.w13.numel() + problem.w2.numel()
    least = 2 * cache_bytes()
    packed = [problem.pack("cpu") for _ in range(max(2, -(-least // layer_bytes)))]
    bf16 = []
    if (reason := bf16_missing()) is None:
        for _ in range(max(2, -(-least // (2 * layer_bytes)))):
            w13 = prepacked(problem.w13, problem.w13_scale, problem.w13_grid)
            bf16.append((w13, prepacked(problem.w2, problem.w2_scale, problem.w2_grid)))
    else:
        console.print(f"[yellow]not measured:[/] {BF16}: {reason}")
    memory = on_huge_pages(torch.ones(max(2 * layer_bytes, least), dtype=torch.uint8))
    return packed, bf16, memory


def bf16_missing() -> str | None:
    if cpu.ISAS[-1] != "amx":
        return "this benchmark knows vLLM's layouts for x86-64 only"
    return vllm_operator_missing("cpu_fused_moe")


def vllm_kind() -> str:
    """The layout that vLLM takes on this processor (`X86CPUUnquantizedExperts`, `CPUUnquantizedExperts`)."""
    return "amx" if torch.cpu._is_amx_tile_supported() else "vec"


def prepacked(codes: torch.Tensor, scales: torch.Tensor, grid: Any) -> torch.Tensor:
    experts = [reference.dequantize_weight(c, s, grid) for c, s in zip(codes, scales, strict=True)]
    weights = torch.stack(experts)
    out = on_huge_pages(weights)
    torch.ops._C.prepack_moe_weight(weights, out, vllm_kind())
    return out


def bytes_of_an_expert(problem: ExpertsProblem) -> int:
    return (problem.w13[0].numel() + problem.w2[0].numel()) + 4 * (
        problem.w13_scale[0].numel() + problem.w2_scale[0].numel()
    )


def route(x: torch.Tensor, shape: ExpertsShape) -> Tokens:
    """Every token to `top_k` different experts at random, with weights that add up to 1."""
    generator = torch.Generator().manual_seed(len(x))
    ids = [
        torch.rand(len(x), shape.experts, generator=generator).topk(shape.top_k).indices.int() for _ in range(ROUTINGS)
    ]
    weights = [torch.rand(len(x), shape.top_k, generator=generator).softmax(1) for _ in range(ROUTINGS)]
    return Tokens(x, weights, ids)


def implementations(
    packed: list[Packed],
    bf16: list[tuple[torch.Tensor, torch.Tensor]],
    memory: torch.Tensor,
    ahead: int,
    tokens: Tokens,
    expert_bytes: int,
) -> dict[str, Run]:
    sizes = [count * expert_bytes for count in tokens.touched]

    def ours(activation: Activation, offset: int) -> Run:
        def run(i: int) -> object:
            r = i % ROUTINGS
            copy = packed[(i + offset) % len(packed)]
            return ops.block_experts(tokens.x, *copy, tokens.weights[r], tokens.ids[r], activation)

        return run

    def read(i: int) -> object:
        size = sizes[i % ROUTINGS]
        places = max(1, memory.numel() // size)
        return torch.ops.qwen3_fp8_ascend.cpu_read(memory[i % places * size :][:size], ahead)

    out: dict[str, Run] = {OURS: ours(Activation.W8A8, 0), str(Activation.W8A16): ours(Activation.W8A16, 1), READ: read}
    if bf16:
        y, kind = torch.empty_like(tokens.x), vllm_kind()

        def vllm(i: int) -> object:
            r = i % ROUTINGS
            w13, w2 = bf16[i % len(bf16)]
            routing = tokens.weights[r], tokens.ids[r]
            return torch.ops._C.cpu_fused_moe(y, tokens.x, w13, w2, None, None, *routing, False, "silu", kind)

        out[BF16] = vllm
    return out


def check(problem: ExpertsProblem, packed: Packed, tokens: Tokens, activation: Activation) -> float:
    """calc_diff of the first tokens from the fp64 oracle; stops the benchmark if it is too large."""
    few = min(len(tokens.x), 4)
    got = ops.block_experts(tokens.x, *packed, tokens.weights[0], tokens.ids[0], activation)[:few]
    part = problem.with_tokens(tokens.x[:few], tokens.weights[0][:few], tokens.ids[0][:few])
    error = calc_diff(got, oracle(part, activation).value)
    if error > CALC_DIFF:
        console.print(f"[red]{activation} is wrong:[/] calc_diff {error:.2e} with {len(tokens.x)} tokens")
        raise typer.Exit(1)
    return error


def row(name: str, timings: dict[str, Timing], errors: dict[str, float]) -> dict[str, Any]:
    timing = timings[name]
    return {
        "implementation": name,
        "bytes_per_weight": 2 if name == BF16 else 1,
        "median_ms": timing.median * 1e3,
        "p20_ms": timing.p20 * 1e3,
        "p80_ms": timing.p80 * 1e3,
        "rounds": len(timing.seconds),
        "read_limit": timing.speedup_over(timings[READ]),
        "ours_speedup": timings[OURS].speedup_over(timing),
        "calc_diff": errors.get(name, float("nan")),
    }


def cells(frame: pd.DataFrame) -> list[list[str]]:
    """One row a thread count and batch: our time and rates, and our speed-up over the others."""
    out = []
    for (count, m), group in frame.groupby(["threads", "m"]):
        named = group.set_index("implementation")
        ours = named.loc[OURS]
        others = [
            f"{named.loc[o].ours_speedup:.2f}" if o in named.index else "-" for o in (str(Activation.W8A16), BF16)
        ]
        rates = [f"{ours.median_ms:.2f}", f"{ours.gb_per_s:.1f}", f"{ours.gflops:.0f}", f"{ours.read_limit:.0%}"]
        out.append([str(count), str(m), f"{ours.experts:.0f}", *rates, *others])
    return out


HEADINGS = ("threads", "m", "experts", "ms", "GB/s", "GFLOP/s", "of the raw read", "× w8a16", "× vllm bf16")


def show(frame: pd.DataFrame) -> None:
    table = Table(*HEADINGS)
    for values in cells(frame):
        table.add_row(*values)
    console.print(table)


def markdown(frame: pd.DataFrame, csv: Path) -> str:
    facts = frame.iloc[0]
    lines = [
        f"{facts['model']}, one layer; {facts['cpu']}, {facts['cores']} cores, {facts['isa']}; {facts['date']}, "
        f"commit {facts['commit']}, torch {facts['torch']}; `{csv.name}`.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(values) + " |" for values in cells(frame)),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(bench)
