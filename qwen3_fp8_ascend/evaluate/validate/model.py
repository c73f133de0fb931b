"""A small Qwen3 of random weights, in block FP8: by vLLM where it is installed, and in plain torch everywhere."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import load_backend
from qwen3_fp8_ascend.backends.registry import usable_backends
from qwen3_fp8_ascend.checkpoints.quantize import quantize_weight
from qwen3_fp8_ascend.evaluate.validate.cases import Case, Context, Found
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.provenance import installed_version
from qwen3_fp8_ascend.testing.devices import Device
from qwen3_fp8_ascend.testing.models import qwen3_config, random_qwen3
from qwen3_fp8_ascend.vllm_plugin import versions

TOKENS = 48
PROMPTS = 4
W8A16_LIMIT = 1e-4
"""Nats a token between a backend and the specification, both in fp32 and without activation quantization. Rounding
alone makes 1e-6; a wrong scale makes more than 0.1."""

Tensors = dict[str, torch.Tensor]
Linear = Callable[[str, torch.Tensor], torch.Tensor]
"""A layer's name and its activations -> its result."""


def quantized(config: dict[str, Any], seed: int) -> Tensors:
    """The model's tensors with each linear of its decoder layers in block FP8, as a checkpoint names them."""
    tensors: Tensors = {}
    for name, tensor in random_qwen3(config, seed).items():
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_weight(tensor)
        else:
            tensors[name] = tensor
    return tensors


def logprobs(config: dict[str, Any], tensors: Tensors, linear: Linear, ids: torch.Tensor, dtype: Any) -> torch.Tensor:
    """Log-probability of every token but the first, by a forward pass in plain torch on the tensors' device.

    Shapes: ids (tokens,) -> (tokens - 1,) fp32 on the CPU.
    Source: transformers' Qwen3ForCausalLM; tests/evaluate/test_validate_model.py compares.
    """
    place = tensors["model.norm.weight"].device
    size, tokens = config["head_dim"], len(ids)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + config["rms_norm_eps"])
        return tensors[f"{name}.weight"].to(dtype) * wide.to(dtype)

    angles = torch.arange(tokens, dtype=torch.float32)[:, None]
    angles = angles / config["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    cosine, sine = (f(torch.cat([angles, angles], -1)).to(place, dtype) for f in (torch.cos, torch.sin))

    def heads(x: torch.Tensor, name: str | None = None) -> torch.Tensor:
        """(tokens, heads * size) -> (heads, tokens, size); queries and keys normed and turned."""
        split = x.view(tokens, -1, size)
        if name is None:
            return split.transpose(0, 1)
        split = norm(split, name).transpose(0, 1)
        first, second = split.chunk(2, -1)
        return split * cosine + torch.cat([-second, first], -1) * sine

    x = functional.embedding(ids.to(place), tensors["model.embed_tokens.weight"]).to(dtype)
    mask = torch.full((tokens, tokens), float("-inf"), device=place).triu(1)
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        attention = f"{layer}.self_attn"
        inner = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(f"{attention}.{which}_proj", inner) for which in "qkv")
        q, k = heads(q, f"{attention}.q_norm"), heads(k, f"{attention}.k_norm")
        k, v = (t.repeat_interleave(groups, 0) for t in (k, heads(v)))
        weights = ((q @ k.transpose(1, 2)).float() * size**-0.5 + mask).softmax(-1).to(dtype)
        x = x + linear(f"{attention}.o_proj", (weights @ v).transpose(0, 1).reshape(tokens, -1))
        inner = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (linear(f"{layer}.mlp.{which}_proj", inner) for which in ("gate", "up"))
        x = x + linear(f"{layer}.mlp.down_proj", functional.silu(gate) * up)
    logits = norm(x, "model.norm") @ tensors["lm_head.weight"].to(dtype).t()
    normalized = logits.float().cpu().log_softmax(-1)[:-1]
    return normalized.gather(1, ids[1:, None].cpu())[:, 0]


def specified(tensors: Tensors, activation: Activation, wrong: bool = False) -> Linear:
    """The specification on the host; `wrong` takes every block's scale from its neighbour, for a negative control."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        scale = tensors[f"{name}.weight_scale_inv"]
        scale = scale.roll(1, 0).roll(1, 1) if wrong else scale
        return reference.block_linear(x, tensors[f"{name}.weight"], scale, activation=activation)

    return linear


def computed(tensors: Tensors, backend: str, activation: Activation, device: Device) -> Linear:
    """A backend on a device."""
    packed = {
        name.removesuffix(".weight"): ops.pack_weight(
            tensor.view(torch.uint8).to(device.place).view(tensor.dtype),
            tensors[f"{name}_scale_inv"].to(device.place),
            backend=backend,
        )
        for name, tensor in tensors.items()
        if f"{name}_scale_inv" in tensors
    }
    return lambda name, x: ops.block_linear(x, packed[name], None, activation)


def prompts(config: dict[str, Any], seed: int) -> list[torch.Tensor]:
    """Token ids, random ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (TOKENS,), generator=generator) for _ in range(PROMPTS)]


