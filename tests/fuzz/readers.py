"""The code that reads checkpoints from the internet, as readers of one hostile folder each."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open

from qwen3_fp8_ascend.checkpoints.anomaly import CheckpointError
from qwen3_fp8_ascend.checkpoints.folder import CONFIG, INDEX, MAX_CONFIG_BYTES, WEIGHTS_SUFFIX, find_quantization
from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint, inspect_checkpoint
from qwen3_fp8_ascend.checkpoints.render import render as print_report
from qwen3_fp8_ascend.checkpoints.strict_json import read_object
from qwen3_fp8_ascend.checkpoints.weight_file import read_header
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import BlockFp8Config
from tests.fuzz import drafts
from tests.fuzz.choices import Choices
from tests.fuzz.damages import Damage
from tests.fuzz.damages.configs import CONFIGS
from tests.fuzz.damages.files import BYTES
from tests.fuzz.damages.headers import HEADERS
from tests.fuzz.damages.tensors import TENSORS
from tests.fuzz.folders import HostileFolder
from tests.fuzz.format_judge import tensors_of
from tests.fuzz.hostile import STAGES, hostile_folder


@dataclass(frozen=True)
class Reader:
    """How to make an input for it from choices, and how to let it read."""

    name: str
    read: Callable[[Path], None]
    make: Callable[[Choices], HostileFolder]
    reads_data: bool = False


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHTS_SUFFIX)


MAX_JUDGED = 1 << 16
"""Bytes of a header that the format's judge reads; what it takes itself counts as the reader's memory."""


def read_headers(folder: Path) -> None:
    """Every header; what is accepted means the same to another reading of the format, and torch can hold it."""
    for path in sorted(folder.iterdir()):
        if not _is_weights(path.name):
            continue
        header = read_header(path)
        if path.is_symlink() or header.size > 1 << 22 or header.header_bytes > MAX_JUDGED:
            continue
        found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in header.tensors}
        assert found == tensors_of(path), "the format says something else"
        for tensor in header.tensors:
            if not tensor.nbytes:  # of any length, but for one size that is zero
                torch.empty(tensor.shape, device="meta")


def read_config(folder: Path) -> None:
    """config.json and its quantization_config; what is accepted is written and read back."""
    config = read_object(folder / CONFIG, CONFIG, MAX_CONFIG_BYTES)
    quantization = find_quantization(config)
    if quantization is not None:
        parsed = BlockFp8Config.from_dict(*quantization)
        assert BlockFp8Config.from_dict(json.loads(json.dumps(parsed.to_dict()))) == parsed


def inspect(folder: Path) -> None:
    """`inspect --json`."""
    report = inspect_checkpoint(folder)
    for text in _texts(json.loads(json.dumps(report.to_dict()))["anomalies"]):
        assert text.isprintable(), f"not safe for a terminal: {text[:100]!a}"
    if report.errors:
        raise CheckpointError(report.errors[0])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def render(folder: Path) -> None:
    """`inspect` as it is printed."""
    report = inspect_checkpoint(folder)
    text = io.StringIO()
    print_report(report, Console(file=text, width=100, force_terminal=False))
    assert all(line.isprintable() for line in text.getvalue().split("\n")), "not safe for a terminal"
    text.getvalue().encode()
    if report.errors:
        raise CheckpointError(report.errors[0])


IGNORED: tuple[tuple[str, ...], ...] = ((), (), (), ("*.down_proj",), ("*.experts.1.*",), ("*.up_proj",), ("nothing",))
"""What a user may leave out of quantization; the sizes of the files decide, so that an input is always read alike."""


def _convert(folder: Path, operation: str) -> None:
    from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
    from qwen3_fp8_ascend.checkpoints.quantize import CONTAINERS, quantize_checkpoint

    destination = folder.parent.parent.parent / "converted"
    before = sorted(os.listdir(folder))
    try:
        if operation == "quantize":
            size = sum(path.lstat().st_size for path in folder.iterdir())
            ignore, container = IGNORED[size % len(IGNORED)], CONTAINERS[size % len(CONTAINERS)]
            quantize_checkpoint(
                folder, destination, block=drafts.BLOCK, ignore=ignore, container=container, progress=False
            )
        else:
            dequantize_checkpoint(folder, destination, progress=False)
    except BlockFp8Error:
        assert not destination.exists(), "a refused checkpoint left a finished one"
        raise
    finally:
        shutil.rmtree(f"{destination}.incomplete", ignore_errors=True)
    assert sorted(os.listdir(folder)) == before, "the source was changed"
    if operation == "quantize":
        check_checkpoint(destination)
    else:
        inspect_checkpoint(destination)
    _check_values(destination, operation)


READABLE = ("F32", "F16", "BF16", "F8_E4M3")


def _check_values(folder: Path, operation: str) -> None:
    """Nothing that is no number gets through unnoticed."""
    for path in folder.iterdir():
        if not _is_weights(path.name) or path.stat().st_size > 1 << 28:
            continue
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if file.get_slice(name).get_dtype() not in READABLE:
                    continue  # copied as bytes
                tensor = file.get_tensor(name)
                if operation == "quantize" and name.endswith((".weight_scale_inv", ".weight_scale")):
                    assert bool((torch.isfinite(tensor) & (tensor >= 0)).all()), f"a bad scale in {name}"
                assert tensor.dtype != torch.float8_e4m3fn or operation == "quantize", f"{name} is still FP8"
                if tensor.dtype == torch.float8_e4m3fn:
                    assert not bool(tensor.float().isnan().any()), f"NaN codes in {name}"


def quantize(folder: Path) -> None:
    """`quantize`; what comes out is a checkpoint that can be served."""
    _convert(folder, "quantize")


def dequantize(folder: Path) -> None:
    """`dequantize`; what comes out has no FP8 left."""
    _convert(folder, "dequantize")


def load(folder: Path) -> None:
    """What the vLLM plugin does with a checkpoint: config, headers, parameters, values, packing."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig

    # transformers and vLLM read config.json before us; what they make of a damaged one is theirs.
    quantization = read_object(folder / CONFIG, CONFIG, MAX_CONFIG_BYTES).get("quantization_config")
    if BlockFp8AscendConfig.override_quantization_method(quantization, "ascend") is None:
        raise BlockFp8Error("not for us")
    plugin = BlockFp8AscendConfig.from_config(quantization)
    plugin.maybe_update_config(str(folder))
    _load_layers(folder, plugin, QKVParallelLinear, MergedColumnParallelLinear, RowParallelLinear)


