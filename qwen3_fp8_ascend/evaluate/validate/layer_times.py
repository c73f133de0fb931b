"""Whole layers in one graph: the four linears of a decoder layer one after the other, and a layer of experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import grouped
from qwen3_fp8_ascend.backends.registry import PackedWeight, usable_backends
from qwen3_fp8_ascend.evaluate.validate.cases import Case, Context, Found
from qwen3_fp8_ascend.format import Activation, BlockGrid
from qwen3_fp8_ascend.testing.contenders import Peer, Prepared, Weights, able, framework, ours
from qwen3_fp8_ascend.testing.experts import ExpertsProblem, judge_layer, random_experts
from qwen3_fp8_ascend.testing.judges import random_problem
from qwen3_fp8_ascend.testing.timing import Contender, Timing, cache_bytes, interleave

TOGETHER = "together"
"""The layer's name in a line of times."""
ROWS = (1, 8, 16, 64, 128, 512)
EXPERTS = (128, 8, 2048, 768)
"""(experts, top k, hidden, intermediate) of Qwen3-30B-A3B."""
EXPERT_ROWS = (1, 16, 64)
SECONDS = 1.5
"""For all contenders and a number of rows."""


def cases(context: Context, shapes: Mapping[str, tuple[int, int]]) -> Iterator[Case]:
    """On a device with graphs the linears together; experts where torch has a grouped product in bf16 beside ours."""
    if not context.device.has_graphs:
        return
    rotated = 8 * len(shapes) * cache_bytes(context.device)
    yield Case(TOGETHER, functools.partial(_together, context, shapes), rotated)
    if context.device.kind == "cuda":
        experts, _, hidden, intermediate = EXPERTS
        memory = 12 * experts * 3 * hidden * intermediate
        yield Case("experts", functools.partial(_experts, context), memory)


def _together(context: Context, shapes: Mapping[str, tuple[int, int]], seed: int) -> Found:
    """`times` has judged each layer's contenders by then."""
    device, found = context.device, Found()
    peers = {peer.name: peer for peer in (*ours(device), *framework(device)) if peer.unavailable() is None}
    prepared: dict[str, list[Prepared]] = {}
    activations: list[torch.Tensor] = []
    for n, k in shapes.values():
        there = random_problem(max(ROWS), (n,), k, seed=seed).to(device.place)
        weights = Weights(there.weight, there.scale, cache_bytes(device), device)
        activations.append(there.x)
        for name, peer in peers.items():
            prepared.setdefault(name, []).append(peer.prepare(weights))
    lines: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    size = sum(n * k for n, k in shapes.values())
    for rows in ROWS:

        def whole(parts: list[Prepared], rows: int = rows) -> Prepared:
            calls = [part(x[:rows].contiguous()) for part, x in zip(parts, activations, strict=True)]
            return lambda _: lambda number: [call(number) for call in calls]

        chosen = {}
        for name, parts in prepared.items():
            try:
                chosen[name] = whole(parts)
            except (RuntimeError, ValueError) as error:
                if peers[name].backend:
                    raise
                missing[f"{name}, {rows} rows"] = f"{type(error).__name__}: {error}"
        contenders, reasons = able(chosen, activations[0], {name for name in chosen if peers[name].backend})
        missing |= {f"{name}, {rows} rows": reason for name, reason in reasons.items()}
        timings = interleave(contenders, seconds=SECONDS, device=device)
        lines += [line(TOGETHER, size, rows, peers[name], timings) for name in timings]
    found.values = {"lines": lines, "not timed": missing}
    return found


