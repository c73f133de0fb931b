"""A small random Step-3.5: experts in three stacked tensors a layer, with a bounded activation in one of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.testing.models import write_byte_tokenizer
from tests.support.expert_models import ROUTERS, correct_choices
from tests.support.logprobs import logprobs_of

FILE = "model.safetensors"
EXPERT_SIZE = 192
"""A block and a half."""
LIMITS = [0.0, 0.0, 7.0]
"""By layer; 0: none. Step-3.5-Flash bounds its last two."""
LARGE = 6
"""What experts are multiplied by, so that many reach the limit."""

BOTH: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 64,
    "vocab_size": 264,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "layer_types": ["full_attention"] * 3,
    "sliding_window": 512,
    "moe_intermediate_size": EXPERT_SIZE,
    "moe_router_scaling_factor": 1.5,
    "share_expert_dim": 256,
    "swiglu_limits": LIMITS,
    "swiglu_limits_shared": [0.0, 0.0, 0.0],
    "bos_token_id": 256,
    "eos_token_id": 257,
}
PUBLIC = BOTH | {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "num_attention_groups": 2,
    "max_seq_len": 1024,
    "use_moe": True,
    "moe_layers_enum": "1,2",
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "norm_expert_weight": True,
    "moe_router_activation": "sigmoid",
    "use_head_wise_attn_gate": True,
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
    "use_rope_layers": [],
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""config.json in the form of the public checkpoints, which vLLM reads."""
TRANSFORMERS = BOTH | {
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "query_pre_attn_scalar": 64,
    "pad_token_id": 0,
    "initializer_range": 0.08,
}
"""The same for transformers, which has it as the text model of Step-3.7: with a tower that no text meets."""
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def write_step(folder: Path, seed: int = 0) -> Path:
    """Write the bf16 master with a byte tokenizer as vLLM reads it; beside it, `<folder>-stock`, for transformers."""
    import transformers

    stock = _stock(folder)
    torch.manual_seed(seed)
    config = transformers.Step3p7Config(text_config=TRANSFORMERS, vision_config=TOWER)
    model = transformers.Step3p7ForConditionalGeneration(config).to(torch.bfloat16)
    correct_choices(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".experts." in name:
                weight.mul_(LARGE)
            elif name.endswith(ROUTERS):
                torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(stock)
    folder.mkdir()
    tensors = {name: t for name, t in load_file(stock / FILE).items() if name.startswith(("model.", "lm_head."))}
    save_file(tensors, folder / FILE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(PUBLIC))
    write_byte_tokenizer(folder)
    write_byte_tokenizer(stock)
    return folder


def step_logprobs(master: Path, weights: Path, limits: list[float] | None = LIMITS) -> np.ndarray:
    """`tests.support.logprobs.stock_logprobs` of the master, with the weights of another folder."""
    import transformers

    held = _stock(master).with_name(weights.name + "-held")
    shutil.copytree(_stock(master), held, dirs_exist_ok=True)
    tensors = load_file(held / FILE)
    save_file(tensors | load_file(weights / FILE), held / FILE, {"format": "pt"})
    config = transformers.AutoConfig.from_pretrained(held)
    config.text_config.swiglu_limits = limits
    of_class = transformers.Step3p7ForConditionalGeneration
    model = of_class.from_pretrained(held, config=config, dtype=torch.float32)
    return logprobs_of(held, model)


def _stock(folder: Path) -> Path:
    return folder.with_name(folder.name + "-stock")
