"""Pack the experts of a layer, and multiply each token with those that it is sent to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from qwen3_fp8_ascend.backends import grouped
from qwen3_fp8_ascend.backends.gradients import refuse_gradients
from qwen3_fp8_ascend.backends.registry import LOADED, PackedWeight, select_backend
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import SCALE_NAME, Activation, BlockGrid
from qwen3_fp8_ascend.glu import SILU, Glu
from qwen3_fp8_ascend.ops.operands import (
    ACTIVATION_DTYPES,
    as_rows,
    backend_of,
    check_dense,
    check_operand,
    check_tokens,
    check_weight,
    contiguous_codes,
    fp32_scales,
    may_be_asked_at_once,
    parsed_activation,
)
from qwen3_fp8_ascend.ops.values import check_shard_values


def pack_experts(
    weights: torch.Tensor | Iterable[torch.Tensor],
    scales: torch.Tensor,
    grid: BlockGrid | None = None,
    backend: str | None = None,
    *,
    names: Sequence[str] = (),
    scale_name: str = SCALE_NAME,
    activation: Activation | str = Activation.W8A8,
    check_values: bool = True,
) -> PackedWeight:
    """`pack_weight` for one weight of each expert of a layer: all in one piece of memory, checked and laid out in turn.

    Shapes: weights (E, n, k) float8_e4m3fn, or E of (n, k) that come one by one, so that none has to stay; scales
        (E, *grid.scale_shape) fp32, bf16 or float8_e8m0fnu. The gate and up projections together are a grid of two
        shards, the gate first; without a grid, one shard in blocks of 128 x 128.
    names: of the grid's shards, or of every expert's, one expert after the other; errors say which expert's it is.
    scale_name, activation, check_values: as for `pack_weight`.
    Raises:
        BlockFp8Error: as `pack_weight`, a number of weights other than that of scales, or a backend without experts.
    """
    check_dense("the experts' scales", scales)
    if scales.dim() != 3 or not scales.shape[0]:
        raise BlockFp8Error(
            "the scales of experts have three dimensions, and there is at least one expert",
            expected="(experts, scale rows, scale columns)",
            got=tuple(scales.shape),
        )
    if isinstance(weights, torch.Tensor) and weights.dim() != 3:
        raise BlockFp8Error("weights of experts have three dimensions", expected="(E, n, k)", got=tuple(weights.shape))
    experts = iter(weights)
    first = next(experts, None)
    if first is None:
        raise BlockFp8Error("there are fewer weights than scales", expected=scales.shape[0], got=0)
    grid = check_weight(first, scales[0], grid)
    chosen = select_backend(backend, scales.device.type, parsed_activation(activation), grid.block, experts=True)
    assert chosen.pack_experts is not None
    scales = fp32_scales(scales)

    values = (names, scale_name, chosen.max_scale) if check_values else None
    tensors = chosen.pack_experts(_checked(itertools.chain((first,), experts), scales, grid, values), scales, grid)
    groups = scales.shape[0]
    return PackedWeight(
        chosen.name, grid, tensors if groups > 1 else tuple(t[0] for t in tensors), chosen.layout(), groups
    )


def _checked(
    weights: Iterable[torch.Tensor],
    scales: torch.Tensor,
    grid: BlockGrid,
    values: tuple[Sequence[str], str, float] | None,
) -> Iterator[torch.Tensor]:
    """Each expert's codes when the backend asks for them; `values`: names and the largest scale; None: no look."""
    shards, experts, count = len(grid.widths), scales.shape[0], 0
    for count, weight in enumerate(weights, start=1):
        if count > experts:
            break
        check_weight(weight, scales[count - 1], grid)
        if values is not None:
            names, scale_name, max_scale = values
            if len(names) == experts * shards:
                of_expert = names[(count - 1) * shards : count * shards]
            else:
                named = names or [f"shard {number}" for number in range(shards)]
                of_expert = [f"experts.{count - 1}.{name}" for name in named]
            check_shard_values(weight, scales[count - 1], grid, of_expert, scale_name, max_scale)
        yield contiguous_codes(weight)
    if count != experts:
        more = "more" if count > experts else "fewer"
        raise BlockFp8Error(f"there are {more} weights than scales", expected=experts, got=count)


def grouped_linear(
    x: torch.Tensor,
    packed: PackedWeight,
    ends: torch.Tensor,
    activation: Activation | str = Activation.W8A8,
    *,
    unrounded: bool = False,
) -> torch.Tensor:
    """`block_linear` of each expert for its own rows of x, which are sorted by expert.

    Shapes: x (m, k) bf16/fp16/fp32, ends (E,) int64 on x's device: rows [ends[e - 1], ends[e]) are expert e's
        -> (m, n) in x.dtype, or in fp32 if `unrounded`. Rows behind the last end are nobody's, and what is in their
        outputs is not specified.
    Raises:
        BlockFp8Error: shapes, dtypes, layouts or devices that do not fit, a backend that has no grouped linear or does
            not compute `activation`, or a gradient is wanted (`refuse_gradients`).
        BlockFp8Error or RuntimeError, on a CPU: ends that decrease or lie behind the last row. A device would have to
            wait for a look.
    Semantics and source: `qwen3_fp8_ascend.reference.grouped_linear`, up to the order of fp32 additions.
    """
    check_tokens(x, packed)
    activation = parsed_activation(activation)
    check_operand("ends", ends, (packed.groups,), (torch.int64,), x.device)
    backend = backend_of(packed, activation)
    if backend.grouped_linear is None:
        raise BlockFp8Error(f"the backend {packed.backend!r} has no grouped linear", fix="use block_experts")
    refuse_gradients("grouped_linear", x)
    dtype = torch.float32 if unrounded else x.dtype
    if not (x.shape[0] and packed.n and packed.k):
        return x.new_zeros(x.shape[0], packed.n, dtype=dtype)
    return backend.grouped_linear(as_rows(x), packed, ends.contiguous(), activation, dtype)


