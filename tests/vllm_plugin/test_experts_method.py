"""vLLM's own mixture-of-experts layer with our method: loading by name, results, compilation, memory."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.format import Activation, BlockFp8Config
from qwen3_fp8_ascend.glu import GELU_TANH, Glu
from qwen3_fp8_ascend.testing.models import qwen3_config
from qwen3_fp8_ascend.vllm_plugin.experts import BlockFp8ExpertsMethod

from .expert_layers import (
    EXPERTS,
    HIDDEN,
    INNER,
    PREFIX,
    TOP_K,
    W8A16,
    apply,
    assert_near,
    checkpoint,
    expected,
    finish,
    fused,
    load,
    make_layer,
    make_runner,
    routed,
)


def test_one_by_one() -> None:
    tensors = checkpoint()
    layer = make_layer()
    assert isinstance(layer.quant_method, BlockFp8ExpertsMethod)
    names = load(layer, tensors)
    assert set(names) == {"w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv"}
    assert len(names) == len(tensors)
    out = apply(finish(layer), *routed())
    assert_near(out, expected(tensors, *routed()))
    wrong = {
        name.replace("3.up", "x.up").replace("2.up", "3.up").replace("x.up", "2.up"): t for name, t in tensors.items()
    }
    with pytest.raises(AssertionError):
        assert_near(out, expected(wrong, *routed()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_fewer_bits(dtype: torch.dtype) -> None:
    tensors = {name: t.to(dtype) if name.endswith("_inv") else t for name, t in checkpoint().items()}
    layer = make_layer()
    load(layer, tensors)
    exact = {name: t.float() if name.endswith("_inv") else t for name, t in tensors.items()}
    assert_near(apply(finish(layer), *routed()), expected(exact, *routed()))


def test_scales_that_are_powers_of_two() -> None:
    """What the checkpoint says of its scales decides what w8a8 is, and reaches the experts."""
    for config, activation in ((VllmConfig(), Activation.W8A8_UE8M0), (None, Activation.W8A16)):
        layer = make_layer(config=config, scale_fmt="ue8m0")
        assert layer.quant_method.activation is activation
        load(layer, checkpoint())
        x, weights, ids = routed()
        packed = finish(layer).packed_w13_weight, layer.packed_w2_weight
        assert torch.equal(apply(layer, x, weights, ids), ops.block_experts(x, *packed, weights, ids, activation))


def test_all_in_one_tensor() -> None:
    tensors = checkpoint(inner=256)
    layer = make_layer(inner=256)
    load(layer, fused(tensors))
    assert_near(apply(finish(layer), *routed()), expected(tensors, *routed()))


def test_positional_calls_of_models_that_load_by_hand() -> None:
    """DeepSeek and a dozen other models call the parameter's loader themselves and use what it returns."""
    tensors, layer = checkpoint(), make_layer()
    parameters = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}
    for name, tensor in tensors.items():
        expert, projection, kind = name.split(".")
        parameter, shard = parameters[projection]
        param = getattr(layer, f"{parameter}_{kind}")
        assert param.weight_loader.supports_moe_loading
        full = f"{PREFIX}.{parameter}_{kind}"
        assert param.weight_loader(param, tensor, full, shard_id=shard, expert_id=int(expert), return_success=True)
    assert param.weight_loader(param, tensor, full, shard, int(expert)) is None
    assert_near(apply(finish(layer), *routed()), expected(tensors, *routed()))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_compiled_with_a_dynamic_batch(activation: str) -> None:
    tensors = checkpoint()
    runner = make_runner(activation=activation)
    load(runner.routed_experts, tensors)
    layer = finish(runner.routed_experts)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: apply(layer, *given) * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (2, 5, 7):
        assert torch.equal(compiled(*routed(m)), apply(layer, *routed(m)) * 2)


def test_the_whole_layer_with_its_router() -> None:
    """vLLM's runner around it: softmax over all experts, the two largest, renormalised."""
    tensors = checkpoint()
    engine = VllmConfig(additional_config=W8A16)
    runner = make_runner(engine)
    load(runner.routed_experts, tensors)
    finish(runner.routed_experts)
    x, _, _ = routed(6)
    logits = torch.randn(6, EXPERTS, generator=torch.Generator().manual_seed(3))
    with set_forward_context(None, engine, num_tokens=6):
        out = runner(x, logits)
    weights, ids = logits.softmax(-1).topk(TOP_K)
    assert_near(out, expected(tensors, x, weights / weights.sum(-1, keepdim=True), ids))
    asked = runner.routed_experts.quant_method.moe_quant_config
    assert asked is not None  # else vLLM asks at each step, and compiled code is made anew


