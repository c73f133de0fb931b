"""What must hold between config.json and the tensors for a checkpoint to be served."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from qwen3_fp8_ascend.checkpoints.anomaly import Anomaly
from qwen3_fp8_ascend.checkpoints.folder import INDEX, SINGLE, WEIGHTS_SUFFIX, Checkpoint
from qwen3_fp8_ascend.checkpoints.layers import (
    FUSED_SCALES,
    MTP_NAME,
    is_decoder_linear,
    is_fused_experts,
    is_linear_weight,
    is_of_all_experts,
    layer_index,
)
from qwen3_fp8_ascend.checkpoints.model_config import positive
from qwen3_fp8_ascend.checkpoints.weight_file import TensorEntry, is_plain_text
from qwen3_fp8_ascend.containers import MODELOPT, SCALE_ENDINGS
from qwen3_fp8_ascend.format import SCALE_DTYPES, WEIGHT_SUFFIX, BlockFp8Config, BlockSize, scale_shape

E4M3 = "F8_E4M3"
OTHER_FP8 = ("F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
FLOATS = ("BF16", "F16", "F32", "F64")
FOREIGN_SCALES = (".input_scale", ".activation_scale", ".input_scale_inv", ".weight_zero_point", ".input_zero_point")
"""Tensors of static, per-tensor or asymmetric schemes; block FP8 with dynamic activations has none of them."""

CACHE_SCALES = re.compile(r"\.(?:[qkv]|kv|[qkv]_cache|kv_cache)[._](?:scale|zero_point)$")
QUANTIZE_AGAIN = "quantize the bf16 model again: `qwen3-fp8-ascend quantize`"
DOWNLOAD_AGAIN = "the checkpoint is damaged or incomplete; download it again, or " + QUANTIZE_AGAIN


def is_fp8_weight(tensor: TensorEntry) -> bool:
    """Whether a tensor is the e4m3 weight of a module, or of all experts of a layer."""
    return tensor.dtype == E4M3 and (tensor.name.endswith(WEIGHT_SUFFIX) or is_fused_experts(tensor.name, tensor.shape))


def is_scale(name: str, config: BlockFp8Config) -> bool:
    """Whether a tensor holds block scales, by its name."""
    if not name.endswith(SCALE_ENDINGS[config.container]):
        return False
    return name.endswith(f".{config.scale_name}") or FUSED_SCALES.match(name) is not None


def is_cache_scale(name: str) -> bool:
    """Whether a tensor is a scale of the KV cache or of attention, which are not quantized here."""
    return CACHE_SCALES.search(name) is not None


def expected_scale_shape(shape: tuple[int, ...], block: BlockSize) -> tuple[int, ...]:
    """Shape of the scales of a weight (n, k), or of the weights (experts, n, k) of all experts of a layer."""
    return (*shape[:-2], *scale_shape(shape[-2], shape[-1], block))


def matrix_shape(scale: TensorEntry, config: BlockFp8Config) -> tuple[int, ...]:
    """Shape of the scales of a weight; ModelOpt writes (rows, 1, columns, 1)."""
    if config.container == MODELOPT and len(scale.shape) == 4 and scale.shape[1::2] == (1, 1):
        return scale.shape[::2]
    return scale.shape


def find_anomalies(checkpoint: Checkpoint, config: BlockFp8Config) -> Iterator[Anomaly]:
    """Everything that the tensors by themselves show to be wrong with a checkpoint that declares block FP8."""
    tensors = checkpoint.tensors
    if not any(is_fp8_weight(tensor) for tensor in tensors.values()):
        yield Anomaly(
            "config.json declares block FP8, but no tensor is FP8",
            expected=f"{E4M3} weights",
            got=", ".join(sorted({t.dtype for t in tensors.values()})) or "no tensors",
            fix="remove quantization_config from config.json, or " + QUANTIZE_AGAIN,
        )
        return
    other_scales = {f".weight{ending}" for ending in SCALE_ENDINGS.values()} - {f".{config.scale_name}"}
    for tensor in tensors.values():
        if is_scale(tensor.name, config):
            yield from _check_extra_scale(tensor, tensors, config)
        elif tensor.dtype in OTHER_FP8:
            yield _anomaly(tensor, "a tensor has another FP8 dtype than e4m3", E4M3, tensor.dtype, QUANTIZE_AGAIN)
        elif tensor.dtype == E4M3:
            yield from _check_weight(tensor, tensors, config)
        elif tensor.name.endswith((*FOREIGN_SCALES, *other_scales)):
            yield _anomaly(
                tensor,
                "a scale of a static or per-tensor scheme stands in a checkpoint with dynamic block scales",
                f"only *.{config.scale_name}",
                tensor.name.rpartition(".")[2],
                QUANTIZE_AGAIN,
            )
        elif tensor.dtype not in FLOATS and is_decoder_linear(tensor.name, tensor.shape):
            yield _anomaly(
                tensor, "a linear layer is neither FP8 nor float", f"{E4M3} or BF16", tensor.dtype, QUANTIZE_AGAIN
            )


def _check_weight(tensor: TensorEntry, tensors: Mapping[str, TensorEntry], config: BlockFp8Config) -> Iterator[Anomaly]:
    is_matrix = is_linear_weight(tensor.name, tensor.shape) or is_of_all_experts(tensor.name, tensor.shape)
    if not is_fp8_weight(tensor) or not is_matrix:
        yield _anomaly(
            tensor,
            "an FP8 tensor is no weight of a linear layer",
            f"2-D tensors named *{WEIGHT_SUFFIX}",
            f"shape {list(tensor.shape)}",
            "serve it without this plugin, or " + QUANTIZE_AGAIN,
        )
        return
    name = config.scale_of(tensor.name)
    scale = tensors.get(name)
    shape = expected_scale_shape(tensor.shape, config.block)
    if scale is None:
        expected = f"{name}, shape {list(shape)}"
        yield _anomaly(tensor, "an FP8 weight has no block scales", expected, "no such tensor", DOWNLOAD_AGAIN)
        return
    if matrix_shape(scale, config) != shape:
        yield _anomaly(
            scale,
            "block scales do not fit their weight",
            f"{list(shape)} for a weight of {list(tensor.shape)} in blocks of {config.block}",
            str(list(scale.shape)),
            f"check the size of blocks in config.json; else {DOWNLOAD_AGAIN}",
        )
    if scale.dtype not in SCALE_DTYPES:
        yield _anomaly(
            scale, "block scales have an unsupported dtype", " or ".join(SCALE_DTYPES), scale.dtype, QUANTIZE_AGAIN
        )


def _check_extra_scale(
    tensor: TensorEntry, tensors: Mapping[str, TensorEntry], config: BlockFp8Config
) -> Iterator[Anomaly]:
    name = tensor.name.removesuffix(SCALE_ENDINGS[config.container])
    weight = tensors.get(name)
    if weight is None or weight.dtype not in (E4M3, *OTHER_FP8):
        yield _anomaly(
            tensor,
            "block scales have no FP8 weight",
            f"{name} in {E4M3}",
            weight.dtype if weight else "no such tensor",
            DOWNLOAD_AGAIN,
        )


def find_unused(checkpoint: Checkpoint) -> Iterator[Anomaly]:
    """Files that are not the checkpoint's, but that vLLM would load: its own choice of files differs from this one.

    Source: vllm/model_executor/model_loader/default_loader.py (`_prepare_weights`), 0.30.0.
    """
    if checkpoint.unused and not checkpoint.has_index:
        yield Anomaly(
            f"vLLM loads every *{WEIGHTS_SUFFIX} of a folder without an index, on top of each other",
            file=checkpoint.unused[0] if is_plain_text(checkpoint.unused[0]) else None,
            expected=f"{SINGLE} alone, or {INDEX}",
            got=f"{len(checkpoint.unused)} more files",
            fix="remove the files that do not belong to the checkpoint",
        )
    other = next((file for file in checkpoint.unused if file.startswith("consolidated") and is_plain_text(file)), None)
    if other is not None and checkpoint.has_index:
        yield Anomaly(
            "vLLM prefers consolidated*.safetensors to the files that the index names",
            file=other,
            fix="serve it with --load-format safetensors, or remove the file",
            severity="warning",
        )


def of_token_prediction(checkpoint: Checkpoint) -> list[TensorEntry]:
    """The tensors of layers for multi-token prediction (MTP), which are loaded by who speculates with them.

    Source: vLLM's ``get_spec_layer_idx_from_weight_name``; other models name them ``mtp.*`` or ``mtp_layers.*``.
    """
    first = positive(checkpoint.config, "num_hidden_layers")
    count = positive(checkpoint.config, "num_nextn_predict_layers")

    def is_beyond(name: str) -> bool:
        if first is None or count is None:
            return False
        index = layer_index(name)
        return index is not None and first <= index < first + count

    tensors = checkpoint.tensors.values()
    return [t for t in tensors if is_beyond(t.name) or MTP_NAME.search(t.name) is not None]


def find_undeclared(checkpoint: Checkpoint) -> Iterator[Anomaly]:
    """FP8 tensors in a checkpoint whose config.json does not say so."""
    fp8 = [tensor for tensor in checkpoint.tensors.values() if tensor.dtype in (E4M3, *OTHER_FP8)]
    if fp8:
        yield _anomaly(
            fp8[0],
            f"{len(fp8)} tensors are FP8, but config.json has no quantization_config",
            "quantization_config with quant_method, fmt, activation_scheme and weight_block_size",
            "none",
            "take config.json from the checkpoint's source",
        )


def _anomaly(tensor: TensorEntry, what: str, expected: str, got: str, fix: str, *, warning: bool = False) -> Anomaly:
    severity = "warning" if warning else "error"
    return Anomaly(what, tensor.file, tensor.name, expected, got, fix, severity)  # type: ignore[arg-type]
