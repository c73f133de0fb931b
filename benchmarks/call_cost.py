"""What a call of a linear costs beside its work: with warm caches, and when the last weight has passed through them.

    python -m benchmarks.call_cost

The weight is a single panel, so that almost nothing is left but the call. In a model every linear reads its weight
through all caches, and finds neither Python nor torch's dispatcher in them when it is called again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import cpu
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.provenance import provenance
from qwen3_fp8_ascend.testing.contenders import on_huge_pages
from qwen3_fp8_ascend.testing.judges import random_problem

ROUNDS = 100
BYTES_BETWEEN = 200_000_000
"""What is read before a call that shall find nothing in the caches."""

console = Console(width=max(140, Console().width))


@torch.no_grad()
def call_cost() -> None:
    """Print the median microseconds of a call, each contender in turn with the others."""
    problem = random_problem(1, (cpu.PANEL_ROWS,), 128)
    packed = ops.pack_weight(problem.weight, problem.scale, backend="cpu")
    w8a8 = cpu.QUANTIZATIONS[Activation.W8A8]
    operands = (problem.x, *packed.tensors, None, packed.n, packed.k, packed.grid.block.k, w8a8)
    bf16 = problem.weight.bfloat16()
    passing = on_huge_pages(torch.zeros(BYTES_BETWEEN, dtype=torch.uint8))
    operator = torch.ops.qwen3_fp8_ascend
    calls: dict[str, Callable[[], object]] = {
        "ops.block_linear": lambda: ops.block_linear(problem.x, packed),
        "ops.block_linear, x in three dimensions": lambda: ops.block_linear(problem.x[None], packed),
        "torch.ops.qwen3_fp8_ascend.cpu_block_linear": lambda: operator.cpu_block_linear(*operands),
        "the backend's linear, in Python": lambda: cpu.linear(problem.x, packed, None, Activation.W8A8),
        "F.linear in bf16": lambda: torch.nn.functional.linear(problem.x, bf16),
        "nothing": lambda: None,
    }
    warm: dict[str, list[float]] = {name: [] for name in calls}
    cold: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            calls[name]()
            warm[name].append(_seconds(calls[name]))
            operator.cpu_read(passing)
            cold[name].append(_seconds(calls[name]))
    console.print(", ".join(f"{key} {value}" for key, value in provenance().items()), highlight=False)
    table = Table("call", "µs, caches warm", f"µs, behind {BYTES_BETWEEN // 10**6} MB")
    for name in calls:
        table.add_row(name, *(f"{np.median(times[name]) * 1e6:.1f}" for times in (warm, cold)))
    console.print(table)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(call_cost)
