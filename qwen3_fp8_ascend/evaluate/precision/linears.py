"""Every linear and every decoder layer of a model judged by itself: the same input to the backend and to the oracle.

In W8A8 one flipped rounding moves an activation by a whole code, and layers amplify it, so whole models are compared
above a noise floor. A linear by itself has no such floor, and within one decoder layer little is amplified: here the
specification computes the model's activations on the CPU, and at each linear and each layer the backend gets the
same input.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_fp8_ascend.evaluate.precision.compare import BOUND_COSINE
from qwen3_fp8_ascend.evaluate.precision.direct import WIDE, BlockFp8Linear, device_name, encode
from qwen3_fp8_ascend.evaluate.precision.metrics import Closeness, closeness
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.provenance import command, provenance

LINEAR, LAYER = "linear", "decoder layer"


@dataclass(frozen=True)
class Judged:
    """All linears or decoder layers of a model together, over all prompts; see `metrics.Closeness`.

    `near` is the share of vectors whose cosine reaches the bound of whole runs (`compare.BOUND_COSINE`), `equal` the
    share of a linear's outputs whose bits are those of the oracle: fp64 sums, rounded once to the activations' dtype.
    """

    name: str
    against: str
    unit: str
    units: int
    vectors: int
    cosine: float
    min_cosine: float
    p99_rel: float
    max_rel: float
    near: float
    equal: float | None


class Elsewhere(torch.nn.Module):
    """A linear whose input comes from the CPU and whose output returns there."""

    def __init__(self, linear: BlockFp8Linear, device: str) -> None:
        super().__init__()
        self.linear, self.device = linear, device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.to(self.device)).to(x.device)


def judge_linears(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    backend: str,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> list[Judged]:
    """Judge a backend and the fp32 specification by the fp64 one.

    `model` is on the CPU and was loaded with the backend "reference".
    Raises:
        BlockFp8Error: the backend cannot run here.
    """
    ours: dict[torch.nn.Module, torch.nn.Module] = {}
    exact: dict[torch.nn.Module, torch.nn.Module] = {}
    for linear in model.modules():
        if isinstance(linear, BlockFp8Linear):
            assert linear.original is not None
            weight, scale = linear.original
            bias = None if linear.bias is None else linear.bias.to(device)
            theirs = BlockFp8Linear(weight.to(device), scale.to(device), linear.grid, bias, backend, linear.activation)
            ours[linear] = Elsewhere(theirs, device)
            exact[linear] = BlockFp8Linear(weight, scale, linear.grid, linear.bias, WIDE, linear.activation)
    layers = _decoder_layers(model)
    units = {LINEAR: len(ours), LAYER: len(layers)}
    found: dict[tuple[str, str], list[tuple[Closeness, np.ndarray, float | None]]] = {}
    hooks = []

    def watch(module: torch.nn.Module, unit: str, backends: torch.nn.Module, oracles: torch.nn.Module) -> None:
        def look(module: torch.nn.Module, args: Any, keywords: dict[str, Any], out: Any) -> None:
            oracle = _vectors(oracles(*args, **keywords))
            for name, got in ((backend, _vectors(backends(*args, **keywords))), ("reference", _vectors(out))):
                equal = float((got == oracle).double().mean()) if unit == LINEAR else None
                a, b = got.double().numpy(), oracle.double().numpy()
                found.setdefault((unit, name), []).append((closeness(a, b), _cosines(a, b), equal))

        hooks.append(module.register_forward_hook(look, with_kwargs=True))

    for layer, mine, oracle in [(layer, _twin(layer, ours), _twin(layer, exact)) for layer in layers]:
        watch(layer, LAYER, mine, oracle)
    for linear in ours:
        watch(linear, LINEAR, ours[linear], exact[linear])
    try:
        with torch.inference_mode():
            for number, prompt in enumerate(prompts, 1):
                progress(f"linears and layers: prompt {number} of {len(prompts)}")
                model(encode(tokenizer, prompt, model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    order = [(unit, name) for unit in units for name in (backend, "reference")]
    return [_together(name, unit, units[unit], found[unit, name]) for unit, name in order if (unit, name) in found]


def _decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The members of the outermost lists of modules that hold our linears."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    outermost = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [layer for m in outermost for layer in m if any(isinstance(x, BlockFp8Linear) for x in layer.modules())]


def _twin(module: torch.nn.Module, replaced: Mapping[torch.nn.Module, torch.nn.Module]) -> torch.nn.Module:
    """The same module with other linears; parameters are shared, hooks are not."""
    if module in replaced:
        return replaced[module]
    twin = copy.copy(module)
    twin._modules = {name: child and _twin(child, replaced) for name, child in module._modules.items()}
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        setattr(twin, hooks, OrderedDict())
    return twin


def _vectors(out: Any) -> torch.Tensor:
    """What a module gave, as rows; a decoder layer of some models gives more than its output."""
    return (out[0] if isinstance(out, tuple) else out).flatten(0, -2)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", a, b) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-300)


def _together(name: str, unit: str, units: int, found: list[tuple[Closeness, np.ndarray, float | None]]) -> Judged:
    vectors = sum(c.vectors for c, _, _ in found)
    equal = [(share, c.vectors) for c, _, share in found if share is not None]
    return Judged(
        name,
        "reference-fp64",
        unit,
        units,
        vectors,
        sum(c.cosine * c.vectors for c, _, _ in found) / vectors,
        min(c.min_cosine for c, _, _ in found),
        max(c.p99_rel for c, _, _ in found),
        max(c.max_rel for c, _, _ in found),
        float((np.concatenate([cosines for _, cosines, _ in found]) >= BOUND_COSINE).mean()),
        sum(share * count for share, count in equal) / vectors if equal else None,
    )


def document(model: Path, activation: Activation, dtype: str, device: str, judged: Sequence[Judged]) -> dict[str, Any]:
    """The JSON form that `report` reads."""
    return {
        "kind": "linears",
        "version": 1,
        "provenance": provenance(),
        "command": command(),
        "bound": {"cosine": BOUND_COSINE},
        "model": model.name,
        "activation": activation,
        "dtype": dtype,
        "device": device_name(device),
        "rows": [asdict(row) for row in judged],
    }


def cells(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    bound = document["bound"]["cosine"]
    header = ["alone", "", "vectors", "cosine", "smallest", f"cosine ≥ {bound}", "p99 rel", "max rel", "equal bits"]
    rows = [
        [
            f"{row['name']} vs {row['against']}",
            f"{row['units']} {row['unit']}s",
            str(row["vectors"]),
            f"{row['cosine']:.9f}",
            f"{row['min_cosine']:.9f}",
            f"{row['near']:.2%}",
            f"{row['p99_rel']:.1e}",
            f"{row['max_rel']:.1e}",
            "—" if row["equal"] is None else f"{row['equal']:.2%}",
        ]
        for row in document["rows"]
    ]
    return header, rows
