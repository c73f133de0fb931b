"""Linears and experts as schemes of vLLM-Ascend (0.30.0rc2 and later), in its own terms.

A scheme there is what a layer computes. Around it vLLM-Ascend hands on the rank, dispatches tokens to experts, combines
what comes back, overlaps shared experts on streams of their own, and divides experts among ranks. Here is what a
block-FP8 weight is and how it is multiplied; parameters are declared and checked as on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm_ascend.ascend_config import get_ascend_config
from vllm_ascend.ascend_forward_context import _EXTRA_CTX, MoECommType
from vllm_ascend.ops.fused_moe.dataclass.fused_experts import build_fused_experts_input
from vllm_ascend.quantization.method_adapters import AscendFusedMoEMethod, AscendLinearMethod
from vllm_ascend.quantization.methods.base import AscendLinearScheme, AscendMoEScheme
from vllm_ascend.quantization.quant_type import QuantType

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends.grouped import glu_product
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockSize, scale_shape
from qwen3_fp8_ascend.vllm_plugin.experts import BlockFp8ExpertsMethod
from qwen3_fp8_ascend.vllm_plugin.linear import BlockFp8LinearMethod
from qwen3_fp8_ascend.vllm_plugin.loading import UNWRITTEN_CODE, check_serving

COUNTS = 1
"""`group_list_type` of a list with each expert's number of rows; the other is cumulative."""


class BlockFp8LinearScheme(AscendLinearScheme):
    """A linear whose weight stays in blocks of FP8; codes are bytes, since A2 and A3 can neither cast nor copy FP8."""

    def __init__(self, block: BlockSize, method: BlockFp8LinearMethod) -> None:
        self.block = block
        self.method = method

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Any]:
        return {"weight": torch.full((output_size, input_size), UNWRITTEN_CODE, dtype=torch.uint8)}

    def get_pergroup_param(
        self, input_size: int, output_size: int, params_dtype: torch.dtype, layer_type: str | None = None
    ) -> dict[str, Any]:
        shape = scale_shape(output_size, input_size, self.block)
        return {
            self.method.scale_name: torch.full(shape, torch.nan, dtype=torch.float32),
            "_block_quant_scale": tuple(self.block),
        }

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        BlockFp8LinearMethod.process_weights_after_loading(self.method, layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None, tp_rank: int | None = 0
    ) -> torch.Tensor:
        """Shapes: x (..., k), bias (n,) -> (..., n). `tp_rank` changes nothing: one rank alone has a bias."""
        return BlockFp8LinearMethod.apply(self.method, layer, x, bias)


