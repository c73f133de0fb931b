"""Whether vLLM's router on a CPU chooses experts as the model asks.

vLLM 0.30 has one router for all models there. It scores by softmax, or in groups; scores by sigmoid without groups
(MiniMax-M2) end in an assertion of the first token, and a correction bias without groups (ERNIE 4.5) is left out, so
that other experts answer. Both are found by asking the router itself, since later versions may know more.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform

from qwen3_fp8_ascend.errors import BlockFp8Error

KNOWN = ("softmax", "sigmoid")
"""Scores whose largest is that of the largest logit, which is what the question here is made of."""


def check_routing(layer: Any, prefix: str) -> None:
    """Refuse experts that would not be those of the model.

    layer: vLLM's `RoutedExperts`.
    Raises:
        BlockFp8Error: on a CPU, the router does not know the scores, or leaves the correction bias out.
    """
    scores, bias = layer.scoring_func, layer.e_score_correction_bias
    plain = scores == "softmax" and bias is None  # what every router does
    if plain or layer.use_grouped_topk or layer.custom_routing_function is not None or scores not in KNOWN:
        return
    if current_platform.is_cpu() and not _chooses(scores, bias is not None):
        corrected = " with a correction bias" if bias is not None else ""
        raise BlockFp8Error(
            "vLLM's router on a CPU does not choose this model's experts",
            where=prefix,
            expected="scores by softmax, or experts in groups",
            got=f"{scores} scores{corrected}, without groups",
            fix="serve it on an NPU or a GPU; the bf16 model on a CPU has the same router",
        )


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
