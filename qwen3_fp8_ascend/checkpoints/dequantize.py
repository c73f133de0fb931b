"""Turn a block-FP8 checkpoint back into a plain bf16, fp16 or fp32 one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3_fp8_ascend.checkpoints.anomaly import fault
from qwen3_fp8_ascend.checkpoints.conversion import ConversionSummary, Read, convert_checkpoint
from qwen3_fp8_ascend.checkpoints.folder import QUANTIZATION_KEYS, read_checkpoint
from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint
from qwen3_fp8_ascend.checkpoints.rules import DOWNLOAD_AGAIN, E4M3, expected_scale_shape, is_cache_scale, is_scale
from qwen3_fp8_ascend.checkpoints.tensors import FLOAT_DTYPES
from qwen3_fp8_ascend.checkpoints.tiles import Tile, tiles
from qwen3_fp8_ascend.checkpoints.weight_file import TensorEntry
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import BlockFp8Config, BlockSize, ceil_div
from qwen3_fp8_ascend.ops import check_scale_values, count_nan_codes

DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


def dequantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
    overwrite: bool = False,
) -> ConversionSummary:
    """Write a copy of a block-FP8 checkpoint with float weights and without quantization_config.

    Raises:
        BlockFp8Error: the source is not block FP8 or has an anomaly; a weight has NaN codes, bad scales, or values
            beyond `dtype`; or as for `convert_checkpoint`.
    Semantics: `qwen3_fp8_ascend.reference.dequantize_weight` for each weight; all other tensors stay as they are.
    """
    if dtype not in DTYPE_NAMES:
        raise BlockFp8Error(
            "weights dequantize to a floating-point dtype", expected=", ".join(map(str, DTYPE_NAMES)), got=dtype
        )
    report = check_checkpoint(source)
    checkpoint = read_checkpoint(Path(source))
    assert report.config is not None  # check_checkpoint refuses anything else
    conversion = _Dequantization(report.config, dtype, checkpoint.tensors)
    return convert_checkpoint(checkpoint, destination, conversion, progress=progress, overwrite=overwrite)


@dataclass(frozen=True)
class _Dequantization:
    format: BlockFp8Config
    dtype: torch.dtype
    tensors: Mapping[str, TensorEntry]
    operation: str = "dequantize"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"block": list(self.format.block), "dtype": DTYPE_NAMES[self.dtype]}

    def outputs(self, tensor: TensorEntry) -> Sequence[TensorEntry]:
        if is_scale(tensor.name, self.format):
            return []  # read beside its weight, which may be in another file
        if is_cache_scale(tensor.name):
            return []  # of a quantized KV cache, for which a model that is not quantized has no place
        return [tensor._replace(dtype=DTYPE_NAMES[self.dtype]) if tensor.dtype == E4M3 else tensor]

    def convert(self, tensor: TensorEntry, read: Read) -> Sequence[torch.Tensor]:
        entry, block = self.tensors[self.format.scale_of(tensor.name)], self.format.block
        scale = read(entry)
        check_scale_values(scale, where=f"{entry.file}, {entry.name}")
        scale = scale.reshape(expected_scale_shape(tensor.shape, block))  # ModelOpt's are (rows, 1, columns, 1)
        codes = read(tensor)
        weight = torch.empty(codes.shape, dtype=self.dtype)
        nan_codes = overflows = 0
        # One matrix, or one for each expert of a layer.
        for into, matrix, scales in zip(
            *(t.unbind() if t.dim() == 3 else (t,) for t in (weight, codes, scale)), strict=True
        ):
            n, k = matrix.shape
            for tile in tiles(n, k, block, whole_blocks=False):
                part = matrix[tile.where]
                nan_codes += count_nan_codes(part)
                made = (part.float() * _tile_scales(scales, block, tile)).to(self.dtype)
                if not torch.isfinite(made.abs().amax()):
                    overflows += made.numel() - int(torch.isfinite(made).sum())
                into[tile.where] = made
        if nan_codes:
            raise fault(
                "a weight holds NaN codes (0x7F or 0xFF)",
                file=tensor.file,
                tensor=tensor.name,
                expected="finite e4m3 codes only",
                got=f"{nan_codes} NaN of {codes.numel()}",
                fix=DOWNLOAD_AGAIN,
            )
        if overflows:
            raise fault(
                f"a weight has values beyond the range of {DTYPE_NAMES[self.dtype]}",
                file=tensor.file,
                tensor=tensor.name,
                got=f"{overflows} of {codes.numel()}",
                fix="dequantize to bfloat16 or float32",
            )
        return [weight]

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        out = _without_quantization(config)
        if isinstance(out.get("text_config"), Mapping):
            out["text_config"] = _without_quantization(out["text_config"])
        name = str(self.dtype).removeprefix("torch.")
        for key in ("dtype", "torch_dtype"):
            if key in out:
                out[key] = name
        return out


def _tile_scales(scale: torch.Tensor, block: BlockSize, tile: Tile) -> torch.Tensor:
    """The scale of each element of a tile that consists of several blocks or lies within one."""
    n, k = min(block.n, tile.rows), min(block.k, tile.columns)
    row, column = tile.row // block.n, tile.column // block.k
    part = scale[row : row + ceil_div(tile.rows, n), column : column + ceil_div(tile.columns, k)].float()
    return part.repeat_interleave(n, 0)[: tile.rows].repeat_interleave(k, 1)[:, : tile.columns]


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
