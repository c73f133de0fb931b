"""A layer of experts made of a grouped linear, for backends that have nothing better.

Nothing here waits for a device: rows are sorted and found again on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import silu

from qwen3_fp8_ascend.backends.registry import PackedWeight
from qwen3_fp8_ascend.format import Activation

GroupedLinear = Callable[[torch.Tensor, PackedWeight, torch.Tensor, Activation], torch.Tensor]


def block_experts(
    grouped_linear: GroupedLinear,
    x: torch.Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation,
    unrounded: GroupedLinear | None = None,
) -> torch.Tensor:
    """`reference.block_experts`. An id outside 0..E-1 adds nothing, whatever it is: to look would be to wait.

    unrounded: the grouped linear with fp32 results for x of any dtype. Without, fp32 activations ask for them.
    """
    (m, top_k), experts = topk_ids.shape, w13.groups
    flat = topk_ids.reshape(-1).long()
    chosen = (flat >= 0) & (flat < experts)
    sorted_ids, order = flat.clone().masked_fill_(~chosen, experts).sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(experts, device=x.device), right=True)
    h = grouped_linear(x.index_select(0, order // top_k), w13, ends, activation)
    gate, up = h.float().split(w2.k, dim=1)
    a = (silu(gate) * up).to(x.dtype)
    # As fp32, a has the same codes, and what comes out is not rounded.
    down = unrounded(a, w2, ends, activation) if unrounded else grouped_linear(a.float(), w2, ends, activation)
    y = torch.empty(m * top_k, w2.n, device=x.device, dtype=torch.float32)
    y.index_copy_(0, order, down)
    y = (y * topk_weights.reshape(-1, 1)).masked_fill_(~chosen[:, None], 0).view(m, top_k, w2.n)
    out = torch.zeros(m, w2.n, device=x.device, dtype=torch.float32)
    for slot in range(top_k):
        out = out + y[:, slot]
    return out.to(x.dtype)
