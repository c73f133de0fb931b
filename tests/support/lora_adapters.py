"""LoRA adapters for random models, in the files that PEFT writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwen3_fp8_ascend.testing.models import qwen3_shapes

RANK = 8
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


def write_adapter(folder: Path, model: Path, strength: float, seed: int = 0) -> Path:
    """An adapter for a Qwen3 checkpoint: random A, and random B times `strength` (0: an adapter without effect)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in qwen3_shapes(json.loads((model / "config.json").read_text())).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            n, k = shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, k, generator=generator) / k**0.5
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(n, RANK, generator=generator) * strength
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "bias": "none"}
    (folder / "adapter_config.json").write_text(
        json.dumps(settings | {"r": RANK, "lora_alpha": RANK, "target_modules": list(TARGETS)})
    )
    return folder
