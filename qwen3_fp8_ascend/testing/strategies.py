"""hypothesis strategies: activations, weights and shard grids as nasty as checkpoints and models can be."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from qwen3_fp8_ascend.format import BlockGrid, BlockSize
from qwen3_fp8_ascend.testing.judges import Problem

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

SPECIAL = (0.0, -0.0, 448.0, -448.0, 2.0**-9, 2.0**-10, 1e-10, 1e-12, 6e4, -6e4, 2.0**-6, 464.0, 1.0)


def _scatter(x: torch.Tensor, values: list[float], generator: torch.Generator) -> None:
    for value in values:
        if x.numel():
            x.view(-1)[int(torch.randint(x.numel(), (1,), generator=generator))] = value


@st.composite
def activations(draw: st.DrawFn, k: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(m, k) activations: any magnitude per row, zero groups, specials, subnormals; strided or not."""
    m = draw(st.integers(0, 12))
    k = draw(st.integers(1, 400)) if k is None else k
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    exponent = draw(st.sampled_from([-30, -12, -3, 0, 0, 3, 10]))
    x = torch.randn(m, k, generator=generator) * 2.0**exponent
    if draw(st.booleans()):
        x[:, : min(128, k)] = 0
    _scatter(x, draw(st.lists(st.sampled_from(SPECIAL), max_size=6)), generator)
    x = x.to(dtype)
    if draw(st.booleans()):  # not contiguous
        wide = torch.zeros(m, k + 3, dtype=dtype)
        wide[:, 1 : k + 1] = x
        x = wide[:, 1 : k + 1]
    return x


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Linears with ragged and merged shards, all finite codes, scales over many magnitudes, maybe a bias."""
    widths = tuple(draw(st.lists(st.integers(1, 300), min_size=1, max_size=3)))
    k = draw(st.integers(1, 400))
    block = draw(st.sampled_from([BlockSize(128, 128)] * 3 + [BlockSize(64, 64), BlockSize(32, 256)]))
    grid = BlockGrid(widths, k, block)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 256, (grid.n, k), generator=generator, dtype=torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, codes ^ 1, codes)
    spread = draw(st.sampled_from([0, 2, 10]))
    # The result must fit fp16's range, or infinities would hide everything else.
    scale = torch.exp2((torch.rand(grid.scale_shape, generator=generator) - 0.5) * spread - 16)
    if draw(st.booleans()):
        scale[0, 0] = 0
    x = draw(activations(k=k))
    bias = torch.randn(grid.n, generator=generator).to(x.dtype) if draw(st.booleans()) else None
    return Problem(x, codes.view(torch.float8_e4m3fn), scale, bias, grid)
