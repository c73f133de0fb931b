"""The public operations: validate, choose a backend, call it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qwen3_fp8_ascend.backends.gradients import refuse_gradients
from qwen3_fp8_ascend.backends.registry import COMPUTES, LOADED, PackedWeight, select_backend
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, BlockSize, ShardGrid, check_block_sizes

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
    codes, scale = chosen.quantize_activation(_as_rows(x), block_k)
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], scale.shape[-1])


def dequantize_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    widths: Sequence[int] | None = None,
    block: Sequence[int] = DEFAULT_BLOCK,
    backend: str | None = None,
) -> torch.Tensor:
    """Multiply e4m3 codes by their block's scale.

    Shapes: weight (n, k) float8_e4m3fn, scale (ceil(n / block_n), ceil(k / block_k)) fp32 or bf16 -> (n, k) `dtype`;
        with `widths`, the row counts of merged shards, each shard has its own block grid (`ShardGrid`).
    Raises:
        BlockFp8Error: wrong dtype, layout or shape, a gradient is wanted (`refuse_gradients`), or the backend cannot
            run here.
    Semantics and source: `qwen3_fp8_ascend.reference.dequantize_weight`, bit for bit.
    """
    grid = _check_weight(weight, scale, widths, block)
    if dtype not in ACTIVATION_DTYPES:
        raise BlockFp8Error(
            "weights dequantize to a floating-point dtype", expected=_names(ACTIVATION_DTYPES), got=dtype
        )
    refuse_gradients("dequantize_weight", weight, scale)
    chosen = LOADED[_choose(backend, weight.device.type, *grid.block)]
    return chosen.dequantize_weight(_contiguous_codes(weight), scale.float().contiguous(), grid, dtype)


def pack_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    backend: str | None = None,
    widths: Sequence[int] | None = None,
    *,
    block: Sequence[int] = DEFAULT_BLOCK,
    activation: str = "dynamic",
    check_values: bool = True,
) -> PackedWeight:
    """Lay a weight out for a backend, once; the result is the only copy that has to stay resident.

    Shapes: weight (n, k) float8_e4m3fn, scale (sum over shards of ceil(width / block_n), ceil(k / block_k)) fp32 or
    bf16. `widths` are the row counts of merged shards (default: one shard). `activation` is what the weight will be
    used with ("dynamic" or "none"), so that a backend that cannot compute it is refused here, not at the first token.
    `check_values=False` is for weights whose values mean nothing (random ones, fake tensors); NaN codes then pass.
    Raises:
        BlockFp8Error: wrong dtype or shape, NaN codes, non-finite or negative scales, or the backend cannot run here.
    """
    grid = _check_weight(weight, scale, widths, block)
    nan_codes = count_nan_codes(weight) if check_values else 0
    if nan_codes:
        raise BlockFp8Error(
            "the weight holds NaN codes (0x7F or 0xFF)",
            expected="finite e4m3 codes only",
            got=f"{nan_codes} NaN of {weight.numel()}",
            fix="the checkpoint is damaged or its converter overflowed; download or quantize it again",
        )
    chosen = select_backend(backend, weight.device.type, _computes(activation), grid.block)
    if check_values:
        check_scale_values(scale, limit=chosen.max_scale)
    tensors = chosen.pack(_contiguous_codes(weight), scale.float().contiguous(), grid)
    return PackedWeight(chosen.name, grid, tensors)


def block_linear(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None, activation: str = "dynamic"
) -> torch.Tensor:
    """y = x @ W.T + bias with the block scales of `packed`.

    Shapes: x (..., k) bf16/fp16/fp32, bias (n,) -> (..., n) in x.dtype.
    `activation`: "dynamic" quantizes x to e4m3 in groups (w8a8), "none" leaves it as it is (w8a16).
    Raises:
        BlockFp8Error: shapes, dtypes, layouts or devices that do not fit, or a gradient is wanted
            (`refuse_gradients`).
    Semantics and source: `qwen3_fp8_ascend.reference.block_linear`, up to the order of fp32 additions.
    """
    _check_activation(x)
    _computes(activation)
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
    refuse_gradients("block_linear", x, bias)
    rows = _as_rows(x)
    out = LOADED[packed.backend].linear(rows, packed, bias, activation)
    return out.reshape(*x.shape[:-1], packed.n)


def count_nan_codes(weight: torch.Tensor) -> int:
    """Number of e4m3 NaN codes (0x7F, 0xFF) in a tensor, on bytes, since devices without FP8 cannot say isnan."""
    codes, count = weight.view(torch.uint8), 0
    rows = max(1, (1 << 22) // max(1, codes.shape[-1]))  # pieces that stay in cache
    for piece in codes.split(rows):
        magnitude = piece & 0x7F
        if magnitude.numel() and int(magnitude.max()) == 0x7F:  # a maximum is many times faster than a count
            count += int((magnitude == 0x7F).sum())
    return count


def check_scale_values(scale: torch.Tensor, where: object = None, limit: float = math.inf) -> None:
    """Refuse scales that are not finite, are negative, or exceed what a backend can represent.

    Raises:
        BlockFp8Error: with the count and the first position.
    """
    bad = ~(torch.isfinite(scale) & (scale >= 0) & (scale <= limit))
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise BlockFp8Error(
            "the weight's block scales are not all finite and non-negative",
            where=where,
            expected="finite numbers of zero or more" + ("" if math.isinf(limit) else f", up to {limit:.3g}"),
            got=f"{int(bad.sum())} of {bad.numel()} bad, the first at {first}: {float(scale[first])}",
            fix="the checkpoint is damaged; download or quantize it again",
        )


@torch.compiler.assume_constant_result
def _choose(
    backend: str | None, device_type: str, block_n: int = DEFAULT_BLOCK.n, block_k: int = DEFAULT_BLOCK.k
) -> str:
    """The name of the backend to use. `select_backend` looks at files: torch.compile calls it and does not trace it."""
    return select_backend(backend, device_type, block=BlockSize(block_n, block_k)).name


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """All tokens as one dimension, contiguous in the last: what a `Backend` is given."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _contiguous_codes(weight: torch.Tensor) -> torch.Tensor:
    """Contiguous, copied as bytes if at all: NPUs before the Ascend 950 cannot copy strided FP8."""
    return weight.view(torch.uint8).contiguous().view(weight.dtype)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _computes(activation: str) -> str:
    if activation not in COMPUTES:
        raise BlockFp8Error("unknown activation mode", expected="'dynamic' or 'none'", got=repr(activation))
    return COMPUTES[activation]


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


def _check_weight(
    weight: torch.Tensor, scale: torch.Tensor, widths: Sequence[int] | None, block: Sequence[int]
) -> ShardGrid:
    _check_dense("the weight", weight)
    _check_dense("the weight's scale", scale)
    if weight.dtype != torch.float8_e4m3fn:
        raise BlockFp8Error("the weight is not block FP8", expected="float8_e4m3fn", got=weight.dtype)
    if weight.dim() != 2:
        raise BlockFp8Error("a weight has two dimensions", expected="(n, k)", got=tuple(weight.shape))
    grid = ShardGrid(tuple(widths) if widths is not None else (weight.shape[0],), weight.shape[1], BlockSize(*block))
    if grid.n != weight.shape[0]:
        raise BlockFp8Error(
            "the shard widths do not add up to the weight's rows", expected=weight.shape[0], got=f"sum{grid.widths}"
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
