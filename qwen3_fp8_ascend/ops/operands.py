"""What every operation asks of its operands, once for all backends, and the form in which a backend is given them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.compiler import is_dynamo_compiling

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends.registry import LOADED, Backend, PackedWeight
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)


def check_activation(x: torch.Tensor) -> None:
    check_dense("the activation", x)
    if x.dim() < 1:
        raise BlockFp8Error("an activation has at least one dimension", got="a scalar")
    if x.dtype not in ACTIVATION_DTYPES:
        raise BlockFp8Error("unsupported activation dtype", expected=dtype_names(ACTIVATION_DTYPES), got=x.dtype)


def check_tokens(x: torch.Tensor, packed: PackedWeight) -> None:
    """What the operations on experts want of x, which are never asked for more than two dimensions."""
    check_activation(x)
    if x.dim() != 2 or x.shape[1] != packed.k:
        raise BlockFp8Error("the activation does not fit the experts", expected=f"(m, {packed.k})", got=tuple(x.shape))
    if x.device != packed.device:
        raise BlockFp8Error("activation and experts are on different devices", expected=packed.device, got=x.device)


def check_weight(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid | None) -> BlockGrid:
    check_dense("the weight", weight)
    check_dense("the weight's scale", scale)
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
        raise BlockFp8Error("unsupported scale dtype", expected=dtype_names(SCALE_DTYPES), got=scale.dtype)
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


def check_operand(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    check_dense(name, tensor)
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        described = ", ".join("top_k" if size is None else str(size) for size in shape)
        raise BlockFp8Error(f"{name} has another shape", expected=f"({described})", got=tuple(tensor.shape))
    if tensor.dtype not in dtypes:
        raise BlockFp8Error(f"{name} has another dtype", expected=dtype_names(dtypes), got=tensor.dtype)
    if tensor.device != device:
        raise BlockFp8Error(f"{name} is on another device", expected=device, got=tensor.device)


def check_dense(what: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided:
        raise BlockFp8Error(
            f"{what} is sparse or nested", expected="a dense tensor", got=tensor.layout, fix="pass its .to_dense()"
        )


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def parsed_activation(given: Activation | str) -> Activation:
    return given if isinstance(given, Activation) else Activation.parse(given)


def backend_of(packed: PackedWeight, activation: Activation) -> Backend:
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


def may_be_asked_at_once(backend: Backend) -> bool:
    """Whether the backend's own checks are enough: it has some, and nobody wants gradients or traces the call."""
    return backend.checks_operands and not torch.is_grad_enabled() and not is_dynamo_compiling()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """All tokens as one dimension, contiguous in the last: what a `Backend` is given."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def contiguous_codes(weight: torch.Tensor) -> torch.Tensor:
    """Contiguous, copied as bytes if at all: NPUs before the Ascend 950 cannot copy strided FP8."""
    return weight.view(torch.uint8).contiguous().view(weight.dtype)


def fp32_scales(scale: torch.Tensor) -> torch.Tensor:
    """What a `Backend` is given."""
    return reference.scales_as_fp32(scale).contiguous()
