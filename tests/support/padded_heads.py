"""A real model whose heads cannot be divided among ranks becomes one whose heads can."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.errors import BlockFp8Error


def write_with_more_heads(source: Path, folder: Path, heads: int, kv_heads: int) -> Path:
    """Copy a bf16 checkpoint of Llama's or Qwen3's form and give it more attention heads that contribute nothing.

    The model computes what it did: further rows of q, k and v are zero, and so are o_proj's columns for them. So a
    real model whose heads cannot be divided among ranks (SmolLM2-135M has 9 and 3) becomes one whose heads can.
    Raises:
        BlockFp8Error: the new heads would change which query heads share a key/value head.
    """
    config = json.loads((source / "config.json").read_text())
    old, old_kv = config["num_attention_heads"], config["num_key_value_heads"]
    if heads * old_kv != kv_heads * old or heads < old:
        raise BlockFp8Error("heads would be regrouped", expected=f"a multiple of {old}/{old_kv}", got=(heads, kv_heads))
    size = config.get("head_dim") or config["hidden_size"] // old
    rows = {"q_proj": heads * size, "k_proj": kv_heads * size, "v_proj": kv_heads * size}
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        projection = name.split(".")[-2]
        if projection in rows:
            tensors[name] = _zeros_around(tensor, rows[projection], tensor.shape[1])
        elif projection == "o_proj":
            tensors[name] = _zeros_around(tensor, tensor.shape[0], heads * size)
    shutil.copytree(source, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _zeros_around(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    out = tensor.new_zeros(rows, columns)
    out[: tensor.shape[0], : tensor.shape[1]] = tensor
    return out