def _load_layers(folder: Path, plugin: Any, qkv: Any, merged: Any, row: Any) -> None:
    plugin.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    options = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": plugin}
    heads = (drafts.HEAD_SIZE, drafts.HEADS, drafts.KV_HEADS)
    attention, mlp = "model.layers.0.self_attn.", "model.layers.1.mlp."
    layers = {
        "qkv_proj": qkv(drafts.HIDDEN, *heads, prefix=f"{attention}qkv_proj", **options),
        "gate_up_proj": merged(drafts.HIDDEN, [drafts.INNER] * 2, prefix=f"{mlp}gate_up_proj", **options),
        "down_proj": row(drafts.INNER, drafts.HIDDEN, prefix=f"{mlp}down_proj", **options),
    }
    places: dict[str, tuple[Any, tuple[Any, ...]]] = {
        **{f"{attention}{shard}_proj": (layers["qkv_proj"], (shard,)) for shard in "qkv"},
        f"{mlp}gate_proj": (layers["gate_up_proj"], (0,)),
        f"{mlp}up_proj": (layers["gate_up_proj"], (1,)),
        f"{mlp}down_proj": (layers["down_proj"], ()),
    }
    seen = {}
    for path in _files_that_vllm_loads(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                module, _, kind = name.rpartition(".")
                if module in places and kind in ("weight", plugin.checkpoint.scale_name):
                    layer, shard = places[module]
                    parameter = getattr(layer, kind, None)
                    if isinstance(layer.quant_method, _linear_method()) and parameter is not None:
                        seen[name] = file.get_tensor(name)
                        parameter.weight_loader(parameter, seen[name], *shard)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)
    for name, tensor in seen.items():
        if name.endswith(".weight"):
            codes = tensor.view(torch.uint8) & 0x7F
            assert not bool((codes == 0x7F).any()), f"NaN codes of {name} were served"
        else:
            scale = tensor.float()
            assert bool((torch.isfinite(scale) & (scale >= 0)).all()), f"bad scales of {name} were served"


def _files_that_vllm_loads(folder: Path) -> list[str]:
    """All the safetensors files that the index names, or all of the folder if there is none."""
    from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

    found = sorted(str(path) for path in folder.iterdir() if _is_weights(path.name))
    if not found:
        raise BlockFp8Error("vLLM itself refuses a folder without weights, unless they are to be random")
    return filter_duplicate_safetensors_files(found, str(folder), INDEX)


def _linear_method() -> Any:
    from qwen3_fp8_ascend.vllm_plugin.linear import BlockFp8LinearMethod

    return BlockFp8LinearMethod


@contextmanager
def one_rank() -> Iterator[None]:
    """vLLM's layers ask for their place among the ranks."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
        model_parallel_is_initialized,
    )

    from qwen3_fp8_ascend.serving import free_port

    with set_current_vllm_config(VllmConfig()):
        if model_parallel_is_initialized():  # by tests that ran before
            yield
            return
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()


def _maker(
    stages: Sequence[Sequence[Damage]] = STAGES,
    quantized: bool | None = None,
    only: Callable[[str], bool] | None = None,
) -> Callable[[Choices], HostileFolder]:
    def make(choices: Choices) -> HostileFolder:
        return hostile_folder(choices, quantized=quantized, stages=stages, only=only)

    return make


FOR_HEADERS = (TENSORS, HEADERS, HEADERS, BYTES)
FOR_CONFIGS = (CONFIGS, CONFIGS, BYTES)

READERS = {
    reader.name: reader
    for reader in (
        Reader("header", read_headers, _maker(FOR_HEADERS, only=_is_weights)),
        Reader("config", read_config, _maker(FOR_CONFIGS, only=lambda name: name == CONFIG)),
        Reader("inspect", inspect, _maker()),
        Reader("render", render, _maker()),
        Reader("quantize", quantize, _maker(quantized=False), reads_data=True),
        Reader("dequantize", dequantize, _maker(quantized=True), reads_data=True),
        Reader("load", load, _maker(quantized=True), reads_data=True),
    )
}
