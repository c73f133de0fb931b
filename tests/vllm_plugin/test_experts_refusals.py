"""Experts that are damaged, that are not served, or that a checkpoint leaves alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from qwen3_fp8_ascend.containers import COMPRESSED_TENSORS, MODELOPT
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.vllm_plugin import expert_layer
from qwen3_fp8_ascend.vllm_plugin.experts import BlockFp8ExpertsMethod

from .expert_layers import DAMAGES, EXPERTS, PREFIX, checkpoint, finish, fused, load, make_layer


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_tensors_are_named(name: str) -> None:
    damage, said = DAMAGES[name]
    tensors, layer = checkpoint(), make_layer()
    damage(tensors)
    with pytest.raises(BlockFp8Error, match=said):
        load(layer, tensors)
        finish(layer)


@pytest.mark.parametrize("inner", [96, 192])
def test_a_block_in_both_gate_and_up_is_refused(inner: int) -> None:
    """Made as transformers does: one grid over gate and up. For 96 channels the shapes are those of two grids."""
    tensors = fused(checkpoint(inner=inner))
    rows = -(-2 * inner // 128)
    tensors["gate_up_proj_scale_inv"] = torch.ones(EXPERTS, rows, 2)
    with pytest.raises(BlockFp8Error, match=r"(?s)(not whole blocks|does not fit the experts).*experts\.0\.gate_proj"):
        load(make_layer(inner=inner), tensors)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"has_bias": True}, "experts with biases are not served"),
    "gelu": ({"activation": "gelu"}, "with the activation gelu are not served"),
    "interleaved": ({"activation": "swigluoai", "swiglu_limit": 7.0}, "with the activation swigluoai are not served"),
    "no limit": ({"activation": "swigluoai_uninterleave"}, "the activation swigluoai_uninterleave are not served"),
    "another step": ({"activation": "swiglustep", "swiglu_limit": 5.0}, "the activation swiglustep are not served"),
    "scaled": ({"swiglu_alpha": 1.702}, "with the activation silu are not served"),
    "no number": (
        {"swiglu_limit": "\x1b[2J" * 1000},
        "gate_limit of an expert's activation is not a positive number of fp32",
    ),
    "clamped to nothing": (
        {"swiglu_limit": 0.0},
        "gate_limit of an expert's activation is not a positive number of fp32",
    ),
    "weights on the input": ({"apply_router_weight_on_input": True}, r"of several experts .* are not served"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_experts_are_refused_by_name(name: str) -> None:
    arguments, said = REFUSED[name]
    with pytest.raises(BlockFp8Error, match=rf"{said}\n  where: {PREFIX}") as caught:
        make_layer(**arguments)
    assert all(line.isprintable() and len(line) < 1000 for line in str(caught.value).splitlines())


def test_adapters_and_moving_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    monkeypatch.setattr(layer.moe_config, "is_lora_enabled", True)
    with pytest.raises(BlockFp8Error, match=rf"(?s)LoRA adapters.*{PREFIX}.*--enable-lora"):
        expert_layer.check_supported(layer, PREFIX)
    monkeypatch.setattr(layer.moe_config, "is_lora_enabled", False)
    monkeypatch.setattr(layer.moe_config.moe_parallel_config, "enable_eplb", True)
    with pytest.raises(BlockFp8Error, match=rf"(?s)cannot move between ranks.*{PREFIX}.*--enable-eplb"):
        expert_layer.check_supported(layer, PREFIX)


@pytest.mark.parametrize("backend", ["deepep_low_latency", "deepep_high_throughput", "flashinfer_nvlink_two_sided"])
def test_exchanges_of_vllm_s_own_kernels_are_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """vLLM takes them on a GPU alone, and only where ranks of data parallelism divide the experts."""
    layer = make_layer()

    def look(is_gpu: bool, ranks: int, backend: str) -> None:
        monkeypatch.setattr(
            expert_layer, "current_platform", SimpleNamespace(is_cuda_alike=lambda: is_gpu, is_cpu=lambda: False)
        )
        parallel = replace(layer.moe_config.moe_parallel_config, dp_size=ranks, use_ep=True, all2all_backend=backend)
        monkeypatch.setattr(layer.moe_config, "moe_parallel_config", parallel)
        expert_layer.check_supported(layer, PREFIX)

    with pytest.raises(BlockFp8Error, match=rf"(?s)cannot exchange tokens.*{PREFIX}.*allgather_reduces.*{backend}"):
        look(True, 2, backend)
    for served in ((True, 1, backend), (False, 2, backend), (True, 2, "allgather_reducescatter")):
        look(*served)


def test_ranks_of_data_parallelism_are_refused_where_vllm_cannot_gather_their_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer()
    parallel = replace(layer.moe_config.moe_parallel_config, dp_size=2)
    monkeypatch.setattr(layer.moe_config, "moe_parallel_config", parallel)
    with pytest.raises(
        BlockFp8Error, match=rf"(?s)data parallelism on a CPU.*{PREFIX}.*got: 2.*--tensor-parallel-size"
    ):
        expert_layer.check_supported(layer, PREFIX)
    monkeypatch.setattr(expert_layer.CpuCommunicator, "all_gatherv", lambda *_: None)  # a vLLM that can
    expert_layer.check_supported(layer, PREFIX)


@pytest.mark.parametrize(
    ("ignored", "quantized"),
    [
        ((), True),
        ((PREFIX,), False),
        (("model.layers.0.mlp",), False),
        (tuple(f"{PREFIX}.{e}.{p}_proj" for e in range(EXPERTS) for p in ("gate", "up", "down")), False),
        (("model.layers.0.mlp.gate", "lm_head"), True),
    ],
)
def test_ignored_experts(ignored: tuple[str, ...], quantized: bool) -> None:
    method = make_layer(ignored=ignored).quant_method
    assert isinstance(method, BlockFp8ExpertsMethod if quantized else UnquantizedFusedMoEMethod)


def test_experts_ignored_in_part_are_refused() -> None:
    with pytest.raises(BlockFp8Error, match=r"only some experts of a layer[^\n]*\n.*experts\n(?s:.*)3\.up_proj"):
        make_layer(ignored=(f"{PREFIX}.3.up_proj",))


@pytest.mark.parametrize("container", [COMPRESSED_TENSORS, MODELOPT])
def test_errors_name_scales_as_the_file_does(container: str) -> None:
    tensors = {name.removesuffix("_inv"): tensor for name, tensor in checkpoint().items()}
    tensors["2.gate_proj.weight_scale"][0, 1] = torch.inf
    layer = make_layer(container=container)
    load(layer, tensors)
    with pytest.raises(BlockFp8Error, match=r"scales.*\n.*experts\.2\.gate_proj\.weight_scale\n"):
        finish(layer)
