"""Small random models of public families, written by transformers with its own names of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.testing.models import write_byte_tokenizer
from tests.support.expert_models import COMMON, FAMILIES, correct_choices

TEXT = COMMON | {"head_dim": 64}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 16,
    "out_hidden_size": 256,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
}

LATENT = COMMON | FAMILIES["deepseek_v3"][1] | {"first_k_dense_replace": 2}
"""Latent attention, and no experts in any layer."""

Model = tuple[str, dict[str, Any]]
MODELS: dict[str, Model] = {
    "qwen3": ("Qwen3Config", TEXT),
    "qwen2": ("Qwen2Config", COMMON),
    "llama": ("LlamaConfig", TEXT),
    "deepseek_v3, dense": ("DeepseekV3Config", LATENT | {"q_lora_rank": None}),
    "deepseek_v3, dense, q_lora": ("DeepseekV3Config", LATENT | {"q_lora_rank": 128}),
    "seed_oss": ("SeedOssConfig", TEXT),
    "gemma3_text": ("Gemma3TextConfig", TEXT),
    "glm4": ("Glm4Config", TEXT | {"pad_token_id": 0}),
    "phi3": ("Phi3Config", COMMON | {"pad_token_id": 0}),
    "granitemoe": ("GraniteMoeConfig", COMMON | {"num_local_experts": 8}),
    "qwen3_vl": ("Qwen3VLConfig", {"text_config": TEXT, "vision_config": VISION}),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        {
            "text_config": TEXT | {"num_experts": 8, "moe_intermediate_size": 256, "norm_topk_prob": True},
            "vision_config": VISION,
        },
    ),
    "qwen3_5": ("Qwen3_5Config", {"text_config": TEXT | DELTA_NET, "vision_config": VISION}),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "head_dim": 32,
                "image_size": 64,
                "patch_size": 16,
            },
        },
    ),
} | {family: (name, COMMON | differences) for family, (name, differences) in FAMILIES.items()}
"""Family -> transformers' configuration class and what it is given: merged on disk, delta nets, towers, experts."""


TRANSPOSED = ("qwen3_vl_moe",)
"""Families whose public masters hold a layer's experts as (experts, k, n); transformers 5 writes (experts, n, k)."""


def write_model(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a random bf16 model of a family with a byte tokenizer."""
    import transformers

    name, settings = MODELS[family]
    config = getattr(transformers, name)(**settings)
    loader = transformers.AutoModelForCausalLM
    if "vision_config" in settings:
        loader = transformers.AutoModelForImageTextToText
    torch.manual_seed(seed)
    model = loader.from_config(config, dtype=torch.bfloat16)
    correct_choices(model)
    model.save_pretrained(folder)
    if family in TRANSPOSED:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for name in [name for name, tensor in tensors.items() if ".experts." in name and tensor.dim() == 3]:
            tensors[name] = tensors[name].mT.contiguous()
        save_file(tensors, file, {"format": "pt"})
    write_byte_tokenizer(folder)
    return folder
