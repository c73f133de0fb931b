"""Quantize a bf16, fp16 or fp32 checkpoint to block FP8."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3_fp8_ascend import containers
from qwen3_fp8_ascend.checkpoints.anomaly import fault
from qwen3_fp8_ascend.checkpoints.conversion import ConversionSummary, Read, convert_checkpoint
from qwen3_fp8_ascend.checkpoints.folder import (
    CONFIG,
    QUANTIZATION_KEYS,
    Checkpoint,
    read_checkpoint,
)
from qwen3_fp8_ascend.checkpoints.layers import (
    DOWN,
    FUSED,
    GATE,
    GATE_UP,
    UP,
    FusedLayout,
    expert_weight,
    experts_of,
    fused_layout,
    is_decoder_linear,
    is_fused_experts,
    is_linear_weight,
    is_of_all_experts,
    is_stacked_experts,
    layer_index,
    matches_any,
    module_of,
)
from qwen3_fp8_ascend.checkpoints.rules import E4M3, OTHER_FP8, expected_scale_shape
from qwen3_fp8_ascend.checkpoints.tensors import FLOAT_DTYPES
from qwen3_fp8_ascend.checkpoints.tiles import Tile, tiles
from qwen3_fp8_ascend.checkpoints.weight_file import TensorEntry
from qwen3_fp8_ascend.errors import BlockFp8Error, describe
from qwen3_fp8_ascend.format import (
    DEFAULT_BLOCK,
    E4M3_MAX,
    FP32_SCALES,
    SCALE_SUFFIX,
    UE8M0_SCALES,
    WEIGHT_SUFFIX,
    BlockFp8Config,
    BlockSize,
    scale_shape,
)
from qwen3_fp8_ascend.reference import round_up_to_power_of_two

CONTAINERS = (containers.FP8, containers.COMPRESSED_TENSORS)
"""What can be written."""


def quantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    block: Sequence[int] = DEFAULT_BLOCK,
    scale_fmt: str = FP32_SCALES,
    ignore: Sequence[str] = (),
    container: str = containers.FP8,
    progress: bool = True,
    overwrite: bool = False,
) -> ConversionSummary:
    """Write a block-FP8 copy of a checkpoint folder, streaming, atomically, resuming what was interrupted.

    The linear weights of decoder layers are quantized, experts' included; embeddings, lm_head, norms, router gates,
    vision towers, and modules that match an `ignore` glob stay as they are and are listed in config.json. `container`
    is whose words config.json and the names of the scales use, ``fp8`` or ``compressed-tensors``. Experts that
    the source holds in one tensor a layer, transposed or not, become tensors of their own, as official FP8 releases
    have them.
    scale_fmt: "ue8m0" for scales that are powers of two, as DeepSeek-V3.1 has them, stored as fp32.
    Raises:
        BlockFp8Error: the source is damaged, already quantized, or has no linear weights to quantize; a weight has
            NaN or infinite values; an `ignore` glob matches nothing or splits layers that are merged when served;
            or as for `convert_checkpoint`.
    Semantics: `quantize_weight` for each weight; equal input gives equal bytes.
    """
    if isinstance(ignore, str):
        raise BlockFp8Error("`ignore` is a list of patterns, not one string", got=repr(ignore), fix=f"[{ignore!r}]")
    if container not in CONTAINERS:
        raise BlockFp8Error("unknown container", expected=" or ".join(CONTAINERS), got=describe(container))
    sizes = _check_block(block)
    checkpoint = read_checkpoint(Path(source))
    _check_unquantized(checkpoint)
    selected = _select(checkpoint, tuple(ignore))
    if scale_fmt == UE8M0_SCALES and container != containers.FP8:
        raise BlockFp8Error(
            "only the container fp8 can say that scales are powers of two",
            expected=containers.FP8,
            got=f"--format {container} with --scale-fmt {scale_fmt}",
            fix="leave one of the two out",
        )
    made = BlockFp8Config(sizes, _unquantized(checkpoint, selected), _check_scale_fmt(scale_fmt), container=container)
    conversion = _Quantization(made, frozenset(selected), tuple(ignore), _transposed(checkpoint, selected))
    return convert_checkpoint(checkpoint, destination, conversion, progress=progress, overwrite=overwrite)


def quantize_weight(
    weight: torch.Tensor, block: BlockSize = DEFAULT_BLOCK, scale_fmt: str = FP32_SCALES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a finite weight to e4m3 with one fp32 scale for each block.

    Shapes: weight (n, k) bf16/fp16/fp32 -> codes (n, k) float8_e4m3fn,
        scale (ceil(n / block.n), ceil(k / block.k)) fp32.
    Semantics: scale = amax(|block|) / 448 by true division in fp32, 1.0 where that is zero, and for ue8m0 rounded up
        to a power of two; code = round to nearest even of weight / scale (true division), clamped to +-448.
    Source: the inverse of DeepSeek-V3's ``weight_dequant`` (``inference/kernel.py``; the quantizer of its weights is
        not published). transformers' ``Fp8Quantize`` has the same scales of zero blocks, and multiplies by reciprocals
        where this divides: its scales differ in the last bit.
    """
    n, k = weight.shape
    block = BlockSize(min(block.n, max(1, n)), min(block.k, max(1, k)))  # no padding beyond the only block
    rows, columns = scale_shape(n, k, block)
    padding = (0, columns * block.k - k, 0, rows * block.n - n)
    padded = torch.nn.functional.pad(weight.float(), padding) if any(padding) else weight.float()
    blocks = padded.reshape(rows, block.n, columns, block.k)
    scale = blocks.abs().amax(dim=(1, 3)) / E4M3_MAX
    scale[scale == 0] = 1.0
    if scale_fmt == UE8M0_SCALES:
        scale = round_up_to_power_of_two(scale)
    scaled = (blocks / scale[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    codes = scaled.to(torch.float8_e4m3fn).view(rows * block.n, columns * block.k)[:n, :k]
    return codes.contiguous(), scale


@dataclass(frozen=True)
class _Quantization:
    format: BlockFp8Config
    selected: frozenset[str]
    ignore: tuple[str, ...]
    transposed: frozenset[str]
    """Tensors of all experts of a layer whose matrices are (k, n)."""
    operation: str = "quantize"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            "block": list(self.format.block),
            "scale_fmt": self.format.scale_fmt,
            "ignore": list(self.ignore),
            "container": self.format.container,
        }

    def outputs(self, tensor: TensorEntry) -> Sequence[TensorEntry]:
        if tensor.name not in self.selected:
            return [tensor]
        parts = self._parts(tensor)
        return [entry for part in parts for entry in (part._replace(dtype=E4M3), self._scale_of(part))]

    def convert(self, tensor: TensorEntry, read: Read) -> Sequence[torch.Tensor]:
        whole = read(tensor)
        if is_stacked_experts(tensor.name, tensor.shape):
            return self._quantize_stacked(whole, tensor)
        if not is_fused_experts(tensor.name, tensor.shape):
            return self._quantize(whole, tensor)
        experts = (expert.mT.contiguous() for expert in whole) if tensor.name in self.transposed else whole
        matrices = (half for expert in experts for half in _halves(tensor.name, expert))
        parts = self._parts(tensor)
        return [made for part, matrix in zip(parts, matrices, strict=True) for made in self._quantize(matrix, part)]

    def _parts(self, tensor: TensorEntry) -> list[TensorEntry]:
        """The matrices that a tensor to quantize consists of: itself, or the projections of each expert."""
        if not is_fused_experts(tensor.name, tensor.shape):
            return [tensor]
        experts, n, k = tensor.shape
        if tensor.name in self.transposed:
            n, k = k, n
        last = tensor.name.rpartition(".")[2]
        shapes = {GATE: (n // 2, k), UP: (n // 2, k)} if last == GATE_UP else {DOWN: (n, k)}
        return [
            tensor._replace(name=expert_weight(tensor.name, expert, projection), shape=shape)
            for expert in range(experts)
            for projection, shape in shapes.items()
        ]

    def _scale_of(self, weight: TensorEntry) -> TensorEntry:
        shape = expected_scale_shape(weight.shape, self.format.block)
        return TensorEntry(self.format.scale_of(weight.name), "F32", shape, weight.file)

    def _quantize_stacked(self, whole: torch.Tensor, tensor: TensorEntry) -> list[torch.Tensor]:
        """One projection of all experts, (experts, n, k), which stays in one tensor."""
        codes = torch.empty(whole.shape, dtype=torch.float8_e4m3fn)
        scale = torch.empty(expected_scale_shape(tensor.shape, self.format.block))
        for expert, matrix in enumerate(whole):
            codes[expert], scale[expert] = self._quantize(matrix, tensor)
        return [codes, scale]

    def _quantize(self, weight: torch.Tensor, tensor: TensorEntry) -> list[torch.Tensor]:
        (n, k), block = weight.shape, self.format.block
        codes = torch.empty(n, k, dtype=torch.float8_e4m3fn)
        scale = torch.empty(scale_shape(n, k, block))
        bad = 0
        for tile in tiles(n, k, block, whole_blocks=True):
            part = weight[tile.where]
            tile_codes, tile_scale = quantize_weight(part, block, self.format.scale_fmt)
            if not torch.isfinite(tile_scale).all():  # a NaN or an infinity in a block shows in its amax
                bad += part.numel() - int(torch.isfinite(part).sum())  # count them all, then refuse
            codes[tile.where] = tile_codes
            scale[Tile(tile.row // block.n, len(tile_scale), tile.column // block.k, tile_scale.shape[1]).where] = (
                tile_scale
            )
        if bad:
            raise fault(
                "a weight has NaN or infinite values, which block FP8 cannot hold",
                file=tensor.file,
                tensor=tensor.name,
                expected="finite values",
                got=f"{bad} bad of {n * k}",
                fix=f"the checkpoint is damaged; download it again, or leave the layer out: "
                f"--ignore '{module_of(tensor.name)}'",
            )
        return [codes, scale]

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
        return kept | {"quantization_config": self.format.to_dict()}


def _halves(fused: str, expert: torch.Tensor) -> Sequence[torch.Tensor]:
    return expert.chunk(2) if fused.rpartition(".")[2] == GATE_UP else (expert,)


def _check_block(block: Sequence[int]) -> BlockSize:
    if len(block) != 2 or not all(isinstance(size, int) and 1 <= size <= 1 << 20 for size in block):
        raise BlockFp8Error("a block has two positive sizes", expected="(128, 128), for example", got=tuple(block))
    return BlockSize(*block)


def _check_scale_fmt(scale_fmt: str) -> str:
    if scale_fmt not in (FP32_SCALES, UE8M0_SCALES):
        raise BlockFp8Error("unknown format of scales", expected=f"{FP32_SCALES} or {UE8M0_SCALES}", got=scale_fmt)
    return scale_fmt


def _check_unquantized(checkpoint: Checkpoint) -> None:
    if checkpoint.quantization is not None:
        config, where = checkpoint.quantization
        method = config.get("quant_method", "an unnamed method") if isinstance(config, Mapping) else "something"
        raise fault(
            "the source is already quantized",
            file=str(checkpoint.folder),
            expected=f"{CONFIG} without quantization_config",
            got=f"{method!r} in {where}",
            fix="start from the bf16 checkpoint, or dequantize this one first: `qwen3-fp8-ascend dequantize`",
        )
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in (E4M3, *OTHER_FP8) or tensor.name.endswith(SCALE_SUFFIX):
            raise fault(
                "the source is already quantized, though its config.json does not say so",
                file=tensor.file,
                tensor=tensor.name,
                got=tensor.dtype,
                fix="start from the bf16 checkpoint",
            )


def _select(checkpoint: Checkpoint, ignore: tuple[str, ...]) -> set[str]:
    """Names of the weights to quantize."""
    candidates = [t for t in checkpoint.tensors.values() if _is_candidate(t)]
    modules = [module_of(name) for name in checkpoint.tensors]
    examples = [module_of(tensor.name) for tensor in candidates[:1]] or modules[:1]
    for glob in ignore:
        if not any(matches_any(module, (glob,)) for module in modules):
            raise BlockFp8Error(
                "an ignore pattern matches no module of the checkpoint",
                where=repr(glob),
                expected="a shell-style pattern for module names",
                got=f"modules such as {examples[0]}" if examples else "no tensors",
            )
    selected = [tensor for tensor in candidates if not matches_any(module_of(tensor.name), ignore)]
    for tensor in selected:
        if tensor.dtype not in FLOAT_DTYPES:
            raise fault(
                "a linear weight has a dtype that cannot be quantized",
                file=tensor.file,
                tensor=tensor.name,
                expected=", ".join(sorted(FLOAT_DTYPES)),
                got=tensor.dtype,
            )
    names = {tensor.name for tensor in selected}
    if not names:
        raise fault(
            "the checkpoint has no linear weights to quantize",
            file=str(checkpoint.folder),
            expected="2-D tensors such as model.layers.0.self_attn.q_proj.weight",
            got=f"{len(candidates)} such tensors, all ignored" if candidates else "none",
        )
    every = {tensor.name for tensor in candidates}
    _check_fused(names, every)
    _check_experts(selected, candidates)
    for tensor in selected:
        if is_fused_experts(tensor.name, tensor.shape):
            _check_fused_experts(tensor, checkpoint)
    return names


def _is_candidate(tensor: TensorEntry) -> bool:
    if is_of_all_experts(tensor.name, tensor.shape):
        return layer_index(tensor.name) is not None
    return is_decoder_linear(tensor.name, tensor.shape)


def _check_experts(selected: Sequence[TensorEntry], candidates: Sequence[TensorEntry]) -> None:
    """Refuse to quantize some of a layer's experts: one operator serves them all."""
    names = {tensor.name for tensor in selected}
    quantized = {experts_of(tensor.name, tensor.shape) for tensor in selected} - {None}
    for tensor in sorted(candidates, key=lambda tensor: tensor.name):
        layer = experts_of(tensor.name, tensor.shape)
        if tensor.name not in names and layer in quantized:
            raise BlockFp8Error(
                "the ignore patterns split the experts of a layer",
                where=module_of(tensor.name),
                expected=f"all or none of the experts of {layer}",
                got=f"{tensor.name} ignored, others not",
            )


def _check_fused_experts(tensor: TensorEntry, checkpoint: Checkpoint) -> None:
    """Refuse tensors of all experts that are laid out otherwise, or with biases; GPT-OSS interleaves gate and up."""
    module = module_of(tensor.name)
    if f"{tensor.name}_bias" in checkpoint.tensors:
        raise fault(
            "experts with biases are not served in block FP8",
            file=tensor.file,
            tensor=f"{tensor.name}_bias",
            expected="no biases",
            got="a bias",
            fix=f"leave them out: --ignore '{module}'",
        )
    if _layout(tensor, checkpoint) is None:
        shapes = _fused_shapes(tensor, checkpoint)
        raise fault(
            "the tensors of a layer's experts are not laid out as gate above up, and down",
            file=tensor.file,
            tensor=tensor.name,
            expected=f"{GATE_UP} [experts, 2 * intermediate, hidden], {DOWN} [experts, hidden, intermediate], or both "
            "transposed",
            got=", ".join(f"{name} {list(shape) if shape else 'missing'}" for name, shape in shapes.items()),
            fix=f"leave them out: --ignore '{module}'",
        )


def _transposed(checkpoint: Checkpoint, selected: set[str]) -> frozenset[str]:
    """The tensors of all experts of a layer whose matrices are (k, n)."""
    fused = [t for name in selected if is_fused_experts(name, (t := checkpoint.tensors[name]).shape)]
    layouts = {tensor.name: _layout(tensor, checkpoint) for tensor in fused}
    return frozenset(name for name, layout in layouts.items() if layout is not None and layout.transposed)


def _layout(tensor: TensorEntry, checkpoint: Checkpoint) -> FusedLayout | None:
    shapes = _fused_shapes(tensor, checkpoint)
    return fused_layout(shapes[GATE_UP], shapes[DOWN])


def _fused_shapes(tensor: TensorEntry, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Of both tensors of a layer's experts; empty for one that is not there."""
    entries = {name: checkpoint.tensors.get(f"{module_of(tensor.name)}.{name}") for name in (GATE_UP, DOWN)}
    return {name: entry.shape if entry is not None else () for name, entry in entries.items()}


def _check_fused(selected: set[str], candidates: set[str]) -> None:
    """Refuse to quantize part of what vLLM merges into one layer."""
    for name in sorted(candidates - selected):
        parent, _, last = module_of(name).rpartition(".")
        for group in FUSED:
            if last not in group:
                continue
            for sibling in group:
                if f"{parent}.{sibling}{WEIGHT_SUFFIX}" in selected:
                    raise BlockFp8Error(
                        "the ignore patterns split layers that are merged when served",
                        where=module_of(name),
                        expected=f"all or none of {', '.join(group)}",
                        got=f"{last} ignored, {sibling} not",
                    )


def _unquantized(checkpoint: Checkpoint, selected: set[str]) -> tuple[str, ...]:
    """The linear modules that stay as they are, for ``modules_to_not_convert``; lm_head even if it is tied."""
    modules = {
        module_of(tensor.name)
        for tensor in checkpoint.tensors.values()
        if _is_listed(tensor) and tensor.name not in selected
    }
    if not any(module.rpartition(".")[2] == "lm_head" for module in modules):
        modules.add("lm_head")
    return tuple(sorted(modules))


def _is_listed(tensor: TensorEntry) -> bool:
    return is_linear_weight(tensor.name, tensor.shape) or is_of_all_experts(tensor.name, tensor.shape)
