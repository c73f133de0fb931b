"""The public operations: validate, choose a backend, call it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends import grouped
from qwen3_fp8_ascend.backends.gradients import refuse_gradients
from qwen3_fp8_ascend.backends.registry import LOADED, Backend, PackedWeight, select_backend
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import (
    DEFAULT_BLOCK,
    SCALE_NAME,
    WEIGHT_SUFFIX,
    Activation,
    BlockGrid,
    BlockSize,
    ceil_div,
    check_block_sizes,
)

DAMAGED = "the checkpoint does not fit the model or is damaged; look at it with `qwen3-fp8-ascend inspect`"

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)

__all__ = [
    "PackedWeight",
    "block_experts",
    "block_linear",
    "dequantize_weight",
    "grouped_linear",
    "pack_experts",
    "pack_weight",
    "quantize_activation",
]


def quantize_activation(
    x: torch.Tensor,
    *,
    block_k: int = DEFAULT_BLOCK.k,
    activation: Activation | str = Activation.W8A8,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each group of `block_k` consecutive channels of a token to e4m3 with an fp32 scale.

    Shapes: x (..., k) bf16/fp16/fp32 -> codes (..., k) float8_e4m3fn, scale (..., ceil(k / block_k)) fp32.
    activation: W8A8, or W8A8_UE8M0 for scales that are powers of two.
    Raises:
        BlockFp8Error: x is a scalar, sparse or of another dtype, block_k is no positive 64-bit integer, W8A16, a
            gradient is wanted (`refuse_gradients`), or the backend cannot run here or has no such scales.
    Semantics and source: `qwen3_fp8_ascend.reference.quantize_activation`, bit for bit.
    """
    _check_activation(x)
    check_block_sizes((block_k,), "block_k")
    activation = _activation(activation)
    if activation is Activation.W8A16:
        raise BlockFp8Error("W8A16 does not quantize activations", expected="w8a8 or w8a8-ue8m0", got=activation)
    refuse_gradients("quantize_activation", x)
    chosen = LOADED[_choose(backend, x.device.type, computes=activation)]
    rows = _as_rows(x)
    if rows.numel():
        codes, scale = chosen.quantize_activation(rows, block_k, activation)
    else:
        codes = rows.new_empty(rows.shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scale = rows.new_empty(rows.shape[0], ceil_div(rows.shape[1], block_k), dtype=torch.float32)
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], scale.shape[-1])


