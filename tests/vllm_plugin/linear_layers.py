"""vLLM's own linear layers with our linear method, and the loading of a checkpoint's shards into them."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
)

from qwen3_fp8_ascend.containers import FP8
from qwen3_fp8_ascend.format import BlockFp8Config
from qwen3_fp8_ascend.testing.judges import Problem
from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig

QKV = ["q_proj", "k_proj", "v_proj"]
GATE_UP = ["gate_proj", "up_proj"]
ATTENTION = "model.layers.0.self_attn"


def config(ignored: tuple[str, ...] = (), container: str = FP8) -> BlockFp8AscendConfig:
    made = BlockFp8AscendConfig(BlockFp8Config(ignored=ignored, container=container))
    made.packed_modules_mapping = {"qkv_proj": QKV, "gate_up_proj": GATE_UP}
    return made


def qkv_layer(quantization: BlockFp8AscendConfig, **changes: Any) -> QKVParallelLinear:
    """SmolLM2-135M's attention: 576 = 4.5 blocks of queries, 192 = 1.5 blocks of keys and of values."""
    arguments = {"hidden_size": 576, "head_size": 64, "total_num_heads": 9, "total_num_kv_heads": 3, "bias": False}
    return QKVParallelLinear(
        **(arguments | changes),
        params_dtype=torch.bfloat16,
        quant_config=quantization,
        prefix="model.layers.0.self_attn.qkv_proj",
    )


def gate_up_layer(
    k: int, gate: int, up: int, quantization: BlockFp8AscendConfig | None = None
) -> MergedColumnParallelLinear:
    return MergedColumnParallelLinear(
        k,
        [gate, up],
        bias=False,
        params_dtype=torch.bfloat16,
        quant_config=quantization or config(),
        prefix="model.layers.0.mlp.gate_up_proj",
    )


def split(problem: Problem) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The checkpoint's tensors: weight and scale of each shard."""
    grid = problem.grid
    weights = problem.weight.view(torch.uint8).split(grid.widths)
    return [
        (w.view(torch.float8_e4m3fn), s) for w, s in zip(weights, problem.scale.split(grid.scale_rows), strict=True)
    ]


def load(layer: torch.nn.Module, shards: list[tuple[Any, torch.Tensor, torch.Tensor]]) -> None:
    for shard, weight, scale in shards:
        arguments = () if shard is None else (shard,)
        layer.weight.weight_loader(layer.weight, weight, *arguments)
        layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale, *arguments)


def finish(layer: torch.nn.Module) -> torch.nn.Module:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def loaded_qkv(problem: Problem, **changes: Any) -> torch.nn.Module:
    layer = qkv_layer(config(), **changes)
    load(layer, [(name, *tensors) for name, tensors in zip("qkv", split(problem), strict=True)])
    return layer
