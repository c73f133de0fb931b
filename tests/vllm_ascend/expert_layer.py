"""A small mixture of experts as vLLM-Ascend 0.30.0rc2 builds it, on a CPU, with real weights.

A token meets two operators of the NPU, and here they are what CANN's documentation says of them (`init_routing`,
`unpermute`).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch_npu
from vllm.config import set_current_vllm_config
from vllm.forward_context import override_forward_context
from vllm_ascend.ascend_forward_context import MoECommType
from vllm_ascend.ops.fused_moe.moe_comm_method import AllGatherCommImpl

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.experts import ExpertsProblem, random_experts
from qwen3_fp8_ascend.vllm_plugin.ascend_schemes import NpuExpertsMethod

from .conftest import BLOCK_FP8, MOE, engine_config, initialize, write_config

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 6, 3, 256, 128
SMALL = MOE | {
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
}


def init_routing(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None,
    active_num: int,
    expert_num: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    active_expert_range: list[int],
    quant_mode: int,
) -> tuple[torch.Tensor, ...]:
    """aclnnMoeInitRoutingV2, dropless, without quantization: rows of x sorted by expert, stably.

    Only the experts of a range have rows; what stands behind theirs is not written (here NaN), and the place of a row
    that is not there is -1. Type 1: each expert's count.
    """
    assert (scale, quant_mode, expert_tokens_num_type, expert_tokens_num_flag) == (None, -1, 1, True)
    first, last = active_expert_range
    assert 0 <= first < last <= expert_num and active_num == expert_idx.numel()
    flat = expert_idx.flatten().long()
    active = (flat >= first) & (flat < last)
    order = torch.where(active, flat, expert_num).sort(stable=True).indices[: int(active.sum())]
    expanded = torch.full((active_num, x.shape[1]), torch.nan, dtype=x.dtype)
    expanded[: len(order)] = x[order // expert_idx.shape[1]]
    place = torch.full((active_num,), -1, dtype=torch.int32)
    place[order] = torch.arange(len(order), dtype=torch.int32)
    return expanded, place, torch.bincount(flat[active] - first, minlength=last - first), torch.empty(0)


def unpermute(permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """aclnnMoeTokenUnpermute: the weighted sum of each token's rows, weights and rows of one dtype."""
    assert probs.dtype == permuted_tokens.dtype
    rows = permuted_tokens[sorted_indices.long()].view(*probs.shape, -1)
    out = torch.zeros_like(rows[:, 0])
    for slot in range(probs.shape[1]):
        out = out + rows[:, slot] * probs[:, slot : slot + 1]
    return out


@dataclasses.dataclass
class Layer:
    """A layer of routed experts of vLLM-Ascend's, the weights that were loaded into it, and how to call it."""

    model: Any
    routed: Any
    problem: ExpertsProblem
    activation: Activation
    context: SimpleNamespace

    def __call__(self, problem: ExpertsProblem) -> torch.Tensor:
        result = self.routed.quant_method.apply(
            self.routed, problem.x, problem.topk_weights, problem.topk_ids, None, None
        )
        out: torch.Tensor = result.routed_out
        return out

    def expected(self, problem: ExpertsProblem) -> torch.Tensor:
        operands = self.routed.packed_w13_weight, self.routed.packed_w2_weight
        routing = problem.topk_weights, problem.topk_ids
        return ops.block_experts(problem.x, *operands, *routing, self.activation, problem.glu)


def tensors_of(problem: ExpertsProblem) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors."""
    for expert in range(EXPERTS):
        gate, up = problem.w13[expert].view(torch.uint8).split(INTERMEDIATE)
        rows = problem.w13_scale[expert].split(1)
        parts = {"gate_proj": (gate, rows[0]), "up_proj": (up, rows[1])}
        parts["down_proj"] = problem.w2[expert].view(torch.uint8), problem.w2_scale[expert]
        for name, (codes, scale) in parts.items():
            prefix = f"model.layers.0.mlp.experts.{expert}.{name}"
            yield f"{prefix}.weight", codes.view(torch.float8_e4m3fn)
            yield f"{prefix}.weight_scale_inv", scale


@pytest.fixture(params=["W8A8", "W8A16"], name="layer")
def loaded_layer(
    request: pytest.FixtureRequest, tmp_path: Path, rank: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Layer]:
    """Built, loaded and packed as a worker does it, by the reference's arithmetic."""
    activation = Activation[request.param]
    folder = write_config(tmp_path / "moe", **SMALL, quantization_config=BLOCK_FP8)
    settings = {"qwen3_fp8_ascend": {"backend": "reference", "activation": activation}}
    config = engine_config(folder, hf_overrides=settings, load_format="safetensors")
    model = initialize(config, torch.device("cpu"))
    problem = random_experts(9, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE)
    loaded = model.load_weights(tensors_of(problem))
    assert {name.rpartition(".")[2] for name in loaded} >= {"w13_weight", "w2_weight"}
    [routed] = [m for m in model.modules() if isinstance(getattr(m, "quant_method", None), NpuExpertsMethod)]
    with set_current_vllm_config(config):
        routed.quant_method.process_weights_after_loading(routed)
    monkeypatch.setattr(torch_npu, "npu_moe_init_routing_v2", init_routing)
    monkeypatch.setattr(torch_npu, "npu_moe_token_unpermute", unpermute)
    monkeypatch.setattr(torch.npu, "current_stream", lambda: SimpleNamespace(record_event=lambda: None))
    context = SimpleNamespace(
        moe_comm_type=MoECommType.ALLGATHER, moe_comm_method=AllGatherCommImpl(routed.moe_config), additional_kwargs={}
    )
    context.additional_kwargs = vars(context)  # where the second model runner looks
    with override_forward_context(context), torch.no_grad():
        yield Layer(model, routed, problem, activation, context)