@register_weight_loader_v2_supported_method
class NpuLinearMethod(BlockFp8LinearMethod, AscendLinearMethod):
    """vLLM-Ascend's method around the scheme, with this package's parameters: shards have block grids of their own."""

    def __init__(self, block: BlockSize, **options: Any) -> None:
        super().__init__(block, **options)
        self.quant_method = BlockFp8LinearScheme(block, self)

    def process_weights_after_loading(self, layer: Any) -> None:
        AscendLinearMethod.process_weights_after_loading(self, layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = AscendLinearMethod.apply(self, layer, x, bias)
        return out


class BlockFp8ExpertsScheme(AscendMoEScheme):
    """Routed experts whose weights stay in blocks of FP8.

    quant_type: tokens are dispatched as they are. An activation is quantized where it is multiplied, in groups of 128
    channels, which no dispatch of vLLM-Ascend's does; the codes are those that it would get before.
    """

    quant_type = QuantType.NONE
    fused_activations = frozenset({"silu", "gelu_tanh", "swiglustep", "swigluoai_uninterleave"})
    supports_eplb = False

    def __init__(self, block: BlockSize, activation: Activation, method: BlockFp8ExpertsMethod) -> None:
        self.block = block
        self.activation = activation
        self.method = method

    def get_weight(
        self, num_experts: int, intermediate_size_per_partition: int, hidden_sizes: int, params_dtype: torch.dtype
    ) -> dict[str, Any]:
        shapes = {
            "w13_weight": (num_experts, 2 * intermediate_size_per_partition, hidden_sizes),
            "w2_weight": (num_experts, hidden_sizes, intermediate_size_per_partition),
        }
        return {name: torch.full(shape, UNWRITTEN_CODE, dtype=torch.uint8) for name, shape in shapes.items()}

    def get_dynamic_quant_param(
        self, num_experts: int, intermediate_size_per_partition: int, hidden_sizes: int, params_dtype: torch.dtype
    ) -> dict[str, Any]:
        rows, columns = scale_shape(intermediate_size_per_partition, hidden_sizes, self.block)
        shapes = {
            self.method._scale_of("w13"): (num_experts, 2 * rows, columns),  # gate and up each begin a block
            self.method._scale_of("w2"): (
                num_experts,
                *scale_shape(hidden_sizes, intermediate_size_per_partition, self.block),
            ),
        }
        return {name: torch.full(shape, torch.nan, dtype=torch.float32) for name, shape in shapes.items()}

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        BlockFp8ExpertsMethod.process_weights_after_loading(self.method, layer)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any | None,
        shared_experts_input: torch.Tensor | None,
    ) -> Any:
        """vLLM-Ascend's dispatch, `apply_gmm1_act_quant`, `apply_gmm2`, and its combine.

        Shapes: x (m, H), topk_weights and topk_ids (m, top_k) -> vLLM-Ascend's `FusedExpertsResult` with (m, H).
        """
        check_serving(layer, "packed_w2_weight", self.method.prefix)
        self.method.renewal.check_whole(self.method.prefix)
        result = _EXTRA_CTX.moe_comm_method.fused_experts(
            fused_experts_input=build_fused_experts_input(
                hidden_states=x,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                layer=layer,
                quant_type=self.quant_type,
                dynamic_eplb=False,
                expert_map=layer.ascend_expert_map,
                global_redundant_expert_num=layer.global_redundant_expert_num,
                mc2_mask=layer.ascend_mc2_mask,
                apply_router_weight_on_input=layer.apply_router_weight_on_input,
                pertoken_scale=layer.ascend_pertoken_scale,
                activation=layer.activation,
            ),
            quant_method=self,
        )
        result.routed_out = result.routed_out.to(x.dtype)
        return result

    def apply_gmm1(self, mlp_compute_input: Any) -> torch.Tensor:
        """Gate and up projections of rows sorted by expert, (rows, 2 I)."""
        layer = mlp_compute_input.layer
        ends = cumulative(mlp_compute_input)
        return ops.grouped_linear(mlp_compute_input.hidden_states, layer.packed_w13_weight, ends, self.activation)

    def apply_gmm1_act_quant(self, mlp_compute_input: Any) -> tuple[torch.Tensor, None]:
        """`apply_gmm1` and glu(gate, up) in fp32, rounded once; quantized where it is multiplied.

        Shapes: -> (rows, I), or what this rank's part of the down projection takes if it starts or ends within a block.
        """
        a = glu_product(self.apply_gmm1(mlp_compute_input), self.method.glu)
        return self.method.pad_activation(a), None

    def apply_act_quant(
        self, mlp_compute_input: Any, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return hidden_states, None

    def apply_gmm2(
        self, mlp_compute_input: Any, hidden_states: torch.Tensor, act_out_scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Down projection of rows sorted by expert, (rows, H).

        In fp32 where the weighted sum is formed on this rank, as the specification has it; where the rows go back to
        other ranks first, in the activations' dtype, as the operators that send them want it.
        """
        ends = cumulative(mlp_compute_input)
        stays = _EXTRA_CTX.moe_comm_type == MoECommType.ALLGATHER
        packed = mlp_compute_input.layer.packed_w2_weight
        y = ops.grouped_linear(hidden_states, packed, ends, self.activation, unrounded=stays)
        if stays and mlp_compute_input.layer.ascend_expert_map is not None:
            # Tokens of other ranks' experts are combined from any row, with the weight 0: no row may hold a NaN.
            nobody_s = torch.arange(y.shape[0], device=y.device) >= ends[-1]
            y = y.masked_fill_(nobody_s.unsqueeze(1), 0)
        return y

    def get_fused_mc2_weights(self, layer: torch.nn.Module) -> Any:
        raise fused_mc2_refusal(self.method.prefix)


class NpuExpertsMethod(BlockFp8ExpertsMethod, AscendFusedMoEMethod):
    """vLLM-Ascend's method around the scheme, with this package's parameters and checks of what is loaded.

    Raises:
        BlockFp8Error: also for what vLLM-Ascend can do with experts and this cannot: fused MC2, EPLB, shared experts
            placed among the routed ones.
    """

    tid2eid: Any = None

    def __init__(self, layer: Any, block: BlockSize, **options: Any) -> None:
        check_ascend_config(options["prefix"])
        if layer.apply_router_weight_on_input:
            raise BlockFp8Error(
                "block-FP8 experts with router weights on their input are not served on an NPU",
                where=options["prefix"],
                expected="weights on the output",
                got="apply_router_weight_on_input, which only one of vLLM-Ascend's dispatches knows",
                fix="serve the bf16 model",
            )
        super().__init__(layer, block, **options)
        self.quant_method = BlockFp8ExpertsScheme(block, self.activation, self)

    def process_weights_after_loading(self, layer: Any) -> None:
        AscendFusedMoEMethod.process_weights_after_loading(self, layer)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> Any:
        return AscendFusedMoEMethod.apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)


def cumulative(mlp_compute_input: Any) -> torch.Tensor:
    """Where each expert's rows end, (E,) int64, from either list of vLLM-Ascend's; nothing waits for the device."""
    groups = mlp_compute_input.group_list.to(torch.int64)
    return groups.cumsum(0) if mlp_compute_input.group_list_type == COUNTS else groups


def check_ascend_config(prefix: str) -> None:
    """Refuse what vLLM-Ascend is asked to do with experts and cannot do with these.

    Raises:
        BlockFp8Error: names the setting.
    """
    config = get_ascend_config()
    if config.enable_fused_mc2:
        raise fused_mc2_refusal(prefix)
    eplb = config.eplb_config
    if eplb.dynamic_eplb or eplb.expert_map_path is not None or eplb.num_redundant_experts:
        raise BlockFp8Error(
            "block-FP8 experts cannot move between ranks",
            where=prefix,
            expected="experts in the checkpoint's order, each on one rank",
            got=f"additional_config.eplb_config: dynamic_eplb={eplb.dynamic_eplb}, "
            f"expert_map_path={eplb.expert_map_path}, num_redundant_experts={eplb.num_redundant_experts}",
            fix="leave eplb_config out: its exchange copies parameters, and these are in a backend's own layout",
        )
    if config.mix_placement:
        raise BlockFp8Error(
            "shared experts cannot be placed among block-FP8 routed experts",
            where=prefix,
            got="additional_config.mix_placement: true",
            fix="leave mix_placement out",
        )


def fused_mc2_refusal(prefix: str) -> BlockFp8Error:
    return BlockFp8Error(
        "block-FP8 experts are not computed by the fused MC2 operator",
        where=prefix,
        expected="additional_config.enable_fused_mc2: 0",
        got="1: one operator dispatches, multiplies and combines, and takes int8, int4, MXFP8 or BF16 weights alone",
        fix="leave enable_fused_mc2 out; MC2 dispatch and combine are used where vLLM-Ascend chooses them",
    )
