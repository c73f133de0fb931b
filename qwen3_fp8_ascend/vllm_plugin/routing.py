"""Which experts a token goes to, where vLLM's router on a CPU would not choose the model's.

vLLM 0.30 to 0.32 have one router for all models there. It scores by softmax, or in groups; scores by sigmoid without
groups (MiniMax-M2, Step-3.5) end in an assertion of the first token, and a correction bias without groups (ERNIE 4.5)
is left out, so that other experts answer. Both are found by asking the router itself, since later versions may know
more. Such a layer's experts are chosen here: vLLM hands the logits of a layer to a method that calls itself monolithic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm import envs
from vllm.platforms import current_platform

KNOWN = ("softmax", "sigmoid")
"""Scores whose largest is that of the largest logit, which is what the question to the router is made of."""


@dataclass(frozen=True, eq=False)
class Routing:
    """A choice of experts without groups, in fp32; what vLLM's `FusedTopKBiasRouter` does on a GPU.

    top_k: experts a token. scores: "softmax" or "sigmoid", of all logits. renormalize: whether a token's weights add up
    to one before `scale` multiplies them. bias: one number an expert, which counts in the choice and not in the weight;
    the model's own parameter, which is read at each call.
    """

    top_k: int
    scores: str
    renormalize: bool
    scale: float
    bias: torch.Tensor | None

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's experts, and their weights.

        Shapes: logits (m, experts), any float -> weights fp32 (m, top_k), ids int32 (m, top_k), the best first.
        """
        logits = logits.float()
        scores = logits.sigmoid() if self.scores == "sigmoid" else logits.softmax(-1)
        corrected = scores if self.bias is None else scores + self.bias.float()
        ids = corrected.topk(self.top_k, -1).indices
        weights = scores.gather(-1, ids)
        if self.renormalize:  # all scores may be zero: sigmoids of logits below -104
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return weights * self.scale, ids.int()


def own_routing(layer: Any) -> Routing | None:
    """How to choose a layer's experts where vLLM's router would choose others or none; None where it is right.

    layer: vLLM's `RoutedExperts`.
    """
    scores, bias = layer.scoring_func, layer.e_score_correction_bias
    plain = scores == "softmax" and bias is None  # what every router does
    if plain or layer.use_grouped_topk or layer.custom_routing_function is not None or scores not in KNOWN:
        return None
    simulated = envs.VLLM_MOE_ROUTING_SIMULATION_STRATEGY != ""  # then vLLM has a router that looks at no scores
    if not current_platform.is_cpu() or simulated or _chooses(scores, bias is not None):
        return None
    return Routing(layer.top_k, scores, layer.renormalize, layer.routed_scaling_factor, bias)


def _chooses(scores: str, corrected: bool) -> bool:
    """Whether one token goes to the first of two experts, or to the second if that is what the bias corrects."""
    try:
        from vllm.model_executor.layers.fused_moe.router.cpu_router import select_experts
    except ImportError:  # another version, whose routers are those of other devices
        return True
    logits = torch.tensor([[1.0, 0.0]], dtype=torch.float32, device="cpu")
    bias = torch.tensor([0.0, 2.0], dtype=torch.float32, device="cpu") if corrected else None
    try:
        _, ids = select_experts(
            logits,
            logits,
            top_k=1,
            use_grouped_topk=False,
            renormalize=True,
            scoring_func=scores,
            e_score_correction_bias=bias,
        )
    except AssertionError:
        return False
    return int(ids[0, 0]) == int(corrected)