def dequantize_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    grid: BlockGrid | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Multiply e4m3 codes by their block's scale.

    Shapes: weight (n, k) float8_e4m3fn, scale `grid.scale_shape` fp32, bf16 or float8_e8m0fnu -> (n, k) `dtype`;
        without a grid, one shard in blocks of 128 x 128.
    Raises:
        BlockFp8Error: wrong dtype, layout or shape, a gradient is wanted (`refuse_gradients`), or the backend cannot
            run here.
    Semantics and source: `qwen3_fp8_ascend.reference.dequantize_weight`, bit for bit.
    """
    grid = _check_weight(weight, scale, grid)
    if dtype not in ACTIVATION_DTYPES:
        raise BlockFp8Error(
            "weights dequantize to a floating-point dtype", expected=_names(ACTIVATION_DTYPES), got=dtype
        )
    refuse_gradients("dequantize_weight", weight, scale)
    chosen = LOADED[_choose(backend, weight.device.type, *grid.block)]
    if not weight.numel():
        return weight.new_empty(weight.shape, dtype=dtype)
    return chosen.dequantize_weight(_contiguous_codes(weight), _fp32_scales(scale), grid, dtype)


def pack_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    grid: BlockGrid | None = None,
    backend: str | None = None,
    *,
    names: Sequence[str] = (),
    scale_name: str = SCALE_NAME,
    activation: Activation | str = Activation.W8A8,
    check_values: bool = True,
) -> PackedWeight:
    """Lay a weight out for a backend, once; the result is the only copy that has to stay resident.

    Shapes: weight (n, k) float8_e4m3fn, scale `grid.scale_shape` fp32, bf16 or float8_e8m0fnu; without a grid, one
        shard in blocks of 128 x 128.
    names, scale_name: of the modules that the grid's shards are, and of a module's scales in its file; for errors.
    activation: what the weight will be used with, so that a backend that cannot compute it is refused here, not at the
        first token.
    check_values: False is for weights whose values mean nothing (random ones, fake tensors); NaN codes then pass.
    Raises:
        BlockFp8Error: wrong dtype or shape, NaN codes, non-finite or negative scales, or the backend cannot run here.
    """
    grid = _check_weight(weight, scale, grid)
    chosen = select_backend(backend, weight.device.type, _activation(activation), grid.block)
    scale = _fp32_scales(scale)
    if check_values:
        _check_values(weight, scale, grid, names, scale_name, chosen.max_scale)
    tensors = chosen.pack(_contiguous_codes(weight), scale, grid)
    return PackedWeight(chosen.name, grid, tensors, chosen.layout())


def block_linear(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    activation: Activation | str = Activation.W8A8,
) -> torch.Tensor:
    """y = x @ W.T + bias with the block scales of `packed`.

    Shapes: x (..., k) bf16/fp16/fp32, bias (n,) -> (..., n) in x.dtype.
    Raises:
        BlockFp8Error: shapes, dtypes, layouts or devices that do not fit, an activation that the weight's backend does
            not compute, or a gradient is wanted (`refuse_gradients`).
    Semantics and source: `qwen3_fp8_ascend.reference.block_linear`, up to the order of fp32 additions.
    """
    _check_activation(x)
    activation = _activation(activation)
    if x.shape[-1] != packed.k:
        raise BlockFp8Error("the activation does not fit the weight", expected=f"(..., {packed.k})", got=tuple(x.shape))
    if x.device != packed.device:
        raise BlockFp8Error("activation and weight are on different devices", expected=packed.device, got=x.device)
    if bias is not None:
        _check_dense("the bias", bias)
        if bias.shape != (packed.n,) or bias.device != x.device:
            raise BlockFp8Error(
                "the bias does not fit the weight",
                expected=f"({packed.n},) on {x.device}",
                got=f"{tuple(bias.shape)} on {bias.device}",
            )
        bias = (bias if bias.dtype in ACTIVATION_DTYPES else bias.float()).contiguous()
    refuse_gradients("block_linear", x, bias)
    rows, backend = _as_rows(x), _backend_of(packed, activation)
    if rows.shape[0] and packed.n and packed.k:
        out = backend.linear(rows, packed, bias, activation)
    else:
        out = rows.new_zeros(rows.shape[0], packed.n)
        out = out if bias is None else out + bias.to(out.dtype)
    return out.reshape(*x.shape[:-1], packed.n)


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
    _check_dense("the experts' scales", scales)
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
    grid = _check_weight(first, scales[0], grid)
    chosen = select_backend(backend, scales.device.type, _activation(activation), grid.block, experts=True)
    assert chosen.pack_experts is not None
    scales = _fp32_scales(scales)

    def checked() -> Iterator[torch.Tensor]:
        count = 0
        for count, weight in enumerate(itertools.chain((first,), experts), start=1):
            if count > scales.shape[0]:
                break
            _check_weight(weight, scales[count - 1], grid)
            if check_values:
                shards = names or [f"shard {number}" for number in range(len(grid.widths))]
                if len(names) == scales.shape[0] * len(grid.widths):
                    of_expert = names[(count - 1) * len(grid.widths) : count * len(grid.widths)]
                else:
                    of_expert = [f"experts.{count - 1}.{name}" for name in shards]
                _check_values(weight, scales[count - 1], grid, of_expert, scale_name, chosen.max_scale)
            yield _contiguous_codes(weight)
        if count != scales.shape[0]:
            more = "more" if count > scales.shape[0] else "fewer"
            raise BlockFp8Error(f"there are {more} weights than scales", expected=scales.shape[0], got=count)

    tensors = chosen.pack_experts(checked(), scales, grid)
    groups = scales.shape[0]
    return PackedWeight(
        chosen.name, grid, tensors if groups > 1 else tuple(t[0] for t in tensors), chosen.layout(), groups
    )


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
    _check_tokens(x, packed)
    activation = _activation(activation)
    _check_operand("ends", ends, (packed.groups,), (torch.int64,), x.device)
    backend = _backend_of(packed, activation)
    if backend.grouped_linear is None:
        raise BlockFp8Error(f"the backend {packed.backend!r} has no grouped linear", fix="use block_experts")
    refuse_gradients("grouped_linear", x)
    if not (x.shape[0] and packed.n and packed.k):
        return x.new_zeros(x.shape[0], packed.n, dtype=torch.float32 if unrounded else x.dtype)
    operands = _as_rows(x), packed, ends.contiguous(), activation
    if unrounded:
        return grouped.to_fp32(backend.grouped_linear, backend.unrounded, *operands)
    return backend.grouped_linear(*operands)


def block_experts(
    x: torch.Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation | str = Activation.W8A8,
) -> torch.Tensor:
    """A layer of experts behind its router: each token's weighted sum over the experts that it is sent to.

    Shapes: x (m, hidden) bf16/fp16/fp32; w13 of two shards (gate, up) of `intermediate` rows; topk_weights (m, top_k)
        floating point, topk_ids (m, top_k) int32 or int64 -> (m, hidden) in x.dtype. An id of -1 adds nothing.
    Raises:
        BlockFp8Error: shapes, dtypes, layouts or devices that do not fit, an activation that the weights' backend does
            not compute, or a gradient is wanted (`refuse_gradients`).
        BlockFp8Error or RuntimeError, on a CPU: an id below -1, or not below the number of experts. On a device, which
            would have to wait for a look, such an id adds nothing.
    Semantics and source: `qwen3_fp8_ascend.reference.block_experts`, up to the order of fp32 additions in its linears.
    """
    _check_tokens(x, w13)
    activation = _activation(activation)
    if len(w13.grid.widths) != 2 or w13.grid.widths != (w2.k, w2.k):
        raise BlockFp8Error(
            "the gate and up projections do not fit the down projection",
            expected=f"two shards of {w2.k} rows",
            got=w13.grid.widths,
        )
    same = {
        "backend": (w13.backend, w2.backend),
        "experts": (w13.groups, w2.groups),
        "block": (w13.grid.block, w2.grid.block),
    }
    same["device"] = (w13.device, w2.device)
    for what, (one, other) in same.items():
        if one != other:
            raise BlockFp8Error(f"w13 and w2 differ in their {what}", expected=str(one), got=str(other))
    if w2.n != x.shape[1]:
        raise BlockFp8Error("the down projection does not fit the activation", expected=x.shape[1], got=w2.n)
    _check_operand("topk_ids", topk_ids, (x.shape[0], None), (torch.int32, torch.int64), x.device)
    _check_operand("topk_weights", topk_weights, tuple(topk_ids.shape), ACTIVATION_DTYPES, x.device)
    refuse_gradients("block_experts", x, topk_weights)
    if not (x.shape[0] and topk_ids.shape[1] and w13.k and w2.k):
        return torch.zeros_like(x)
    backend = _backend_of(w13, activation)
    operands = _as_rows(x), w13, w2, topk_weights.float().contiguous(), topk_ids.contiguous(), activation
    if backend.block_experts is not None:
        return backend.block_experts(*operands)
    assert backend.grouped_linear is not None
    return grouped.block_experts(backend.grouped_linear, *operands, backend.unrounded)


def count_nan_codes(weight: torch.Tensor) -> int:
    """Number of e4m3 NaN codes (0x7F, 0xFF) in a tensor, on bytes, since devices without FP8 cannot say isnan."""
    codes, count = weight.view(torch.uint8), 0
    if not codes.numel():
        return 0
    rows = max(1, (1 << 22) // codes.shape[-1])  # pieces that stay in cache
    for piece in codes.split(rows):
        magnitude = piece & 0x7F
        if int(magnitude.max()) == 0x7F:  # a maximum is many times faster than a count
            count += int((magnitude == 0x7F).sum())
    return count


def _check_values(
    weight: torch.Tensor,
    scale: torch.Tensor,
    grid: BlockGrid,
    names: Sequence[str],
    scale_name: str,
    max_scale: float,
) -> None:
    """Refuse NaN codes and scales that are no scales, by the name of the shard that has them."""
    if names and len(names) != len(grid.widths):
        raise BlockFp8Error("each shard has one name", expected=len(grid.widths), got=list(names))
    parts = weight.view(torch.uint8).split(list(grid.widths))
    shards = zip(parts, scale.split(list(grid.scale_rows)), strict=True)
    for number, (codes, scales) in enumerate(shards):
        name = names[number] if names else None
        check_codes(codes, f"{name}{WEIGHT_SUFFIX}" if name else None)
        check_scale_values(scales, f"{name}.{scale_name}" if name else None, max_scale)


def check_codes(codes: torch.Tensor, where: object = None) -> None:
    """Refuse a tensor with NaN codes: no good checkpoint has one.

    Raises:
        BlockFp8Error: with their number; all of them are taken for a tensor that was never loaded.
    """
    nan_codes = count_nan_codes(codes)
    if nan_codes:
        missing = nan_codes == codes.numel()
        raise BlockFp8Error(
            "a weight is missing, or all its codes are NaN" if missing else "a weight holds NaN codes (0x7F or 0xFF)",
            where=where,
            expected="finite e4m3 codes only",
            got=f"{nan_codes} NaN of {codes.numel()}",
            fix=DAMAGED,
        )


def check_scale_values(scale: torch.Tensor, where: object = None, limit: float = math.inf) -> None:
    """Refuse scales that are not finite, are negative, or exceed what a backend can represent.

    Raises:
        BlockFp8Error: with the count and the first position.
    """
    scale = reference.scales_as_fp32(scale)
    bad = ~(torch.isfinite(scale) & (scale >= 0) & (scale <= limit))
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        missing = bool(scale.isnan().all())
        raise BlockFp8Error(
            "a weight's block scales are missing, or all NaN"
            if missing
            else "the weight's block scales are not all finite and non-negative",
            where=where,
            expected="finite numbers of zero or more" + ("" if math.isinf(limit) else f", up to {limit:.3g}"),
            got=f"{int(bad.sum())} of {bad.numel()} bad, the first at {first}: {float(scale[first])}",
            fix=DAMAGED,
        )


@torch.compiler.assume_constant_result
def _choose(
    backend: str | None,
    device_type: str,
    block_n: int = DEFAULT_BLOCK.n,
    block_k: int = DEFAULT_BLOCK.k,
    computes: Activation | None = None,
) -> str:
    """The name of the backend to use. `select_backend` looks at files: torch.compile calls it and does not trace it."""
    return select_backend(backend, device_type, computes, BlockSize(block_n, block_k)).name


def _backend_of(packed: PackedWeight, activation: Activation) -> Backend:
    """The backend of a packed weight.

    Raises:
        BlockFp8Error: it does not compute `activation`, and must not compute something else in silence.
    """
    backend = LOADED[packed.backend]
    if activation not in backend.computes:
        raise BlockFp8Error(
            f"the backend {packed.backend!r} does not compute {activation}",
            expected=" or ".join(sorted(backend.computes)),
            got=activation,
            fix="pack the weight for a backend that does; `qwen3-fp8-ascend doctor` lists them",
        )
    return backend


def _fp32_scales(scale: torch.Tensor) -> torch.Tensor:
    """What a `Backend` is given."""
    return reference.scales_as_fp32(scale).contiguous()


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """All tokens as one dimension, contiguous in the last: what a `Backend` is given."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _contiguous_codes(weight: torch.Tensor) -> torch.Tensor:
    """Contiguous, copied as bytes if at all: NPUs before the Ascend 950 cannot copy strided FP8."""
    return weight.view(torch.uint8).contiguous().view(weight.dtype)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _activation(given: Activation | str) -> Activation:
    return given if isinstance(given, Activation) else Activation.parse(given)


