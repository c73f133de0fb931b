"""Experts that vLLM's router on a CPU would not choose: the choice itself, and vLLM's layer with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from qwen3_fp8_ascend.vllm_plugin.routing import Routing, own_routing

from .expert_layers import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    W8A16,
    assert_near,
    checkpoint,
    expected,
    finish,
    load,
    make_layer,
    make_runner,
    routed,
)

BIAS = torch.tensor([0.0, 0.5, -0.5, 0.3])
ASKED: dict[str, dict[str, Any]] = {
    "sigmoid": {"scoring_func": "sigmoid"},
    "MiniMax-M2": {"scoring_func": "sigmoid", "e_score_correction_bias": BIAS},
    "ERNIE 4.5": {"e_score_correction_bias": BIAS},
    "scaled": {"scoring_func": "sigmoid", "e_score_correction_bias": BIAS, "routed_scaling_factor": 2.5},
}


def logits_of(m: int, experts: int = EXPERTS) -> torch.Tensor:
    return torch.randn(m, experts, generator=torch.Generator().manual_seed(m))


def chosen(logits: torch.Tensor, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model asks for, token by token, in fp64: weights (m, TOP_K), and experts, the best first."""
    bias = arguments.get("e_score_correction_bias", torch.zeros(logits.shape[1])).tolist()
    weights, ids = [], []
    for row in logits.double():
        scores = (row.sigmoid() if arguments.get("scoring_func") == "sigmoid" else row.softmax(0)).tolist()
        best = sorted(range(len(scores)), key=lambda e: scores[e] + bias[e], reverse=True)[:TOP_K]
        total = sum(scores[e] for e in best)
        weights.append([scores[e] / total * arguments.get("routed_scaling_factor", 1.0) for e in best])
        ids.append(best)
    return torch.tensor(weights), torch.tensor(ids)


def run(runner: Any, engine: VllmConfig, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    with set_forward_context(None, engine, num_tokens=len(x)):
        return runner(x, logits)


@pytest.mark.parametrize("name", ASKED)
def test_the_whole_layer(name: str) -> None:
    """Through vLLM's runner; without the correction bias other experts answer."""
    tensors, engine, arguments = checkpoint(), VllmConfig(additional_config=W8A16), ASKED[name]
    runner = make_runner(engine, **arguments)
    load(runner.routed_experts, tensors)
    finish(runner.routed_experts)
    x, logits = routed(40)[0], logits_of(40)
    out = run(runner, engine, x, logits)
    assert_near(out, expected(tensors, x, *chosen(logits, arguments)))
    if "e_score_correction_bias" in arguments:
        with pytest.raises(AssertionError):
            uncorrected = arguments | {"e_score_correction_bias": torch.zeros(EXPERTS)}
            assert_near(out, expected(tensors, x, *chosen(logits, uncorrected)))


def test_a_bias_that_is_loaded_after_the_layer_is_built() -> None:
    """As vLLM does: the model's parameter is empty when it builds its experts."""
    bias = torch.nn.Parameter(torch.full((EXPERTS,), torch.nan), requires_grad=False)
    layer = make_layer(scoring_func="sigmoid", e_score_correction_bias=bias)
    bias.data.copy_(BIAS)
    weights, ids = layer.quant_method.routing.choose(logits_of(20))
    want = chosen(logits_of(20), ASKED["MiniMax-M2"])
    assert torch.equal(ids.long(), want[1])
    torch.testing.assert_close(weights, want[0], check_dtype=False)


@pytest.mark.parametrize(
    ("family", "arguments"), [("MiniMax-M2", ASKED["MiniMax-M2"]), ("ERNIE 4.5", ASKED["ERNIE 4.5"])]
)
def test_as_transformers_chooses(family: str, arguments: dict[str, Any]) -> None:
    x, weight = torch.randn(200, HIDDEN), torch.randn(EXPERTS, HIDDEN) / HIDDEN**0.5
    if family == "MiniMax-M2":
        from transformers import MiniMaxM2Config
        from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter

        config = MiniMaxM2Config(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)
        router = MiniMaxM2TopKRouter(config)
        router.weight.data = weight
        logits, weights, ids = router(x, BIAS)
    else:
        from transformers import Ernie4_5_MoeConfig
        from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter

        config = Ernie4_5_MoeConfig(hidden_size=HIDDEN, moe_num_experts=EXPERTS, moe_k=TOP_K)
        router = Ernie4_5_MoeTopKRouter(config)
        router.weight.data = weight
        router.moe_statics.e_score_correction_bias.data = BIAS[None]
        logits, weights, ids = router(x)
    ours = make_layer(**arguments).quant_method.routing.choose(logits)

    def dense(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), EXPERTS).scatter(1, ids.long(), weights)

    torch.testing.assert_close(dense(*ours), dense(weights.detach(), ids))


def test_weights_as_they_are_and_scores_of_zero() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [-200.0, -200.0, -200.0]])
    weights, ids = Routing(2, "sigmoid", renormalize=False, scale=1.0, bias=None).choose(logits)
    assert ids[0].tolist() == [0, 2]
    torch.testing.assert_close(weights[0], logits[0, [0, 2]].sigmoid())
    weights, _ = Routing(2, "sigmoid", renormalize=True, scale=1.0, bias=None).choose(logits.bfloat16())
    assert weights.dtype == torch.float32
    assert weights[1].tolist() == [0, 0]  # and not NaN
    assert float(weights[0].sum()) == pytest.approx(1)


def test_compiled_with_a_dynamic_batch() -> None:
    layer = make_layer(**ASKED["scaled"])
    load(layer, checkpoint())
    method = finish(layer).quant_method
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, logits: method.apply_monolithic(layer, x, logits) * 2,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for m in (2, 5, 7):
        x, logits = routed(m)[0], logits_of(m)
        assert torch.equal(compiled(x, logits), method.apply_monolithic(layer, x, logits) * 2)


SERVED_BY_VLLM: dict[str, dict[str, Any]] = {
    "softmax": {},
    "groups": {"use_grouped_topk": True, "num_expert_group": 2, "topk_group": 1, **ASKED["MiniMax-M2"]},
    "a function": {"custom_routing_function": lambda **_: None, "scoring_func": "sigmoid"},
}


@pytest.mark.parametrize("name", SERVED_BY_VLLM)
def test_what_vllm_chooses_right_is_left_to_it(name: str) -> None:
    method = make_layer(**SERVED_BY_VLLM[name]).quant_method
    assert method.routing is None and not method.is_monolithic


@pytest.mark.parametrize("corrected", [False, True])
def test_a_router_that_chooses_right_is_left_to_choose(monkeypatch: pytest.MonkeyPatch, corrected: bool) -> None:
    """As a later vLLM may: sigmoid scores, and the bias in the choice."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    def select(hidden_states: Any, router_logits: Any, *, top_k: int, **options: Any) -> Any:
        bias = options["e_score_correction_bias"]
        scores = router_logits.sigmoid() + (0 if bias is None else bias)
        return scores.topk(top_k)

    layer = make_layer(**ASKED["MiniMax-M2" if corrected else "sigmoid"])
    assert own_routing(layer) is not None
    monkeypatch.setattr(cpu_router, "select_experts", select)
    assert own_routing(layer) is None


def test_simulated_routing_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random")
    assert own_routing(make_layer(**ASKED["MiniMax-M2"])) is None
