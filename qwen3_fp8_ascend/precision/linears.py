"""Every linear of a model judged by itself: the same activations to the backend and to the specification.

In W8A8 one flipped rounding moves an activation by a whole code, and layers amplify it, so whole models are compared
above a noise floor. A linear by itself has no such floor: here the specification computes the model's activations, and
at each linear the backend gets the same input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.precision.direct import BlockFp8Linear
from qwen3_fp8_ascend.precision.metrics import closeness
from qwen3_fp8_ascend.provenance import command, provenance


@dataclass(frozen=True)
class Judged:
    """All linears of a model together, over all prompts; see `metrics.Closeness`. `equal` is the share of outputs
    whose bits are those of the fp64 oracle rounded once to the activations' dtype."""

    name: str
    against: str
    linears: int
    vectors: int
    cosine: float
    min_cosine: float
    p99_rel: float
    max_rel: float
    equal: float


def judge_linears(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    backend: str,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Judged]:
    """Judge a backend and the fp32 specification by the fp64 one, on a model loaded with the backend "reference".

    Raises:
        BlockFp8Error: the backend cannot run here.
    """
    results: dict[str, list[tuple[Any, float]]] = {backend: [], "reference": []}
    hooks = []
    linears = [module for module in model.modules() if isinstance(module, BlockFp8Linear)]
    for layer in linears:
        assert layer.packed is not None
        weight, scale = layer.packed.tensors[:2]
        packed = ops.pack_weight(weight, scale, backend)

        def look(
            layer: BlockFp8Linear, args: Any, out: torch.Tensor, packed: Any = packed, w: Any = weight, s: Any = scale
        ) -> None:
            x = args[0].flatten(0, -2)
            oracle = reference.block_linear(x, w, s, activation=layer.activation, compute_dtype=torch.float64)
            theirs = ops.block_linear(x, packed, None, layer.activation)
            mine = out.flatten(0, -2) if layer.bias is None else out.flatten(0, -2) - layer.bias
            for name, got in ((backend, theirs), ("reference", mine)):
                equal = float((got == oracle.to(got.dtype)).double().mean())
                results[name].append((closeness(got.double().cpu().numpy(), oracle.cpu().numpy()), equal))

        hooks.append(layer.register_forward_hook(look))
    try:
        with torch.inference_mode():
            for number, prompt in enumerate(prompts, 1):
                progress(f"linears: prompt {number} of {len(prompts)}")
                ids = torch.tensor([tokenizer(prompt).input_ids], device=next(model.parameters()).device)
                model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [_together(name, len(linears), found) for name, found in results.items()]


def _together(name: str, linears: int, found: list[tuple[Any, float]]) -> Judged:
    vectors = sum(c.vectors for c, _ in found)
    return Judged(
        name,
        "reference-fp64",
        linears,
        vectors,
        sum(c.cosine * c.vectors for c, _ in found) / vectors,
        min(c.min_cosine for c, _ in found),
        max(c.p99_rel for c, _ in found),
        max(c.max_rel for c, _ in found),
        sum(equal * c.vectors for c, equal in found) / vectors,
    )


def document(model: Path, activation: str, judged: Sequence[Judged]) -> dict[str, Any]:
    """The JSON form that `report` reads."""
    return {
        "kind": "linears",
        "version": 1,
        "provenance": provenance(),
        "command": command(),
        "model": model.name,
        "activation": activation,
        "rows": [asdict(row) for row in judged],
    }