@pytest.mark.parametrize(
    ("arguments", "glu"),
    [
        ({"swiglu_limit": 0.25}, Glu.clamped(0.25)),
        ({"swiglu_limit": 10, "swiglu_alpha": 1, "swiglu_beta": 0}, Glu.clamped(10.0)),
        ({"activation": "swiglustep"}, Glu.step(7.0)),
        ({"activation": "gelu_tanh"}, GELU_TANH),
        (
            {"activation": "swigluoai_uninterleave", "swiglu_limit": 0.5, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
            Glu.clamped(0.5, 1.702, 1.0),
        ),
    ],
)
def test_other_activations(arguments: dict[str, Any], glu: Glu) -> None:
    """DeepSeek-V4, Step-3.5, Gemma 4, MiniMax-M3; gates and ups are made large enough to meet their limits."""
    tensors, operands = checkpoint(), routed(5)
    for name in tensors:
        if name.endswith(("gate_proj.weight_scale_inv", "up_proj.weight_scale_inv")):
            tensors[name] = tensors[name] * 8
    layer = make_layer(**arguments)
    load(layer, tensors)
    out = apply(finish(layer), *operands)
    assert layer.quant_method.glu == glu
    assert_near(out, expected(tensors, *operands, glu))
    with pytest.raises(AssertionError):
        assert_near(out, expected(tensors, *operands))


def test_weights_on_the_input_of_one_expert_a_token() -> None:
    """Llama 4: silu makes it another thing than weights on the output."""
    tensors = checkpoint()
    x, weights, ids = routed(5)
    weights, ids = weights[:, :1], ids[:, :1]
    layer = make_layer(top_k=1, apply_router_weight_on_input=True)
    load(layer, tensors)
    out = apply(finish(layer), x, weights, ids)
    assert_near(out, expected(tensors, x * weights, torch.ones_like(weights), ids))
    with pytest.raises(AssertionError):
        assert_near(out, expected(tensors, x, weights, ids))


def test_one_resident_copy_at_one_byte_a_weight() -> None:
    layer = make_layer()
    load(layer, checkpoint())
    names = ("w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv")
    originals = [weakref.ref(getattr(layer, name).data.untyped_storage()) for name in names]
    finish(layer)
    gc.collect()
    assert [ref() for ref in originals] == [None] * 4
    tensors = (*layer.packed_w13_weight.tensors, *layer.packed_w2_weight.tensors, *layer.parameters())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    weights = 3 * EXPERTS * INNER * HIDDEN
    assert weights <= sum(storages.values()) <= 1.01 * weights + 64 * 4 * EXPERTS * 12


# Whole models, as vLLM builds and loads them.


@pytest.fixture
def built(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Build a model of a config.json with vLLM's own layers, without weights: `built(architectures=..., ...)`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    def build(**changes: Any) -> Any:
        config = qwen3_config(quantization_config=BlockFp8Config().to_dict(), **changes)
        (tmp_path / "config.json").write_text(json.dumps(config))
        common = {"skip_tokenizer_init": True, "load_format": "dummy", "max_model_len": 128, "enforce_eager": True}
        engine = EngineArgs(model=str(tmp_path), quantization="ascend", **common).create_engine_config()
        with set_current_vllm_config(engine):
            return initialize_model(engine)

    yield build


def test_dummy_weights(built: Callable[..., Any]) -> None:
    """`--load-format dummy` fills floats only and does not know that the bytes are codes."""
    model = built(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=192,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    layer = model.model.layers[0].mlp.experts.routed_experts
    assert layer.quant_method.dummy
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            parameter.data.uniform_(-1e-3, 1e-3)
    finish(layer)
    out = apply(layer, *(t.bfloat16() if t.is_floating_point() else t for t in routed()))
    assert out.isfinite().all() and out.abs().max() > 0
