"""Codes and scales that no good checkpoint has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import WEIGHT_SUFFIX, BlockGrid

DAMAGED = "the checkpoint does not fit the model or is damaged; look at it with `qwen3-fp8-ascend inspect`"


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


def check_shard_values(
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
