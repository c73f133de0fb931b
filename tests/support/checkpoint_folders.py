"""Checkpoint folders for tests: small ones with real tensors, huge ones that are sparse, and damaged ones."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen3_fp8_ascend.checkpoints.weight_file import DTYPE_BITS
from qwen3_fp8_ascend.format import scale_shape

BLOCK_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: a second thread on a busy machine only adds waiting. Import it to use it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_folder(
    folder: Path,
    files: Mapping[str, Mapping[str, torch.Tensor]],
    config: Mapping[str, Any] | None = None,
    *,
    index: bool | None = None,
) -> Path:
    """Write safetensors files with config.json, and an index if there are several (or `index`)."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
    if index if index is not None else len(files) > 1:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"} | dict(config or {})))
    return folder


def raw_file(header: Any, data_bytes: int, *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file with that header (JSON data, or bytes as they are) and zeros for data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data_bytes)


def write_sparse(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Write a safetensors file of any size that takes no disk space: a real header and a hole. Returns its size."""
    entries, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    head = raw_file(entries, 0)
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(len(head) + position)
    return len(head) + position


def linear_weights(layers: int, hidden: int, inner: int, kv: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of a Qwen3-like decoder's linear weights."""
    out = {}
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        out |= {f"{attention}.{p}_proj.weight": (n, hidden) for p, n in (("q", hidden), ("k", kv), ("v", kv))}
        out[f"{attention}.o_proj.weight"] = (hidden, hidden)
        out |= {f"{mlp}.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        out[f"{mlp}.down_proj.weight"] = (hidden, inner)
    return out


def random_model(
    layers: int = 3,
    hidden: int = 192,
    inner: int = 320,
    kv: int = 72,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A random decoder with ragged shapes: embedding, linears, norms, lm_head."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {name: random(*shape) for name, shape in linear_weights(layers, hidden, inner, kv).items()}
    for i in range(layers):
        tensors[f"model.layers.{i}.input_layernorm.weight"] = random(hidden)
        tensors[f"model.layers.{i}.self_attn.q_proj.bias"] = random(hidden)
    tensors["model.embed_tokens.weight"] = random(97, hidden)
    tensors["lm_head.weight"] = random(97, hidden)
    tensors["model.norm.weight"] = random(hidden)
    return tensors


def in_files(tensors: Mapping[str, torch.Tensor], count: int) -> dict[str, dict[str, torch.Tensor]]:
    """Spread tensors over `count` files with Hugging Face's names."""
    files: dict[str, dict[str, torch.Tensor]] = {
        f"model-{i + 1:05}-of-{count:05}.safetensors": {} for i in range(count)
    }
    names = list(files)
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        files[names[i * count // len(tensors)]][name] = tensor
    return files


def block_fp8_tensors() -> dict[str, torch.Tensor]:
    """Two decoder layers in block FP8, with what is normal beside them."""
    tensors: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": torch.zeros(9, 200).bfloat16(),
        "lm_head.weight": torch.zeros(9, 200),
        "model.norm.weight": torch.ones(200).bfloat16(),
    }
    for name, (n, k) in linear_weights(2, 200, 300, 72).items():
        tensors[name] = torch.zeros(n, k).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(scale_shape(n, k))
    for i in range(2):
        tensors[f"model.layers.{i}.input_layernorm.weight"] = torch.ones(200).bfloat16()
        tensors[f"model.layers.{i}.self_attn.q_proj.bias"] = torch.ones(200).bfloat16()
        tensors[f"model.layers.{i}.mlp.gate.weight"] = torch.ones(8, 200).bfloat16()
        tensors[f"model.layers.{i}.conv1d.weight"] = torch.ones(8, 1, 4).bfloat16()
    return tensors


def write_block_fp8(folder: Path, tensors: dict[str, torch.Tensor], **quantization: Any) -> Path:
    """Write it as one file with a config.json that declares block FP8."""
    config = {
        "quantization_config": BLOCK_FP8 | quantization,
        "num_hidden_layers": 2,
        "architectures": ["Qwen3ForCausalLM"],
    }
    return write_folder(folder, {"model.safetensors": tensors}, config)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
