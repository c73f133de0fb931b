"""Small models with a layer for multi-token prediction (MTP), which vLLM speculates with and transformers leaves out.

Such a layer gets the hidden state of a token and the embedding of the next, and predicts the one after that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.testing.models import write_byte_tokenizer
from tests.support.expert_models import COMMON, FAMILIES
from tests.support.public_models import LATENT, TEXT, VISION

Tensors = dict[str, torch.Tensor]

ONE_LAYER = {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
DEEPSEEK, QWEN3_5, GLM4_MOE = "deepseek_v3", "qwen3_5", "glm4_moe"
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    DEEPSEEK: ("DeepseekV3Config", LATENT | ONE_LAYER | {"q_lora_rank": 128}),
    GLM4_MOE: (
        "Glm4MoeConfig",
        COMMON
        | ONE_LAYER
        | {key: FAMILIES["deepseek_v3"][1][key] for key in ("n_routed_experts", "n_shared_experts", "n_group")}
        | {"head_dim": 64, "moe_intermediate_size": 128, "topk_group": 1, "first_k_dense_replace": 0},
    ),
    QWEN3_5: (
        "Qwen3_5Config",
        {
            "text_config": TEXT
            | {"num_hidden_layers": 1, "mtp_num_hidden_layers": 1, "layer_types": ["full_attention"]},
            "vision_config": VISION,
        },
    ),
}
"""Family -> configuration: latent attention; experts; full attention with a gate and `mtp.*` for names."""


def write_mtp(folder: Path, family: str, *, echo: bool, seed: int = 0) -> Path:
    """Write a bf16 model of one layer and an MTP layer.

    echo: the MTP layer is a copy of the model's only layer, and its projection passes the embedding on: it says nearly
        what the model will. Otherwise it is a layer of other weights, whose guesses are nearly always wrong.
    """
    import transformers

    name, settings = MODELS[family]
    config = getattr(transformers, name)(**settings)
    loader = transformers.AutoModelForImageTextToText if "vision_config" in settings else None
    torch.manual_seed(seed)
    model = (loader or transformers.AutoModelForCausalLM).from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed + 1)
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    rows = tensors[embedding].float()
    tensors[embedding] = (rows / rows.pow(2).mean(-1, keepdim=True).sqrt()).bfloat16()  # so that a norm changes little
    tensors |= _mtp_layer(family, tensors, tensors[embedding], echo, generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    saved = json.loads((folder / "config.json").read_text())
    saved.get("text_config", saved).update(_counts(settings))
    (folder / "config.json").write_text(json.dumps(saved))
    write_byte_tokenizer(folder)
    return folder


def _counts(settings: dict[str, Any]) -> dict[str, Any]:
    keys = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
    return {key: value for key, value in settings.get("text_config", settings).items() if key in keys}


def _mtp_layer(
    family: str, tensors: Tensors, embedding: torch.Tensor, echo: bool, generator: torch.Generator
) -> Tensors:
    """The tensors of the MTP layer, from those of the model's only layer."""
    place = ".layers.0."
    start = next(name for name in tensors if place in name and "visual" not in name).partition(place)[0] + place
    layer = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    hidden = embedding.shape[1]
    passes = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], 1).bfloat16()
    if not echo:
        layer = {name: _other(tensor, generator) for name, tensor in layer.items()}
        passes = (torch.randn(passes.shape, generator=generator) / hidden**0.5).bfloat16()
    ones = tensors[next(name for name in tensors if name.endswith(".norm.weight") and "visual" not in name)]
    if family == QWEN3_5:
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        around = {f"mtp.{name}.weight": ones.clone() for name in names} | {"mtp.fc.weight": passes}
        return around | {f"mtp.layers.0.{name}": tensor.clone() for name, tensor in layer.items()}
    mtp = "model.layers.1."
    around = {f"{mtp}{name}.weight": ones.clone() for name in ("enorm", "hnorm", "shared_head.norm")}
    around |= {
        f"{mtp}eh_proj.weight": passes,
        f"{mtp}embed_tokens.weight": embedding.clone(),
        f"{mtp}shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    return around | {f"{mtp}{name}": tensor.clone() for name, tensor in layer.items()}


def _other(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Other weights of the same size; norms and biases stay."""
    if tensor.ndim < 2:
        return tensor
    return (torch.randn(tensor.shape, generator=generator) * tensor.float().std()).to(tensor.dtype)
