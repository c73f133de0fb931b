"""hypothesis strategies: layers of experts, and routing as uneven as it can be."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st

from qwen3_fp8_ascend.format import BlockSize
from qwen3_fp8_ascend.glu import GELU_TANH, SILU, Glu
from qwen3_fp8_ascend.testing.experts import ExpertsProblem, random_codes
from qwen3_fp8_ascend.testing.strategies import activations

BLOCKS = (BlockSize(),) * 3 + (BlockSize(64, 64), BlockSize(32, 256), BlockSize(48, 40), BlockSize(128, 32))
"""With 48 x 40 the groups of the down projection's input end within panels of 32 rows."""


GLUS = (SILU,) * 4 + (
    Glu.clamped(1.0),
    Glu.clamped(7.0),
    Glu.step(0.75),
    Glu.clamped(2.0, 1.702, 1.0),
    GELU_TANH,
    dataclasses.replace(GELU_TANH, gate_limit=0.5, act_limit=0.25, up_limit=1.5, beta=0.5),
)
"""Gates go up to 4 below: limits that most reach, few and none, that of gpt-oss and MiniMax-M3, and all at once."""


@st.composite
def routing(draw: st.DrawFn, m: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (m, top_k) and ids (m, top_k): anywhere, to few experts, all to one, with -1 among them, or nowhere."""
    top_k = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["any", "any", "distinct", "few", "one", "none"]))
    if kind == "distinct" and top_k <= experts:
        ids = torch.stack(
            [torch.randperm(experts, generator=generator)[:top_k] for _ in range(m)] or [torch.zeros(top_k)]
        )[:m]
    elif kind == "none":
        ids = torch.full((m, top_k), -1)
    else:
        ids = torch.randint(0, {"few": min(2, experts), "one": 1}.get(kind, experts), (m, top_k), generator=generator)
    if draw(st.booleans()):
        ids[torch.rand(m, top_k, generator=generator) < 0.3] = -1
    weights = torch.rand(m, top_k, generator=generator) - draw(st.sampled_from([0.0, 0.5]))
    return weights, ids.to(draw(st.sampled_from([torch.int32, torch.int64])))


@st.composite
def expert_problems(draw: st.DrawFn, dtype: torch.dtype | None = None) -> ExpertsProblem:
    """Layers with ragged sizes and blocks, all finite codes, fp32 or bf16 scales, nasty activations."""
    experts, hidden, intermediate = draw(st.integers(1, 5)), draw(st.integers(1, 300)), draw(st.integers(1, 200))
    block = draw(st.sampled_from(BLOCKS))
    x = draw(activations(k=hidden, dtype=dtype))
    topk_weights, topk_ids = draw(routing(x.shape[0], experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w13 = random_codes((experts, 2 * intermediate, hidden), generator)
    w2 = random_codes((experts, hidden, intermediate), generator)
    # Gates that are neither all open nor all closed, and nothing beyond fp16's range.
    h = (x.float() @ w13.flatten(0, 1).float().T).abs()
    size = 4 / max(1e-30, float(h.max()) if h.numel() else 1.0)
    spread = draw(st.sampled_from([0, 1, 3]))

    def scales(n_rows: int, columns: int, size: float) -> torch.Tensor:
        return size * torch.exp2((torch.rand(experts, n_rows, columns, generator=generator) - 0.5) * spread)

    w13_scale = scales(2 * -(-intermediate // block.n), -(-hidden // block.k), min(size, 2.0**60))
    w2_scale = scales(-(-hidden // block.n), -(-intermediate // block.k), 1 / (118 * intermediate**0.5))
    if draw(st.booleans()):
        w13_scale[0, 0] = 0
    if draw(st.booleans()):
        w13_scale, w2_scale = w13_scale.bfloat16(), w2_scale.bfloat16()
    glu = draw(st.sampled_from(GLUS))
    return ExpertsProblem(x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, block, glu)
