"""Quantize, dequantize, pack and multiply with one weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwen3_fp8_ascend.backends.gradients import refuse_gradients
from qwen3_fp8_ascend.backends.registry import LOADED, PackedWeight, select_backend
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import (
    DEFAULT_BLOCK,
    SCALE_NAME,
    Activation,
    BlockGrid,
    BlockSize,
    ceil_div,
    check_block_sizes,
)
from qwen3_fp8_ascend.ops.operands import (
    ACTIVATION_DTYPES,
    as_rows,
    backend_of,
    check_activation,
    check_dense,
    check_weight,
    contiguous_codes,
    dtype_names,
    fp32_scales,
    may_be_asked_at_once,
    parsed_activation,
)
from qwen3_fp8_ascend.ops.values import check_shard_values


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
    check_activation(x)
    check_block_sizes((block_k,), "block_k")
    activation = parsed_activation(activation)
    if activation is Activation.W8A16:
        raise BlockFp8Error("W8A16 does not quantize activations", expected="w8a8 or w8a8-ue8m0", got=activation)
    refuse_gradients("quantize_activation", x)
    chosen = LOADED[_choose(backend, x.device.type, computes=activation)]
    rows = as_rows(x)
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
    grid = check_weight(weight, scale, grid)
    if dtype not in ACTIVATION_DTYPES:
        raise BlockFp8Error(
            "weights dequantize to a floating-point dtype", expected=dtype_names(ACTIVATION_DTYPES), got=dtype
        )
    refuse_gradients("dequantize_weight", weight, scale)
    chosen = LOADED[_choose(backend, weight.device.type, *grid.block)]
    if not weight.numel():
        return weight.new_empty(weight.shape, dtype=dtype)
    return chosen.dequantize_weight(contiguous_codes(weight), fp32_scales(scale), grid, dtype)


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
    grid = check_weight(weight, scale, grid)
    chosen = select_backend(backend, weight.device.type, parsed_activation(activation), grid.block)
    scale = fp32_scales(scale)
    if check_values:
        check_shard_values(weight, scale, grid, names, scale_name, chosen.max_scale)
    tensors = chosen.pack(contiguous_codes(weight), scale, grid)
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
    backend = LOADED[packed.backend]
    if may_be_asked_at_once(backend) and x.dim() == 2:
        try:
            return backend.linear(x, packed, bias, parsed_activation(activation))
        except RuntimeError:
            pass  # the checks below say what is wrong, or change what the backend does not take as it is
    return _checked_linear(x, packed, bias, activation)


def _checked_linear(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: Activation | str
) -> torch.Tensor:
    check_activation(x)
    activation = parsed_activation(activation)
    if x.shape[-1] != packed.k:
        raise BlockFp8Error("the activation does not fit the weight", expected=f"(..., {packed.k})", got=tuple(x.shape))
    if x.device != packed.device:
        raise BlockFp8Error("activation and weight are on different devices", expected=packed.device, got=x.device)
    if bias is not None:
        check_dense("the bias", bias)
        if bias.shape != (packed.n,) or bias.device != x.device:
            raise BlockFp8Error(
                "the bias does not fit the weight",
                expected=f"({packed.n},) on {x.device}",
                got=f"{tuple(bias.shape)} on {bias.device}",
            )
        bias = (bias if bias.dtype in ACTIVATION_DTYPES else bias.float()).contiguous()
    refuse_gradients("block_linear", x, bias)
    rows, backend = as_rows(x), backend_of(packed, activation)
    if rows.shape[0] and packed.n and packed.k:
        out = backend.linear(rows, packed, bias, activation)
    else:
        out = rows.new_zeros(rows.shape[0], packed.n)
        out = out if bias is None else out + bias.to(out.dtype)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], packed.n)


def _choose(
    backend: str | None,
    device_type: str,
    block_n: int = DEFAULT_BLOCK.n,
    block_k: int = DEFAULT_BLOCK.k,
    computes: Activation | None = None,
) -> str:
    """The name of the backend to use. `select_backend` looks at files: torch.compile calls it and does not trace it."""
    return select_backend(backend, device_type, computes, BlockSize(block_n, block_k)).name


# What `torch.compiler.assume_constant_result` does, which would import all of torch._dynamo: nearly as long again as
# torch itself takes, in every process that never compiles. `test_compiles_whole` fails if torch.compile ignores it.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
