"""What vLLM's layer of experts (`RoutedExperts`) says of itself, and what it asks that is refused."""

from __future__ import annotations

from typing import Any

from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.platforms import current_platform

from qwen3_fp8_ascend.checkpoints.experts import SERVE_BF16
from qwen3_fp8_ascend.errors import BlockFp8Error, printable
from qwen3_fp8_ascend.glu import GELU_TANH, SILU, Glu

STEP_LIMIT = 7.0
"""Of vLLM's `swiglustep`, which takes no other."""


def projection_names(layer: Any) -> dict[str, str]:
    """What the checkpoint calls vLLM's w1, w3 and w2 of an expert."""
    return {
        "w1": getattr(layer, "ckpt_gate_proj_name", "gate_proj"),
        "w3": getattr(layer, "ckpt_up_proj_name", "up_proj"),
        "w2": getattr(layer, "ckpt_down_proj_name", "down_proj"),
    }


def check_supported(layer: Any, prefix: str) -> None:
    """Refuse experts that compute something else than glu(gate, up), down, and a weighted sum.

    Raises:
        BlockFp8Error: names what.
    """
    moe = layer.moe_config
    refused = {
        "biases": moe.has_bias,
        "router weights on the input of several experts (apply_router_weight_on_input)": (
            layer.apply_router_weight_on_input and layer.top_k != 1
        ),
    }
    for what, asked in refused.items():
        if asked:
            raise BlockFp8Error(
                f"block-FP8 experts with {what} are not served",
                where=prefix,
                expected="no biases, and router weights on the output, or on the input of one expert a token",
                fix=SERVE_BF16,
            )
    if moe.is_lora_enabled:
        raise BlockFp8Error(
            "LoRA adapters are not served beside block-FP8 experts", where=prefix, fix="leave --enable-lora out"
        )
    if moe.moe_parallel_config.enable_eplb:
        raise BlockFp8Error("block-FP8 experts cannot move between ranks", where=prefix, fix="leave --enable-eplb out")
    check_exchange(moe.moe_parallel_config, prefix)


def glu_of(layer: Any, prefix: str) -> Glu:
    """What vLLM has a layer's experts compute of gate and up.

    Raises:
        BlockFp8Error: another activation than those, or numbers that it cannot have.
    Source: vLLM's `apply_moe_activation`, by which `silu` takes a limit alone, and `swiglustep` has one of its own.
    """
    activation = getattr(layer.activation, "value", layer.activation)
    limit, alpha, beta = (getattr(layer, f"swiglu_{name}", None) for name in ("limit", "alpha", "beta"))
    given = printable(f"{activation} with swiglu_limit {limit}, swiglu_alpha {alpha}, swiglu_beta {beta}", 200)
    alone = alpha in (None, 1.0) and beta in (None, 0.0)
    try:
        if activation == "silu" and alone:
            return SILU if limit is None else Glu.clamped(limit)
        if activation == "gelu_tanh" and alone and limit is None:
            return GELU_TANH
        if activation == "swigluoai_uninterleave" and limit is not None:
            return Glu.clamped(limit, 1.0 if alpha is None else alpha, 0.0 if beta is None else beta)
        if activation == "swiglustep" and alone and limit in (None, STEP_LIMIT):
            return Glu.step(STEP_LIMIT)
    except BlockFp8Error as error:
        what, *_ = str(error).splitlines()
        raise BlockFp8Error(what, where=prefix, got=given, fix=SERVE_BF16) from error
    raise BlockFp8Error(
        f"block-FP8 experts with the activation {activation} are not served",
        where=prefix,
        expected="silu, gelu_tanh, swiglustep, or swigluoai_uninterleave; the first and last with a swiglu_limit",
        got=given,
        fix=SERVE_BF16,
    )


def check_exchange(parallel: Any, prefix: str) -> None:
    """Refuse ways in which ranks would exchange tokens that vLLM has not, or has for its own kernels alone.

    On a GPU some exchange what one of those kernels has prepared: the server would stop while it warms up, with an
    error that says nothing. Any other method has its tokens gathered. On a CPU vLLM gathers none (seen in 0.30.0): it
    would start, call itself healthy, and die of the first request, with bf16 weights too.
    parallel: vLLM's `FusedMoEParallelConfig`.
    Raises:
        BlockFp8Error: names the way.
    """
    if current_platform.is_cpu() and parallel.dp_size > 1 and not _gathers_on_a_cpu():
        raise BlockFp8Error(
            "vLLM cannot exchange tokens of experts between ranks of data parallelism on a CPU",
            where=prefix,
            expected="--data-parallel-size 1",
            got=parallel.dp_size,
            fix="use --tensor-parallel-size, with --enable-expert-parallel to divide whole experts",
        )
    if not current_platform.is_cuda_alike() or not parallel.use_all2all_kernels or parallel.use_ag_rs_all2all_kernels:
        return
    raise BlockFp8Error(
        "block-FP8 experts cannot exchange tokens between ranks in this way",
        where=prefix,
        expected="--all2all-backend allgather_reducescatter, which is vLLM's default",
        got=parallel.all2all_backend,
        fix="leave --all2all-backend out",
    )


def _gathers_on_a_cpu() -> bool:
    """Whether this vLLM gathers different numbers of tokens from ranks on a CPU."""
    return CpuCommunicator.all_gatherv is not DeviceCommunicatorBase.all_gatherv


def local_experts(layer: Any) -> list[int]:
    """Numbers in the model of the experts on this rank, in the order of the parameters."""
    if layer.expert_map is None:
        return list(range(layer.local_num_experts))
    pairs = enumerate(layer.expert_map.tolist())
    return [expert for _, expert in sorted((local, expert) for expert, local in pairs if local >= 0)]
