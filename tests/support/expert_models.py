"""Small random mixtures of experts in the forms of public families, written by transformers with its own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.testing.models import write_byte_tokenizer

COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 64, "num_experts": 8, "moe_intermediate_size": 192, "norm_topk_prob": True},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 8, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "head_dim": 64,
            "num_experts": 8,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "moe_intermediate_size": 128,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "first_k_dense_replace": 1,
            "q_lora_rank": 128,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "head_dim": 64,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "moe_intermediate_size": 128,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    "afmoe": (
        "AfmoeConfig",
        {
            "head_dim": 64,
            "num_experts": 8,
            "num_shared_experts": 1,
            "moe_intermediate_size": 128,
            "num_dense_layers": 1,
            "score_func": "sigmoid",
            "route_norm": True,
            "n_group": 1,
            "topk_group": 1,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "llama4_text": (
        "Llama4TextConfig",
        {
            "head_dim": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "intermediate_size": 256,
            "intermediate_size_mlp": 512,
            "interleave_moe_layer_step": 1,
            "layer_types": ["full_attention", "full_attention"],
            "no_rope_layers": [1, 1],
            "attn_temperature_tuning": False,
            "pad_token_id": 0,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        {
            "head_dim": 64,
            "num_local_experts": 8,
            "intermediate_size": 192,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "use_qk_norm": True,
            "rotary_dim": 32,
        },
    ),
    "gemma4_text": (
        "Gemma4TextConfig",
        {
            "head_dim": 64,
            "global_head_dim": 64,
            "num_global_key_value_heads": 2,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 192,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "pad_token_id": 0,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 128,
            "moe_num_shared_experts": 1,
            "pad_token_id": 0,
        },
    ),
}
"""Configuration class, and what it differs in: ragged experts, a shared expert, a delta net, groups of experts, a
router in a module of its own, transposed masters and weights on the input, a correction bias without groups, GELU."""

LEFT_ALONE = ("*.linear_attn.in_proj_ba",)
"""Beside routers, what official releases of these families leave in bf16."""


ROUTERS = ("mlp.gate.weight", "mlp.router.gate.weight", "feed_forward.router.weight")


def correct_choices(model: torch.nn.Module) -> None:
    """Give experts different correction biases, where the model has any; transformers makes them zero."""
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(tensor, std=0.2)


def write_experts(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Write a random bf16 model of a family, and beside it the same in block FP8: `<folder>-fp8`, which is returned."""
    import transformers

    name, differences = FAMILIES[family]
    config = getattr(transformers, name)(**(COMMON | differences | changes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter, tensor in model.named_parameters():
        if parameter.endswith(ROUTERS):
            torch.nn.init.normal_(tensor, std=0.5)  # so that experts differ in weight, and no choice is a close one
    correct_choices(model)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    modules = [module for module, _ in model.named_modules()]
    ignore = [glob for glob in LEFT_ALONE if any(module.endswith(glob.removeprefix("*")) for module in modules)]
    quantized = folder.with_name(folder.name + "-fp8")
    quantize_checkpoint(folder, quantized, ignore=ignore, progress=False)
    return quantized
