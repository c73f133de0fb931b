"""Small random models that see, in the forms of Qwen3-VL and Qwen3.5 (a delta net), written by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.testing.models import byte_tokenizer

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
"""Where a prompt shows its image."""

TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 264,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "initializer_range": 0.08,
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 2,
    "out_hidden_size": 256,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
    "initializer_range": 0.05,
}
TOKENS = {
    "vision_start_token_id": 258,
    "vision_end_token_id": 259,
    "image_token_id": 260,
    "video_token_id": 261,
    "tie_word_embeddings": False,
}


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections), "mrope_interleaved": True}
    return {"rope_parameters": rope | more}


FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl": (
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {"num_hidden_layers": 2} | _rope(12, 10, 10),
        {"deepstack_visual_indexes": [0, 1]},
    ),
    "qwen3_5": (
        "Qwen3_5Config",
        "Qwen3_5ForConditionalGeneration",
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        }
        | _rope(6, 5, 5, partial_rotary_factor=0.5),
        {},
    ),
}
"""Configuration, model, and what they differ in: text, vision."""

LEFT_ALONE = {"qwen3_vl": (), "qwen3_5": ("*.linear_attn.in_proj_a", "*.linear_attn.in_proj_b")}
"""Beside what sees, what official releases leave in bf16."""


def write_vision_model(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a random bf16 model of a family, and beside it the same in block FP8: `<folder>-fp8`, which is returned."""
    import transformers

    config_class, model_class, text, vision = FAMILIES[family]
    config = getattr(transformers, config_class)(text_config=TEXT | text, vision_config=VISION | vision, **TOKENS)
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    images = transformers.Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 1024, "longest_edge": 16384})
    videos = transformers.Qwen3VLVideoProcessor(patch_size=16)
    tokenizer = byte_tokenizer(SPECIAL)
    transformers.Qwen3VLProcessor(images, tokenizer, videos).save_pretrained(folder)
    quantized = folder.with_name(folder.name + "-fp8")
    quantize_checkpoint(folder, quantized, ignore=list(LEFT_ALONE[family]), progress=False)
    return quantized
