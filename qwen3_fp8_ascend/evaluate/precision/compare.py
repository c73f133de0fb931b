"""Runs against a reference, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen3_fp8_ascend.evaluate.precision import metrics
from qwen3_fp8_ascend.evaluate.precision.runs import Run, check_comparable
from qwen3_fp8_ascend.provenance import command, provenance

BOUND_COSINE = 0.99999
BOUND_TOP1 = 0.999
"""What a backend has to reach against the reference in the same arithmetic, where the noise floor itself does."""


@dataclass(frozen=True)
class Row:
    """One run against the reference. What the runs' files do not allow is None.

    `cosine`, `min_cosine`, `p99_rel`, `max_rel`: logits, see `metrics.Closeness`. `layers`: the same of all layers'
    outputs together, and `layer_rel` the largest relative error of each layer. `kl` are nats a token; `kl_from` says
    whether they come from all logits or, as a lower bound, from the most probable tokens. `logprob_distance` is the
    mean absolute difference of the tokens' log-probabilities. `greedy_match` is the share of equal tokens of the
    greedy continuations, `greedy_prompts` the share of prompts whose whole continuations are equal. `within` says
    whether the logits' mean cosine and the top-1 agreement reach the bound, None for a run of another checkpoint or
    arithmetic, or without logits. `made` are the facts of the run: where, when and how it was computed.
    """

    name: str
    against: str
    tokens: int
    cosine: float | None
    min_cosine: float | None
    p99_rel: float | None
    max_rel: float | None
    layers: dict[str, float] | None
    layer_rel: list[float] | None
    kl_mean: float
    kl_p99: float
    kl_from: str
    top1_agreement: float
    logprob_distance: float
    greedy_match: float
    greedy_prompts: float
    perplexity: float
    perplexity_reference: float
    within: bool | None
    made: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(run: Run, reference: Run) -> Row:
    """Compare a run with the reference.

    Raises:
        BlockFp8Error: the runs are not of the same tokens.
    """
    check_comparable(run, reference)
    logits = None
    if run.logits is not None and reference.logits is not None and run.logits.shape == reference.logits.shape:
        logits = metrics.closeness(run.logits, reference.logits)
        kl, kl_from = metrics.kl_divergence(run.logits, reference.logits), "all logits"
    else:
        kl_from = f"top {min(run.top_ids.shape[1], reference.top_ids.shape[1])}"
        kl = metrics.lumped_kl_divergence(run.top_ids, run.top_logprobs, reference.top_ids, reference.top_logprobs)
    layers, layer_rel = _compare_layers(run, reference)
    top1 = metrics.agreement(run.top_ids[:, 0], reference.top_ids[:, 0])
    within = None
    if logits is not None and _arithmetic(run) == _arithmetic(reference):
        within = logits.cosine >= BOUND_COSINE and top1 >= BOUND_TOP1
    steps = min(run.greedy.shape[1], reference.greedy.shape[1])
    same = run.greedy[:, :steps] == reference.greedy[:, :steps]
    return Row(
        name=run.name,
        against=reference.name,
        tokens=run.tokens,
        cosine=None if logits is None else logits.cosine,
        min_cosine=None if logits is None else logits.min_cosine,
        p99_rel=None if logits is None else logits.p99_rel,
        max_rel=None if logits is None else logits.max_rel,
        layers=layers,
        layer_rel=layer_rel,
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_from=kl_from,
        top1_agreement=top1,
        logprob_distance=float(np.abs(run.logprobs.astype(np.float64) - reference.logprobs).mean()),
        greedy_match=float(same.mean()),
        greedy_prompts=float(same.all(axis=1).mean()),
        perplexity=metrics.perplexity(run.logprobs),
        perplexity_reference=metrics.perplexity(reference.logprobs),
        within=within,
        made=run.facts,
    )


def _arithmetic(run: Run) -> tuple[Any, ...]:
    """What two runs must share to differ in nothing but the backend."""
    return run.model, run.facts.get("activation"), run.facts.get("dtype")


def _compare_layers(run: Run, reference: Run) -> tuple[dict[str, float] | None, list[float] | None]:
    a, b = run.layers, reference.layers
    if a is None or b is None or a.shape != b.shape:
        return None, None
    each = [metrics.closeness(x, y) for x, y in zip(a, b, strict=True)]
    together = {
        "cosine": float(np.mean([c.cosine for c in each])),
        "min_cosine": min(c.min_cosine for c in each),
        "p99_rel": float(np.max([c.p99_rel for c in each])),
        "max_rel": max(c.max_rel for c in each),
    }
    return together, [c.max_rel for c in each]


def document(reference: Run, rows: Sequence[Row], floor: Row | None) -> dict[str, Any]:
    """The JSON form that `report` reads."""
    return {
        "kind": "precision",
        "version": 1,
        "provenance": provenance(),
        "command": command(),
        "bound": {"cosine": BOUND_COSINE, "top1": BOUND_TOP1},
        "reference": {"name": reference.name, "model": reference.model, "provenance": reference.facts},
        "rows": [row.to_dict() for row in rows],
        "floor": None if floor is None else floor.to_dict(),
    }