def models(context: Context) -> Iterator[Case]:
    """Each backend in plain torch, then vLLM."""
    for backend in usable_backends(context.device.place.type, slow=False):
        yield Case(f"torch/{backend.name}", functools.partial(_in_torch, context, backend.name))
    yield Case("vllm", functools.partial(_in_vllm, context))


class _Sizes:
    """Distances between two ways to compute the model, in nats a token, with what they are judged by."""

    def __init__(self, config: dict[str, Any], seed: int) -> None:
        self.config, self.tensors, self.ids = config, quantized(config, seed), prompts(config, seed)
        self.spec = self.of(specified(self.tensors, Activation.W8A8), torch.float32)
        rounded = self.of(specified(self.tensors, Activation.W8A8), torch.bfloat16)
        wrong = self.of(specified(self.tensors, Activation.W8A8, wrong=True), torch.bfloat16)
        self.floor, self.control = distance(rounded, self.spec), distance(wrong, self.spec)

    def of(self, linear: Linear, dtype: torch.dtype, device: Device | None = None) -> torch.Tensor:
        there = self.tensors
        if device is not None:
            there = {n: t.to(device.place) for n, t in self.tensors.items() if t.dtype == torch.bfloat16}
        return torch.cat([logprobs(self.config, there, linear, ids, dtype) for ids in self.ids])

    def judge(self, got: torch.Tensor, found: Found) -> None:
        """Like the specification in bf16, whose distance from fp32 is the floor; far from one with wrong scales."""
        off, limit = distance(got, self.spec), 2 * self.floor
        found.values |= {"distance": off, "floor": self.floor, "with wrong scales": self.control}
        if not self.control > 2 * limit:
            found.faults.append(f"the model cannot tell: {self.control:.4f} with wrong scales, limit {limit:.4f}")
        found.hold(
            "w8a8, nats a token", off, limit, f"{off:.4f} nats a token from the specification, at most {limit:.4f}"
        )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean absolute difference of log-probabilities."""
    return float((a - b).abs().mean())


def _in_torch(context: Context, backend: str, seed: int) -> Found:
    found, sizes = Found(), _Sizes(qwen3_config(), seed)
    computes = load_backend(backend).computes
    if Activation.W8A16 in computes:
        linear = computed(sizes.tensors, backend, Activation.W8A16, context.device)
        off = distance(
            sizes.of(linear, torch.float32, context.device),
            sizes.of(specified(sizes.tensors, Activation.W8A16), torch.float32),
        )
        found.hold("w8a16, nats a token", off, W8A16_LIMIT, f"w8a16: {off:.2e} nats a token, at most {W8A16_LIMIT}")
    if Activation.W8A8 in computes:
        linear = computed(sizes.tensors, backend, Activation.W8A8, context.device)
        sizes.judge(sizes.of(linear, torch.bfloat16, context.device), found)
    return found


def _without_vllm(kind: str) -> str | None:
    """Why no vLLM here serves on a device of that kind, or None."""
    for needed in ("vllm", "transformers"):
        if importlib.util.find_spec(needed) is None:
            return f"{needed} is not installed"
    on_cpu = versions.is_cpu_build()
    if (kind == "cpu") != on_cpu:
        return f"the vLLM here is {'' if on_cpu else 'not '}the one for CPUs"
    if kind == "npu" and installed_version("vllm-ascend") is None:
        return "vllm-ascend is not installed"
    return None


def _in_vllm(context: Context, seed: int) -> Found:
    found = Found(skipped=_without_vllm(context.device.kind))
    if found.skipped:
        return found
    from safetensors.torch import load_file

    from qwen3_fp8_ascend.serving import exit_on_sigterm, serve
    from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3

    exit_on_sigterm()
    sizes = _Sizes(qwen3_config(), seed)
    arguments = ["--quantization", "ascend", "--max-model-len", "256", "--dtype", "bfloat16", "--enforce-eager"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_block_fp8_qwen3(Path(scratch) / "model", seed)
        written = load_file(folder / "model.safetensors")
        same = all(
            torch.equal(written[name].view(torch.uint8), t.view(torch.uint8)) for name, t in sizes.tensors.items()
        )
        assert same, "the checkpoint is not the model"
        with serve(folder, *arguments, log=Path(scratch) / "server.log", timeout=200) as server:
            got = torch.cat([_served(server, ids) for ids in sizes.ids])
    sizes.judge(got, found)
    return found


def _served(server: Any, ids: torch.Tensor) -> torch.Tensor:
    body = {"model": server.model, "prompt": ids.tolist(), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    positions = server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
    chosen = [entries[str(int(token))]["logprob"] for token, entries in zip(ids[1:], positions[1:], strict=True)]
    return torch.tensor(chosen)
