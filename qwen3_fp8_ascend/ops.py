"""The public operations: validate, choose a backend, call it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qwen3_fp8_ascend.backends.gradients import refuse_gradients
from qwen3_fp8_ascend.backends.registry import LOADED, PackedWeight, select_backend
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import (
    DEFAULT_BLOCK,
    SCALE_SUFFIX,
    WEIGHT_SUFFIX,
    Activation,
    BlockGrid,
    BlockSize,
    ceil_div,
    check_block_sizes,
)

DAMAGED = "the checkpoint does not fit the model or is damaged; look at it with `qwen3-fp8-ascend inspect`"

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

__all__ = ["PackedWeight", "block_linear", "dequantize_weight", "pack_weight", "quantize_activation"]


def quantize_activation(
    x: torch.Tensor, *, block_k: int = DEFAULT_BLOCK.k, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each group of `block_k` consecutive channels of a token to e4m3 with an fp32 scale.

    Shapes: x (..., k) bf16/fp16/fp32 -> codes (..., k) float8_e4m3fn, scale (..., ceil(k / block_k)) fp32.
    Raises:
        BlockFp8Error: x is a scalar, sparse or of another dtype, block_k is no positive 64-bit integer, a gradient is
            wanted (`refuse_gradients`), or the backend cannot run here.
    Semantics and source: `qwen3_fp8_ascend.reference.quantize_activation`, bit for bit.
    """
    _check_activation(x)
    check_block_sizes((block_k,), "block_k")
    refuse_gradients("quantize_activation", x)
    chosen = LOADED[_choose(backend, x.device.type)]
    rows = _as_rows(x)
    if rows.numel():
        codes, scale = chosen.quantize_activation(rows, block_k)
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

    Shapes: weight (n, k) float8_e4m3fn, scale `grid.scale_shape` fp32 or bf16 -> (n, k) `dtype`; without a grid, one
        shard in blocks of 128 x 128.
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
    return chosen.dequantize_weight(_contiguous_codes(weight), scale.float().contiguous(), grid, dtype)


def pack_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    grid: BlockGrid | None = None,
    backend: str | None = None,
    *,
    names: Sequence[str] = (),
    activation: Activation | str = Activation.W8A8,
    check_values: bool = True,
) -> PackedWeight:
    """Lay a weight out for a backend, once; the result is the only copy that has to stay resident.

    Shapes: weight (n, k) float8_e4m3fn, scale `grid.scale_shape` fp32 or bf16; without a grid, one shard in blocks of
        128 x 128.
    names: of the modules that the grid's shards are, for errors.
    activation: what the weight will be used with, so that a backend that cannot compute it is refused here, not at the
        first token.
    check_values: False is for weights whose values mean nothing (random ones, fake tensors); NaN codes then pass.
    Raises:
        BlockFp8Error: wrong dtype or shape, NaN codes, non-finite or negative scales, or the backend cannot run here.
    """
    grid = _check_weight(weight, scale, grid)
    chosen = select_backend(backend, weight.device.type, _activation(activation), grid.block)
    if check_values:
        _check_values(weight, scale, grid, names, chosen.max_scale)
    tensors = chosen.pack(_contiguous_codes(weight), scale.float().contiguous(), grid)
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
        BlockFp8Error: shapes, dtypes, layouts or devices that do not fit, or a gradient is wanted
            (`refuse_gradients`).
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
    rows = _as_rows(x)
    if rows.shape[0] and packed.n and packed.k:
        out = LOADED[packed.backend].linear(rows, packed, bias, activation)
    else:
        out = rows.new_zeros(rows.shape[0], packed.n)
        out = out if bias is None else out + bias.to(out.dtype)
    return out.reshape(*x.shape[:-1], packed.n)


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
    weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid, names: Sequence[str], max_scale: float
) -> None:
    """Refuse NaN codes and scales that are no scales, by the name of the shard that has them."""
    if names and len(names) != len(grid.widths):
        raise BlockFp8Error("each shard has one name", expected=len(grid.widths), got=list(names))
    shards = zip(weight.split(list(grid.widths)), scale.split(list(grid.scale_rows)), strict=True)
    for number, (codes, scales) in enumerate(shards):
        name = names[number] if names else None
        check_codes(codes, f"{name}{WEIGHT_SUFFIX}" if name else None)
        check_scale_values(scales, f"{name}{SCALE_SUFFIX}" if name else None, max_scale)


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


def _choose(
    backend: str | None, device_type: str, block_n: int = DEFAULT_BLOCK.n, block_k: int = DEFAULT_BLOCK.k
) -> str:
    """The name of the backend to use. `select_backend` looks at files: torch.compile calls it and does not trace it."""
    return select_backend(backend, device_type, block=BlockSize(block_n, block_k)).name


# What torch.compiler.assume_constant_result does. That would load the compiler, in half of the time that a process of
# this package takes to start; tests/test_ops.py compiles with it.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    if scale.dtype not in (torch.float32, torch.bfloat16):
        raise BlockFp8Error("unsupported scale dtype", expected="float32 or bfloat16", got=scale.dtype)
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
