"""Small random models with real shapes' peculiarities, for tests and benchmarks that need no download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint

QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
"""Qwen3-8B's shape, as changes of `qwen3_config`."""

QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
}
"""Shapes of Qwen's mixtures of experts, likewise."""


def qwen3_config(**changes: Any) -> dict[str, Any]:
    """config.json of a Qwen3 model: grouped-query attention, q/k norms; two narrow layers unless changed."""
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 264,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    return config | changes


def qwen3_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Qwen3 checkpoint with that config."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        projections = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
        for name, shape in projections.items():
            shapes[f"{layer}.self_attn.{name}.weight"] = shape
            if config["attention_bias"] and name != "o_proj":
                shapes[f"{layer}.self_attn.{name}.bias"] = shape[:1]
        shapes |= {
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.self_attn.q_norm.weight": (head,),
            f"{layer}.self_attn.k_norm.weight": (head,),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_qwen3(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """A Qwen3 model's tensors by name, in bf16, for a config of `qwen3_config`.

    Weights are scaled so that activations keep their size from layer to layer; some channels are outliers, as
    in real models.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in qwen3_shapes(config).items():
        if len(shape) == 2:
            tensor = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            tensor[:, torch.randint(shape[1], (max(1, shape[1] // 64),), generator=generator)] *= 4
        elif name.endswith(".bias"):
            tensor = torch.randn(shape, generator=generator) * 0.1
        else:
            tensor = 1 + 0.1 * torch.randn(shape, generator=generator)
        tensors[name] = tensor.to(torch.bfloat16)
    return tensors


def write_qwen3(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write `random_qwen3` as a checkpoint with a byte tokenizer into a new folder and return it."""
    config = qwen3_config(**changes)
    folder.mkdir(parents=True)
    save_file(random_qwen3(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_byte_tokenizer(folder)
    return folder


def byte_tokenizer(special: Sequence[str] = ()) -> Any:
    """A tokenizer whose 256 tokens are the bytes, with <bos> = 256, <eos> = 257, and further special ones from 258."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<bos>", "<eos>", *special])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    more = {"additional_special_tokens": list(special)} if special else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", **more)


def write_byte_tokenizer(folder: Path) -> None:
    """Write `byte_tokenizer` into a checkpoint's folder."""
    byte_tokenizer().save_pretrained(folder)


def write_block_fp8_qwen3(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Qwen3 checkpoint quantized to block FP8; the bf16 one stays beside it as `<folder>-bf16`."""
    source = write_qwen3(folder.with_name(folder.name + "-bf16"), seed, **changes)
    quantize_checkpoint(source, folder, progress=False)
    return folder
