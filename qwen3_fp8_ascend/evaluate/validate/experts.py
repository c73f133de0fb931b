"""Layers of experts against the specification, on every backend that has them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.evaluate.validate.cases import Case, Context, Found
from qwen3_fp8_ascend.evaluate.validate.checks import SOME
from qwen3_fp8_ascend.glu import GELU_TANH, SILU, Glu
from qwen3_fp8_ascend.testing.experts import judge_layer, random_experts
from qwen3_fp8_ascend.testing.judges import Judgement

ROWS = (0, 1, 2, 3, 8, 17, 64, 200)
SHAPES = ((8, 2, 256, 256), (4, 4, 130, 72), (16, 3, 576, 192))
"""(experts, top k, hidden, intermediate): whole blocks, ragged ones, and more experts than tokens."""
LARGE = (32, 8, 2048, 768)
"""Qwen3-30B-A3B's, with a quarter of its experts."""
LARGE_ROWS = (1, 16, 64)
ACTIVATIONS = {
    "clamped": Glu.clamped(1.0),
    "step": Glu.step(0.5),
    "swigluoai": Glu.clamped(1.0, alpha=1.702, beta=1.0),
    "gelu": GELU_TANH,
}
"""Others than silu; with bounds that many gates and ups of these layers meet."""
ACTIVATION_ROWS = 17


def layers(context: Context) -> Iterator[Case]:
    """Tokens that go anywhere, to one expert twice too; the last of several goes to nobody."""
    backend = context.backend
    assert backend is not None
    if backend.pack_experts is None:
        yield Case("layer", lambda seed: Found(skipped=f"{backend.name} has no kernels for experts"))
        return
    numbers = ROWS if context.thorough else ROWS[1::SOME]
    for shape, dtype, rows in itertools.product(SHAPES, ops.ACTIVATION_DTYPES, numbers):
        yield Case(_name(shape, dtype, rows), functools.partial(_layer, context, shape, dtype, rows))
    for name, glu in ACTIVATIONS.items():
        run = functools.partial(_layer, context, SHAPES[-1], torch.bfloat16, ACTIVATION_ROWS, glu=glu)
        yield Case(f"{_name(SHAPES[-1], torch.bfloat16, ACTIVATION_ROWS)}/{name}", run)
    if context.thorough and backend.by_name_only() is None:
        experts, _, hidden, intermediate = LARGE
        for rows in LARGE_ROWS:
            run = functools.partial(_layer, context, LARGE, torch.bfloat16, rows)
            yield Case(_name(LARGE, torch.bfloat16, rows), run, 8 * experts * 3 * hidden * intermediate)


def _name(shape: tuple[int, int, int, int], dtype: torch.dtype, rows: int) -> str:
    experts, top_k, hidden, intermediate = shape
    return f"{str(dtype).removeprefix('torch.')}/m{rows}/e{experts}x{top_k}/h{hidden}/i{intermediate}"


def _layer(
    context: Context,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    rows: int,
    seed: int,
    glu: Glu = SILU,
) -> Judgement:
    problem = dataclasses.replace(random_experts(rows, *shape, dtype=dtype, seed=seed), glu=glu)
    if rows > 1:
        problem.topk_ids[-1] = -1
    assert context.backend is not None
    got = problem.to(context.device.place).layer(context.backend.name, context.activation)
    return judge_layer(got, problem, context.activation)
