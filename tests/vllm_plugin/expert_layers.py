"""vLLM's own mixture-of-experts layer with our method, a checkpoint's tensors for it, and what it has to compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.checkpoints.quantize import quantize_weight
from qwen3_fp8_ascend.containers import FP8
from qwen3_fp8_ascend.format import Activation, BlockFp8Config, BlockSize
from qwen3_fp8_ascend.glu import SILU, Glu
from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig

EXPERTS, TOP_K, HIDDEN, INNER = 4, 2, 256, 192
PREFIX = "model.layers.0.mlp.experts"
W8A16 = {"qwen3_fp8_ascend": {"activation": Activation.W8A16.value}}

Tensors = dict[str, torch.Tensor]


def checkpoint(experts: int = EXPERTS, inner: int = INNER, seed: int = 0) -> Tensors:
    """One layer's experts as official releases have them, with the ragged blocks that 192 channels make."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (inner, HIDDEN), "up_proj": (inner, HIDDEN), "down_proj": (HIDDEN, inner)}
    out = {}
    for expert in range(experts):
        for name, (n, k) in shapes.items():
            codes, scale = quantize_weight(torch.randn(n, k, generator=generator) / k**0.5)
            out[f"{expert}.{name}.weight"], out[f"{expert}.{name}.weight_scale_inv"] = codes, scale
    return out


def fused(tensors: Tensors) -> Tensors:
    """All experts in two tensors, each with its scales, as transformers 5 writes FP8 experts."""
    count = len({name.partition(".")[0] for name in tensors})

    def stack(*projections: str, ending: str) -> torch.Tensor:
        parts = [torch.stack([as_bytes(tensors[f"{e}.{p}.{ending}"]) for e in range(count)]) for p in projections]
        return torch.cat(parts, dim=1)

    out = {}
    for name, projections in {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.items():
        out[name] = stack(*projections, ending="weight").view(torch.float8_e4m3fn)
        out[f"{name}_scale_inv"] = stack(*projections, ending="weight_scale_inv")
    return out


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def make_runner(
    config: VllmConfig | None = None,
    ignored: tuple[str, ...] = (),
    expert_parallel: bool = False,
    experts: int = EXPERTS,
    inner: int = INNER,
    top_k: int = TOP_K,
    scale_fmt: str = "fp32",
    container: str = FP8,
    **arguments: Any,
) -> Any:
    """vLLM's layer, made as its models make it."""
    config = config or VllmConfig(additional_config=W8A16)
    config.parallel_config.enable_expert_parallel = expert_parallel
    with set_current_vllm_config(config):
        return FusedMoEFactory(
            num_experts=experts,
            top_k=top_k,
            hidden_size=HIDDEN,
            intermediate_size=inner,
            params_dtype=torch.float32,
            renormalize=True,
            quant_config=BlockFp8AscendConfig(BlockFp8Config(BlockSize(), ignored, scale_fmt, container)),
            prefix=PREFIX,
            **arguments,
        )


def make_layer(**arguments: Any) -> Any:
    return make_runner(**arguments).routed_experts


def load(layer: Any, tensors: Tensors) -> list[str]:
    return list(layer.load_weights(tensors.items()))


def finish(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def routed(m: int = 5, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, the weights of their experts, and the experts."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:TOP_K] for _ in range(m)]).int()
    return x, torch.rand(m, TOP_K, generator=generator), ids


def apply(layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return layer.quant_method.apply(layer, x, weights, ids, None, None)


def expected(
    tensors: Tensors, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, glu: Glu = SILU
) -> torch.Tensor:
    """W8A16 by the specification's linears, token by token and expert by expert, in fp64."""
    w = {
        name: reference.dequantize_weight(codes, tensors[f"{name}_scale_inv"], dtype=torch.float32).double()
        for name, codes in tensors.items()
        if name.endswith(".weight")
    }
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            gate, up = (w[f"{expert}.{name}.weight"] @ row for name in ("gate_proj", "up_proj"))
            out[token] += weight * (w[f"{expert}.down_proj.weight"] @ glu(gate, up))
    return out


def assert_near(out: torch.Tensor, want: torch.Tensor) -> None:
    """fp32 sums of a few hundred products; a projection of another expert is off by all of it."""
    assert float((out.double() - want).norm() / want.norm()) < 1e-5


def serving_layer(tensors: Tensors, **arguments: Any) -> Any:
    layer = make_layer(**arguments)
    record_metadata_for_reloading(layer)
    load(layer, tensors)
    return finish(layer)


def reload(layer: Any, tensors: Tensors) -> None:
    initialize_layerwise_reload(layer)
    load(layer, tensors)
    finalize_layerwise_reload(layer, None)


# What a checkpoint may get wrong.


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda t: t.pop(name)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    def damage(t: Tensors) -> None:
        t[name] = change(t[name].clone())

    return damage


def at(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        as_bytes(tensor)[1, 1] = value  # type: ignore[assignment]
        return tensor

    return change


DAMAGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (drop("2.up_proj.weight"), r"missing from the checkpoint\n.*experts\.2\.up_proj\.weight\n"),
    "no scales": (drop("3.down_proj.weight_scale_inv"), r"missing.*\n.*experts\.3\.down_proj\.weight_scale_inv\n"),
    "NaN": (put("1.up_proj.weight", at(0x7F)), r"NaN codes.*\n.*experts\.1\.up_proj\.weight"),
    "NaN in down": (put("3.down_proj.weight", at(0xFF)), r"NaN codes.*\n.*experts\.3\.down_proj\.weight"),
    "infinite": (
        put("2.gate_proj.weight_scale_inv", at(torch.inf)),
        r"scales.*\n.*experts\.2\.gate_proj\.weight_scale_inv",
    ),
    "negative": (put("0.down_proj.weight_scale_inv", at(-1.0)), r"scales.*\n.*experts\.0\.down_proj\.weight_scale_inv"),
    "bf16": (put("1.gate_proj.weight", lambda t: t.bfloat16()), r"wrong dtype\n.*experts\.1\.gate_proj\.weight\n"),
    "fp16 scales": (
        put("1.up_proj.weight_scale_inv", lambda t: t.half()),
        r"wrong dtype\n.*1\.up_proj\.weight_scale_inv",
    ),
    "swapped": (
        put("2.gate_proj.weight", lambda t: as_bytes(t).t().contiguous().view(t.dtype)),
        r"does not fit the experts\n.*experts\.2\.gate_proj\.weight\n.*\(192, 256\)\n.*\(256, 192\)",
    ),
    "cut": (
        put("0.down_proj.weight", lambda t: t[:, :64]),
        r"does not fit the experts\n.*experts\.0\.down_proj\.weight\n",
    ),
    "too few scales": (
        put("0.up_proj.weight_scale_inv", lambda t: t[:1]),
        r"does not fit the experts\n.*0\.up_proj\.weight_scale_inv\n.*\(2, 2\)\n.*\(1, 2\)",
    ),
}