def block_experts(
    x: torch.Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation | str = Activation.W8A8,
    glu: Glu = SILU,
    *,
    between: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """A layer of experts behind its router: each token's weighted sum over the experts that it is sent to.

    Shapes: x (m, hidden) bf16/fp16/fp32; w13 of two shards (gate, up) of `intermediate` rows; topk_weights (m, top_k)
        floating point, topk_ids (m, top_k) int32 or int64 -> (m, hidden) in x.dtype. An id of -1 adds nothing.
        A part of a layer that starts within a block has gate and up of several shards each, alike.
    glu: what is computed of gate and up: silu(gate) * up, unless the model has another activation.
    between: for a part of a layer that starts or ends within a block, what makes of glu(gate, up)
        (m * top_k, intermediate), sorted by expert, the activation (m * top_k, w2.k) that the part of w2 takes. It is
        called once, unless m or top_k is 0. Parts of layers are made of grouped linears (`backends/grouped.py`).
    Raises:
        BlockFp8Error: shapes, dtypes, layouts or devices that do not fit, an activation that the weights' backend does
            not compute, or a gradient is wanted (`refuse_gradients`).
        BlockFp8Error or RuntimeError, on a CPU: an id below -1, or not below the number of experts. On a device, which
            would have to wait for a look, such an id adds nothing.
    Semantics and source: `qwen3_fp8_ascend.reference.block_experts`, up to the order of fp32 additions in its linears.
    """
    backend = LOADED[w13.backend]
    if may_be_asked_at_once(backend) and backend.block_experts is not None and between is None and _whole(w13, w2):
        try:
            return backend.block_experts(x, w13, w2, topk_weights, topk_ids, parsed_activation(activation), glu)
        except RuntimeError:
            pass  # as in `block_linear`
    return _checked_experts(x, w13, w2, topk_weights, topk_ids, activation, glu, between)


def _whole(w13: PackedWeight, w2: PackedWeight) -> bool:
    """Whether they are a layer of whole experts, packed alike: what an operator does not see in its tensors."""
    up, down = w13.grid, w2.grid
    alike = w13.backend == w2.backend and w13.groups == w2.groups and up.block == down.block
    return alike and up.widths == (down.k, down.k) and down.n == up.k


def _checked_experts(
    x: torch.Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation | str,
    glu: Glu,
    between: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    check_tokens(x, w13)
    activation = parsed_activation(activation)
    part = between is not None or len(w13.grid.widths) != 2
    _check_pair(w13, w2, padded=between is not None)
    if w2.n != x.shape[1]:
        raise BlockFp8Error("the down projection does not fit the activation", expected=x.shape[1], got=w2.n)
    check_operand("topk_ids", topk_ids, (x.shape[0], None), (torch.int32, torch.int64), x.device)
    check_operand("topk_weights", topk_weights, tuple(topk_ids.shape), ACTIVATION_DTYPES, x.device)
    refuse_gradients("block_experts", x, topk_weights)
    if not (x.shape[0] and topk_ids.shape[1] and w13.k and w2.k):
        return torch.zeros_like(x)
    backend = backend_of(w13, activation)
    operands = as_rows(x), w13, w2, topk_weights.float().contiguous(), topk_ids.contiguous(), activation, glu
    if backend.block_experts is not None and not part:
        return backend.block_experts(*operands)
    if backend.grouped_linear is None:
        raise BlockFp8Error(
            f"the backend {backend.name!r} has no grouped linear to make a part of a layer of",
            expected="a part of whole blocks",
            fix="use another backend, or whole experts",
        )
    product = backend.glu_product or grouped.glu_product
    return grouped.block_experts(backend.grouped_linear, *operands, product=product, between=between)


def _check_pair(w13: PackedWeight, w2: PackedWeight, padded: bool) -> None:
    """w13 and w2 of one layer. padded: w2 takes more than what w13 gives (`between`)."""
    gate = w13.grid.widths[: len(w13.grid.widths) // 2]
    if w13.grid.widths != 2 * gate or (not padded and sum(gate) != w2.k):
        raise BlockFp8Error(
            "the gate and up projections do not fit the down projection",
            expected="the same shards of gate and of up" if padded else f"two shards of {w2.k} rows",
            got=w13.grid.widths,
        )
    same = {
        "backend": (w13.backend, w2.backend),
        "experts": (w13.groups, w2.groups),
        "block": (w13.grid.block, w2.grid.block),
        "device": (w13.device, w2.device),
    }
    for what, (one, other) in same.items():
        if one != other:
            raise BlockFp8Error(f"w13 and w2 differ in their {what}", expected=str(one), got=str(other))
