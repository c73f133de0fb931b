"""Linears of Qwen3-8B against a copy and against the framework's own ways; predictions beside what was measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qwen3_fp8_ascend.evaluate.validate import layer_times
from qwen3_fp8_ascend.evaluate.validate.cases import Case, Context, Found
from qwen3_fp8_ascend.evaluate.validate.checks import FULL
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.contenders import Peer, Prepared, Weights, able, framework, ours
from qwen3_fp8_ascend.testing.judges import CALC_DIFF, Problem, calc_diff, random_problem
from qwen3_fp8_ascend.testing.timing import Timing, cache_bytes, interleave, settle

ROWS = (1, 16, 64, 512)
ON_CPU = {"o": FULL["o"]}
SECONDS, SECONDS_ON_CPU = 1.0, 4.0
"""For all contenders of one layer and number of rows together."""

PREDICTIONS = Path(__file__).with_name("predictions.json")
"""Written by `python -m benchmarks.predictions`."""


def times(context: Context) -> Iterator[Case]:
    """One case for each linear: contenders are laid out once and timed for each number of rows. Then whole layers."""
    layers = FULL if context.device.has_graphs else ON_CPU
    for layer, (n, k) in layers.items():
        memory = 4 * max(n * k * 2, cache_bytes(context.device))
        yield Case(layer, functools.partial(_layer, context, layer, n, k), memory)
    yield from layer_times.cases(context, layers)


def _layer(context: Context, layer: str, n: int, k: int, seed: int) -> Found:
    device, found = context.device, Found()
    problem = random_problem(max(ROWS), (n,), k, seed=seed)
    there = problem.to(device.place)
    weights = Weights(there.weight, there.scale, cache_bytes(device), device)
    peers, prepared, missing = _lay_out([*ours(device), *framework(device)], weights)
    lines: list[dict[str, Any]] = []
    for rows in ROWS:
        x = there.x[:rows].contiguous()
        contenders, reasons = able(prepared, x, {name for name in prepared if peers[name].backend})
        missing |= {f"{name}, {rows} rows": reason for name, reason in reasons.items()}
        # A few tokens and rows of the weight: `linear` and `prefill` have judged what is timed.
        part = Problem(problem.x[: min(rows, 4)], problem.weight[:128], problem.scale[:1])
        for name in [name for name in contenders if peers[name].backend]:
            got = contenders[name](0)
            assert isinstance(got, torch.Tensor)
            off = calc_diff(got[:4, :128].cpu(), part.oracle(Activation(peers[name].computes)))
            fault = f"{name} is wrong at {rows} rows: calc_diff {off:.1e}"
            found.hold(f"calc_diff of {name}, {rows} rows", off, CALC_DIFF, fault)
        if rows == ROWS[0]:
            settle(contenders, weights.copies(1), device)
        seconds = SECONDS if device.has_graphs else SECONDS_ON_CPU
        timings = interleave(contenders, seconds=seconds, device=device)
        lines += [_line(context, layer, n, k, rows, peers[name], timings) for name in timings]
    found.values = {"lines": lines, "not timed": missing}
    return found


def _lay_out(peers: list[Peer], weights: Weights) -> tuple[dict[str, Peer], dict[str, Prepared], dict[str, str]]:
    """Contenders that can run, and the reasons of the others."""
    able, prepared, missing = {}, {}, {}
    for peer in peers:
        reason = peer.unavailable()
        if reason is None:
            try:
                prepared[peer.name] = peer.prepare(weights)
                able[peer.name] = peer
            except (RuntimeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            missing[peer.name] = reason
    return able, prepared, missing


def _line(
    context: Context, layer: str, n: int, k: int, rows: int, peer: Peer, timings: dict[str, Timing]
) -> dict[str, Any]:
    found = layer_times.line(layer, n * k, rows, peer, timings) | {"n": n, "k": k}
    if peer.backend and peer.computes == "w8a8":
        found["predicted_over_bf16"] = predicted(context.device.name, peer.backend, layer, rows)
    return found


@functools.cache
def predictions() -> list[dict[str, Any]]:
    """What models of the chips say of Qwen3-8B's linears; each line names its source."""
    found: list[dict[str, Any]] = json.loads(PREDICTIONS.read_text(encoding="utf-8"))["lines"]
    return found


def predicted(chip: str, backend: str, layer: str, rows: int) -> float | None:
    """BF16's time over the backend's by the model of the chip, None where there is no prediction."""
    for line in predictions():
        if (line["chip"], line["backend"], line["layer"], line["m"]) == (chip, backend, layer, rows):
            return float(line["over_bf16"])
    return None