def _check_dense(what: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided:
        raise BlockFp8Error(
            f"{what} is sparse or nested", expected="a dense tensor", got=tensor.layout, fix="pass its .to_dense()"
        )


def _check_activation(x: torch.Tensor) -> None:
    _check_dense("the activation", x)
    if x.dim() < 1:
        raise BlockFp8Error("an activation has at least one dimension", got="a scalar")
    if x.dtype not in ACTIVATION_DTYPES:
        raise BlockFp8Error("unsupported activation dtype", expected=_names(ACTIVATION_DTYPES), got=x.dtype)


def _check_tokens(x: torch.Tensor, packed: PackedWeight) -> None:
    """What the operations on experts want of x, which are never asked for more than two dimensions."""
    _check_activation(x)
    if x.dim() != 2 or x.shape[1] != packed.k:
        raise BlockFp8Error("the activation does not fit the experts", expected=f"(m, {packed.k})", got=tuple(x.shape))
    if x.device != packed.device:
        raise BlockFp8Error("activation and experts are on different devices", expected=packed.device, got=x.device)


def _check_operand(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    _check_dense(name, tensor)
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        described = ", ".join("top_k" if size is None else str(size) for size in shape)
        raise BlockFp8Error(f"{name} has another shape", expected=f"({described})", got=tuple(tensor.shape))
    if tensor.dtype not in dtypes:
        raise BlockFp8Error(f"{name} has another dtype", expected=_names(dtypes), got=tensor.dtype)
    if tensor.device != device:
        raise BlockFp8Error(f"{name} is on another device", expected=device, got=tensor.device)


def _check_weight(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid | None) -> BlockGrid:
    _check_dense("the weight", weight)
    _check_dense("the weight's scale", scale)
    if weight.dtype != torch.float8_e4m3fn:
        raise BlockFp8Error("the weight is not block FP8", expected="float8_e4m3fn", got=weight.dtype)
    if weight.dim() != 2:
        raise BlockFp8Error("a weight has two dimensions", expected="(n, k)", got=tuple(weight.shape))
    grid = BlockGrid((weight.shape[0],), weight.shape[1]) if grid is None else grid
    if not isinstance(grid, BlockGrid):
        raise BlockFp8Error("the weight's block grid is no BlockGrid", expected="BlockGrid(widths, k)", got=repr(grid))
    if (grid.n, grid.k) != tuple(weight.shape):
        raise BlockFp8Error(
            f"the block grid is not the weight's: its shards are {grid.widths}, of {grid.k} columns",
            expected=tuple(weight.shape),
            got=(grid.n, grid.k),
        )
    if scale.dtype not in SCALE_DTYPES:
        raise BlockFp8Error("unsupported scale dtype", expected=_names(SCALE_DTYPES), got=scale.dtype)
    if tuple(scale.shape) != grid.scale_shape:
        raise BlockFp8Error(
            f"the scale does not fit a weight of shape {tuple(weight.shape)} with shards {grid.widths} "
            f"and blocks of {grid.block}",
            expected=grid.scale_shape,
            got=tuple(scale.shape),
        )
    if scale.device != weight.device:
        raise BlockFp8Error("weight and scale are on different devices", expected=weight.device, got=scale.device)
    return grid