def line(layer: str, size: int, rows: int, peer: Peer, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """A contender's times of a layer of so many weights, beside a copy and the framework's BF16 if they were timed."""
    timing = timings[peer.name]
    return {
        "layer": layer,
        "m": rows,
        "contender": peer.name,
        "computes": peer.computes,
        "clock": timing.clock,
        "rounds": len(timing.seconds),
        "median_us": timing.median * 1e6,
        "p20_us": timing.p20 * 1e6,
        "p80_us": timing.p80 * 1e6,
        "gb_per_s": peer.bytes_per_weight * size / timing.median / 1e9,
        "of_copy": timing.speedup_over(timings["copy"]) if "copy" in timings else None,
        "over_bf16": timing.speedup_over(timings["torch bf16"]) if "torch bf16" in timings else None,
    }


def _experts(context: Context, seed: int) -> Found:
    """Every implementation gets the same tokens; each call has the next copy of the layer, so that none is cached."""
    device, found = context.device, Found()
    problem = random_experts(max(EXPERT_ROWS), *EXPERTS, seed=seed)
    there = problem.to(device.place)
    size = problem.w13.numel() + problem.w2.numel()
    copies = range(max(2, -(-cache_bytes(device) // size)))
    layers: dict[str, tuple[Peer, Callable[[ExpertsProblem], Contender]]] = {}
    for backend in usable_backends(device.place.type, slow=False):
        if backend.pack_experts is None:
            continue
        packed = [there.pack(backend.name) for _ in copies]
        for activation in (Activation.W8A8, Activation.W8A16):
            peer = Peer(f"{backend.name} {activation}", 1, activation, _prepared, backend=backend.name)
            layers[peer.name] = (peer, functools.partial(_ours, packed, activation))
    missing: dict[str, str] = {}
    if hasattr(torch.nn.functional, "grouped_mm"):
        expanded = [_in_bf16(there) for _ in copies]
        layers["torch bf16"] = (Peer("torch bf16", 2, "bf16", _prepared), functools.partial(_bf16, expanded))
    else:
        missing["torch bf16"] = "this torch has no grouped product"
    lines: list[dict[str, Any]] = []
    for rows in EXPERT_ROWS:
        few = there.with_tokens(there.x[:rows], there.topk_weights[:rows], there.topk_ids[:rows])
        for name, (peer, layer) in layers.items():
            if peer.backend:
                got = layer(few)(0)
                assert isinstance(got, torch.Tensor)
                first = problem.with_tokens(problem.x[:1], problem.topk_weights[:1], problem.topk_ids[:1])
                faults = judge_layer(got[:1], first, Activation(peer.computes)).faults
                found.faults += [f"{name} is wrong at {rows} rows: {fault}" for fault in faults]
        prepared = {name: _for_tokens(layer, few) for name, (_, layer) in layers.items()}
        contenders, reasons = able(prepared, few.x, {name for name, (peer, _) in layers.items() if peer.backend})
        missing |= {f"{name}, {rows} rows": reason for name, reason in reasons.items()}
        timings = interleave(contenders, seconds=SECONDS, device=device)
        met = len(few.topk_ids.unique()) * size // EXPERTS[0]
        lines += [line(f"experts, {len(few.topk_ids.unique())} met", met, rows, layers[n][0], timings) for n in timings]
    found.values = {"lines": lines, "not timed": missing}
    return found


def _for_tokens(layer: Callable[[ExpertsProblem], Contender], few: ExpertsProblem) -> Prepared:
    return lambda _: layer(few)


def _prepared(weights: Weights) -> Prepared:
    raise NotImplementedError("experts are laid out by the case that times them")


def _ours(packed: list[tuple[PackedWeight, PackedWeight]], activation: Activation, few: ExpertsProblem) -> Contender:
    return lambda number: ops.block_experts(
        few.x, *packed[number % len(packed)], few.topk_weights, few.topk_ids, activation
    )


def _in_bf16(problem: ExpertsProblem) -> tuple[PackedWeight, PackedWeight]:
    """The layer expanded, in the form that `grouped.block_experts` takes."""

    def expanded(codes: torch.Tensor, scales: torch.Tensor, grid: BlockGrid) -> PackedWeight:
        weights = [reference.dequantize_weight(c, s, grid) for c, s in zip(codes, scales, strict=True)]
        return PackedWeight("torch bf16", grid, (torch.stack(weights),), groups=len(weights))

    return (
        expanded(problem.w13, problem.w13_scale, problem.w13_grid),
        expanded(problem.w2, problem.w2_scale, problem.w2_grid),
    )


def _bf16(expanded: list[tuple[PackedWeight, PackedWeight]], few: ExpertsProblem) -> Contender:
    """The same layer around torch's grouped product."""

    def product(
        x: torch.Tensor, packed: PackedWeight, ends: torch.Tensor, _: Activation, dtype: torch.dtype
    ) -> torch.Tensor:
        out: torch.Tensor = torch.nn.functional.grouped_mm(
            x.to(torch.bfloat16), packed.tensors[0].transpose(1, 2), offs=ends.to(torch.int32)
        )
        return out.to(dtype)

    return lambda number: grouped.block_experts(
        product, few.x, *expanded[number % len(expanded)], few.topk_weights, few.topk_ids, Activation.W8A16
    )
