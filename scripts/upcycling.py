"""A dense model turned into a mixture of experts that computes the same function: a real one without a download.

Two forms. Copies: each expert is the dense MLP with its intermediate channels in another order, so that whichever
experts a router chooses, the weighted sum is the dense output; yet each expert has bytes and scales of its own, and a
projection or a scale taken from another expert makes noise. Slices: each expert has some of the channels, and all are
chosen with equal weights, so that a wrong number or a lost expert shows; a shared expert has the other channels.

Channels move in whole blocks of 128 and within them, and factors are powers of two. So block FP8 gives the experts the
dense model's codes and scales, in another order, and both models differ by the order of sums alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import DEFAULT_BLOCK

Mlp = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""gate (I, H), up (I, H), down (H, I)."""

Tensors = dict[str, torch.Tensor]


def write_copied_experts(source: Path, folder: Path, experts: int = 4, top_k: int = 2, seed: int = 0) -> Path:
    """Write the first form of a dense bf16 checkpoint of Llama's form, as a Mixtral; its router is random.

    Mixtral, since it has neither biases nor q/k norms and lets attention have any number of heads
    (tests/support/padded_heads.py); its experts' projections are called w1, w3 and w2.
    """
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    generator = torch.Generator().manual_seed(seed)

    def convert(layer: str, mlp: Mlp) -> Iterator[tuple[str, torch.Tensor]]:
        for expert in range(experts):
            order = _shuffled(len(mlp[0]), generator)
            yield from _expert(f"{layer}.block_sparse_moe.experts.{expert}", names, _channels(mlp, order))
        router = torch.randn(experts, mlp[0].shape[1], generator=generator) / mlp[0].shape[1] ** 0.5
        yield f"{layer}.block_sparse_moe.gate.weight", router.to(mlp[0].dtype)

    changes = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "sliding_window": None,
    }
    return _write(source, folder, convert, changes)


def write_sliced_experts(
    source: Path, folder: Path, experts: int = 4, size: int = 256, seed: int = 0, family: str = "qwen2_moe"
) -> Path:
    """Write the second form of a dense bf16 checkpoint of Llama's form, as a Qwen2-MoE or as a GLM-4.5.

    `experts` slices of `size` channels each, all of them chosen for every token; the shared expert has the rest. A
    slice counts 1/experts and Qwen2-MoE's shared expert sigmoid(0) = 1/2, so their down projections are multiplied
    back. GLM-4.5 ("glm4_moe") adds its shared expert as it is, and lets attention have any number of heads; its output
    head is never tied to the embeddings, so that it has a copy of them.
    Raises:
        BlockFp8Error: the slices are not whole blocks, their number is no power of two, nothing is left to share, or
            what is left is not what the family's shared expert can be.
    """
    generator = torch.Generator().manual_seed(seed)
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    config = json.loads((source / "config.json").read_text())
    inner = config["intermediate_size"]
    shared = inner - experts * size
    glm = family == "glm4_moe"
    if size % DEFAULT_BLOCK.n or experts & (experts - 1) or shared <= 0 or (glm and shared % size):
        raise BlockFp8Error(
            f"these slices do not compute the dense model exactly as a {family}",
            expected=f"a power of two of them, in multiples of {DEFAULT_BLOCK.n}, below {inner} channels together"
            + ("; of GLM-4.5 the rest is some slices too" if glm else ""),
            got=f"{experts} of {size}",
        )

    def convert(layer: str, mlp: Mlp) -> Iterator[tuple[str, torch.Tensor]]:
        hidden, dtype = mlp[0].shape[1], mlp[0].dtype
        order = _shuffled(inner, generator)
        for expert in range(experts):
            slice_ = order[expert * size : (expert + 1) * size]
            yield from _expert(f"{layer}.mlp.experts.{expert}", names, _channels(mlp, slice_, experts))
        rest = order[experts * size :]
        yield f"{layer}.mlp.gate.weight", torch.zeros(experts, hidden, dtype=dtype)
        if glm:
            yield from _expert(f"{layer}.mlp.shared_experts", names, _channels(mlp, rest))
            yield f"{layer}.mlp.gate.e_score_correction_bias", torch.zeros(experts)
            return
        yield from _expert(f"{layer}.mlp.shared_expert", names, _channels(mlp, rest, 2))
        yield f"{layer}.mlp.shared_expert_gate.weight", torch.zeros(1, hidden, dtype=dtype)
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        for projection, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield f"{layer}.self_attn.{projection}_proj.bias", torch.zeros(count * hidden // heads, dtype=dtype)

    describe = _glm4_moe if glm else _qwen2_moe
    changes = {"num_experts_per_tok": experts, "norm_topk_prob": True, "moe_intermediate_size": size}
    return _write(source, folder, convert, changes | describe(config, experts, size, shared))


def _qwen2_moe(config: dict[str, Any], experts: int, size: int, shared: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": experts,
        "shared_expert_intermediate_size": shared,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "qkv_bias": True,
    }


def _glm4_moe(config: dict[str, Any], experts: int, size: int, shared: int) -> dict[str, Any]:
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "n_routed_experts": experts,
        "n_shared_experts": shared // size,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
        "use_qk_norm": False,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 1.0,
        "rope_parameters": config["rope_parameters"] | {"partial_rotary_factor": 1.0},
    }


def _write(
    source: Path,
    folder: Path,
    convert: Callable[[str, Mlp], Iterator[tuple[str, torch.Tensor]]],
    changes: dict[str, Any],
) -> Path:
    config = json.loads((source / "config.json").read_text())
    if config.get("model_type") != "llama":
        raise BlockFp8Error("only models of Llama's form are turned into experts", got=config.get("model_type"))
    tensors = load_file(source / "model.safetensors")
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        gate, up, down = (tensors.pop(f"{layer}.mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        tensors |= convert(layer, (gate, up, down))
    if config["tie_word_embeddings"] and not changes.get("tie_word_embeddings", True):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    (folder / "config.json").write_text(json.dumps(config | changes, indent=2))
    return folder


def _shuffled(channels: int, generator: torch.Generator) -> torch.Tensor:
    """A random order of channels that keeps each block's together; a last block that is not whole stays the last."""
    block = DEFAULT_BLOCK.n
    whole = channels // block
    blocks = [int(i) for i in torch.randperm(whole, generator=generator)] + [whole] * (channels % block > 0)
    parts = []
    for i in blocks:
        size = min(block, channels - i * block)
        parts.append(i * block + torch.randperm(size, generator=generator))
    return torch.cat(parts)


def _channels(mlp: Mlp, channels: torch.Tensor, factor: int = 1) -> Mlp:
    """An MLP of some of the intermediate channels, whose output is multiplied by a power of two, which is exact."""
    gate, up, down = mlp
    return gate[channels], up[channels], (down[:, channels] * factor).contiguous()


def _expert(prefix: str, names: dict[str, str], mlp: Mlp) -> Iterator[tuple[str, torch.Tensor]]:
    for projection, weight in zip(("gate", "up", "down"), mlp, strict=True):
        yield f"{prefix}.{names[projection]}.weight", weight
