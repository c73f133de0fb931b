"""Beside vLLM-Ascend: its own `ascend` method, to which block-FP8 checkpoints are added.

vLLM-Ascend registers `ascend` when its platform prepares the engine's arguments, which is after vLLM has loaded the
general plugins: a registration made by a plugin would be overwritten. So vLLM-Ascend's config is imported first, in
the order in which its platform would do it, and ours is registered over it; a module is imported once, so nothing
overwrites ours any more. This happens in every process that loads plugins, and in any order of entry points.
"""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm_ascend.quantization import AscendModelSlimConfig

from qwen3_fp8_ascend.containers import holds_fp8
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import BlockFp8Config
from qwen3_fp8_ascend.vllm_plugin import versions
from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig
from qwen3_fp8_ascend.vllm_plugin.experts import BlockFp8ExpertsMethod
from qwen3_fp8_ascend.vllm_plugin.linear import BlockFp8LinearMethod

FIRST_WITH_SCHEMES = Version("0.30.0rc2")
"""The vLLM-Ascend whose methods for experts are given routed tokens. In 0.23.0 they route, by other arguments."""


class BlockFp8NpuConfig(BlockFp8AscendConfig):
    """A block-FP8 checkpoint on an NPU; what the checkpoint leaves alone gets vLLM-Ascend's own methods.

    enable_fa_quant, enable_c8_quant: quantized attention and KV cache, which vLLM-Ascend's connectors between prefill
    and decode servers ask every quantization config about.
    """

    enable_fa_quant = False
    enable_c8_quant = False

    def __init__(self, checkpoint: BlockFp8Config) -> None:
        super().__init__(checkpoint)
        self.quant_description: dict[str, Any] = {}
        """vLLM-Ascend looks into it for ModelSlim's per-tensor types; its own FP8 config leaves it empty too."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Those that NPUs multiply; the scratch of many rows takes two bytes an element for them."""
        return [torch.bfloat16, torch.float16]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str, tid2eid: Any = None) -> QuantizeMethodBase | None:
        """As the base class. For experts vLLM-Ascend passes a table `tid2eid`, which its methods carry along.

        Raises:
            BlockFp8Error: experts beside a vLLM-Ascend before `FIRST_WITH_SCHEMES`.
        """
        experts = isinstance(layer, RoutedExperts)
        if experts and not has_schemes():
            raise BlockFp8Error(
                "mixture-of-experts layers in block FP8 need a newer vLLM-Ascend",
                where=prefix,
                expected=f"vLLM-Ascend {FIRST_WITH_SCHEMES} or newer: its methods for experts get routed tokens",
                got=f"{versions.installed_vllm_ascend()}, where such a method routes tokens itself",
                fix="update vLLM-Ascend, or serve this model without `--quantization ascend`",
            )
        method = super().get_quant_method(layer, prefix)
        if experts and method is None:
            from vllm_ascend.ops.fused_moe.routed_experts import AscendUnquantizedFusedMoEMethod

            return AscendUnquantizedFusedMoEMethod(layer.moe_config, tid2eid)
        if experts:
            method.tid2eid = tid2eid  # type: ignore[union-attr]
        return method

    @staticmethod
    def linear_method() -> type[BlockFp8LinearMethod]:
        if not has_schemes():
            return BlockFp8LinearMethod
        from qwen3_fp8_ascend.vllm_plugin.ascend_schemes import NpuLinearMethod

        return NpuLinearMethod

    @staticmethod
    def experts_method() -> type[BlockFp8ExpertsMethod]:
        from qwen3_fp8_ascend.vllm_plugin.ascend_schemes import NpuExpertsMethod

        return NpuExpertsMethod

    @staticmethod
    def unquantized_linear_method() -> LinearMethodBase:
        from vllm_ascend.ops.linear import AscendUnquantizedLinearMethod

        return AscendUnquantizedLinearMethod()


def has_schemes() -> bool:
    """Whether this vLLM-Ascend takes `ascend_schemes`."""
    installed = versions.installed_vllm_ascend()
    return installed is not None and Version(installed) >= FIRST_WITH_SCHEMES


class AscendConfig(AscendModelSlimConfig):
    """vLLM-Ascend's `ascend`: block-FP8 checkpoints become a `BlockFp8NpuConfig`, all others are its parent's."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        ours = BlockFp8AscendConfig.override_quantization_method(hf_quant_cfg, user_quant, hf_config)
        return ours or super().override_quantization_method(hf_quant_cfg, user_quant, hf_config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Raises:
        BlockFp8Error: an FP8 checkpoint that is not in blocks of dynamic e4m3; the message says which key.
        """
        if holds_fp8(config):
            return BlockFp8NpuConfig.from_config(config)
        return super().from_config(config)
