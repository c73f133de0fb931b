"""A layer of experts made of a grouped linear, for backends that have nothing better.

Nothing here waits for a device: rows are sorted and found again on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from qwen3_fp8_ascend.backends.registry import GluProduct, GroupedLinear, PackedWeight
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid
from qwen3_fp8_ascend.glu import SILU, Glu

Pack = Callable[[torch.Tensor, torch.Tensor, BlockGrid], tuple[torch.Tensor, ...]]


def pack_experts(
    pack: Pack, weights: Iterable[torch.Tensor], scales: torch.Tensor, grid: BlockGrid
) -> tuple[torch.Tensor, ...]:
    """`pack` for one expert after the other, into tensors with a leading dimension of experts."""
    layer: tuple[torch.Tensor, ...] = ()
    for expert, weight in enumerate(weights):
        tensors = pack(weight, scales[expert], grid)
        layer = layer or tuple(t.new_empty((scales.shape[0], *t.shape)) for t in tensors)
        for whole, part in zip(layer, tensors, strict=True):
            whole[expert] = part
    return layer


def check_ends(ends: torch.Tensor, rows: int) -> None:
    """Refuse a list of ends that is none, where to look is not to wait for a device.

    Raises:
        BlockFp8Error: on a CPU, ends that decrease or lie behind the last row.
    """
    if ends.device.type != "cpu":
        return
    if bool((torch.diff(ends, prepend=ends.new_zeros(1)) < 0).any() or ends[-1] > rows):
        raise BlockFp8Error(
            "the ends of the experts' rows decrease, or lie behind the last row",
            expected=f"numbers from 0 to {rows} in order",
            got=ends.tolist(),
        )


def glu_product(h: torch.Tensor, glu: Glu) -> torch.Tensor:
    """glu(gate, up) in fp32, rounded once. Shapes: h (rows, 2 * I), the gate's columns first -> (rows, I)."""
    gate, up = h.float().chunk(2, dim=1)
    return glu(gate, up).to(h.dtype)


def block_experts(
    grouped_linear: GroupedLinear,
    x: torch.Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation,
    glu: Glu = SILU,
    *,
    product: GluProduct = glu_product,
    between: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """`reference.block_experts`. An id outside 0..E-1 adds nothing, whatever it is: to look would be to wait.

    product: a backend's own `glu_product`. between: as in `ops.block_experts`.
    """
    (m, top_k), experts = topk_ids.shape, w13.groups
    flat = topk_ids.reshape(-1).long()
    chosen = (flat >= 0) & (flat < experts)
    sorted_ids, order = flat.clone().masked_fill_(~chosen, experts).sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(experts, device=x.device), right=True)
    h = grouped_linear(x.index_select(0, order // top_k), w13, ends, activation, x.dtype)
    a = product(h, glu)
    if between is not None:
        a = between(a)
    down = grouped_linear(a, w2, ends, activation, torch.float32)
    y = torch.empty(m * top_k, w2.n, device=x.device, dtype=torch.float32)
    y.index_copy_(0, order, down)
    y = (y * topk_weights.reshape(-1, 1)).masked_fill_(~chosen[:, None], 0).view(m, top_k, w2.n)
    out = torch.zeros(m, w2.n, device=x.device, dtype=torch.float32)
    for slot in range(top_k):
        out = out + y[:, slot]
    return out.to(x.dtype)
