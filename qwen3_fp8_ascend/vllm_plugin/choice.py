"""When a checkpoint is served without ``--quantization ascend``: where vLLM itself has no kernel for block FP8."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from qwen3_fp8_ascend.containers import holds_fp8
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import BlockFp8Config
from qwen3_fp8_ascend.vllm_plugin import logger


def serves_unasked(quantization: Any) -> bool:
    """Whether a checkpoint for which no method was named is block FP8 that vLLM would refuse on this machine.

    On CPUs only: vLLM asks every registered method before it looks for a kernel, and its one kernel for block FP8 there
    says whether the processor has what it needs. Elsewhere, and where that cannot be asked, the flag is needed.
    Semantics: said in the log, as often as vLLM makes a config of such a model.
    """
    if not current_platform.is_cpu() or not holds_fp8(quantization):
        return False
    try:
        BlockFp8Config.from_dict(quantization)
    except BlockFp8Error:
        return False  # FP8 of another kind: vLLM's own matter
    reason = _refusal_of_vllm()
    if reason is None:
        return False
    logger.info(
        "block FP8 is served by qwen3-fp8-ascend, as with --quantization ascend: vLLM's own kernel for it says: %s",
        reason,
    )
    return True


def _refusal_of_vllm() -> str | None:
    """Why vLLM's kernel for block FP8 does not run on this processor; None if it does, or cannot be asked."""
    try:
        from vllm.model_executor.kernels.linear import CPUFp8BlockScaledMMKernel
    except ImportError:
        return None
    supported, reason = CPUFp8BlockScaledMMKernel.is_supported()
    return None if supported else reason or "not supported"
