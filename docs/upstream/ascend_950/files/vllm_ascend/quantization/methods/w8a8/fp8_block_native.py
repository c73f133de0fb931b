#
# This file is a part of the vllm-ascend project.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
#
"""Block-wise FP8 on Ascend 950 as the checkpoint stores it (``additional_config.keep_block_fp8``).

``AscendFp8BlockLinearMethod`` and ``AscendFp8BlockFusedMoEMethod`` re-quantize the weights to MXFP8 at load, which
rounds every weight once more. Ascend 950 also multiplies the checkpoint's own layout: e4m3 operands with one float32
scale per 1x128 of an activation and one per 128x128 of a weight, in ``npu_quant_matmul`` (``group_sizes``) and in
``npu_grouped_matmul`` (known by the shapes of the scales). These schemes use that. Weights and scales stay where the
loader put them, so loading converts nothing and needs no staging memory.
"""

from typing import Any

import torch
import torch_npu
from vllm.logger import logger

from vllm_ascend.ascend_config import get_ascend_config
from vllm_ascend.ascend_forward_context import _EXTRA_CTX
from vllm_ascend.ops.fused_moe.dataclass.fused_experts import build_fused_experts_input
from vllm_ascend.ops.fused_moe.dataclass.moe_mlp import MoEMlpComputeInput
from vllm_ascend.utils import FP8_METHOD

from ..base import PreparedLinearInput, WeightSwitchConfig
from ..registry import register_scheme
from .fp8_block import (
    BLOCK_FP8_WEIGHT_DTYPE,
    AscendFp8BlockFusedMoEMethod,
    AscendFp8BlockLinearMethod,
    _is_absorbed_by_attention,
)

# The only block for which the operators have a product.
NATIVE_BLOCK = 128

# Longest ``group_list`` of ``npu_grouped_matmul``.
MAX_GROUPS = 1024

# vLLM's block quantization bounds the maximum of a group from below by 1e-10, so that a group of zeros has a finite
# scale. The operator bounds the scale: the same number.
MIN_SCALE = 1e-10 / 448.0


def quantize_activation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes ``[m, k]`` of ``x`` and one float32 scale per token and 128 channels, ``[m, k / 128]``."""
    return torch_npu.npu_dynamic_block_quant(
        x.contiguous(),
        min_scale=MIN_SCALE,
        dst_type=BLOCK_FP8_WEIGHT_DTYPE,
        row_block_size=1,
        col_block_size=NATIVE_BLOCK,
    )


def _pad_to_blocks(tensor: torch.Tensor, pad_rows: bool) -> torch.Tensor:
    """Append zeros up to whole blocks of columns, and of rows if asked to."""
    rows, columns = tensor.shape
    padding = (0, -columns % NATIVE_BLOCK, 0, -rows % NATIVE_BLOCK if pad_rows else 0)
    return torch.nn.functional.pad(tensor, padding) if any(padding) else tensor


@register_scheme(FP8_METHOD, "linear_native")
class AscendFp8BlockNativeLinearMethod(AscendFp8BlockLinearMethod):
    """Linear method that multiplies a block-wise FP8 weight with its own scales.

    A layer whose blocks cannot be kept, see ``_why_not_kept``, is served as by the parent class.
    """

    def __init__(self, weight_block_size: tuple[int, int]):
        super().__init__(weight_block_size)
        self.keeps_blocks = True

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        reason = self._why_not_kept(layer)
        if reason is not None:
            self.keeps_blocks = False
            if not _is_absorbed_by_attention(layer):
                name = getattr(layer, "prefix", "the linear layer")
                logger.warning_once("%s does not keep its FP8 blocks: %s.", name, reason)
            super().process_weights_after_loading(layer)
            return
        weight, scale = layer.weight.data, layer.weight_scale_inv.data
        expected = (-(-weight.shape[0] // NATIVE_BLOCK), -(-weight.shape[1] // NATIVE_BLOCK))
        if tuple(scale.shape) != expected:
            raise ValueError(
                f"Block-wise FP8 weight of shape {tuple(weight.shape)} needs scales of shape {expected}, "
                f"but the checkpoint provided {tuple(scale.shape)}."
            )
        self.output_size = weight.shape[0]
        self._keep_blocks(layer, weight, scale)

    def _keep_blocks(self, layer: torch.nn.Module, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Make of what was loaded what ``apply`` takes."""
        layer.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
        if any(size % NATIVE_BLOCK for size in weight.shape):
            padded = _pad_to_blocks(weight.view(torch.uint8), pad_rows=True).view(BLOCK_FP8_WEIGHT_DTYPE)
            layer.weight = torch.nn.Parameter(padded, requires_grad=False)

    def _why_not_kept(self, layer: torch.nn.Module) -> str | None:
        if _is_absorbed_by_attention(layer):
            return "its weight is folded into the attention's"
        if any(size % NATIVE_BLOCK for size in getattr(layer, "output_partition_sizes", [0])[:-1]):
            return "a merged shard ends inside a block"
        return None

    def prepare_input_for_overlap(self, layer: torch.nn.Module, x: torch.Tensor) -> PreparedLinearInput | None:
        return None if self.keeps_blocks else super().prepare_input_for_overlap(layer, x)

    def _get_weight_switch_specs(self, layer: torch.nn.Module, config: WeightSwitchConfig):
        if self.keeps_blocks:
            # The scales would have to be switched along, split at whole blocks.
            raise NotImplementedError("Weight switch does not support additional_config.keep_block_fp8 yet.")
        return super()._get_weight_switch_specs(layer, config)

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor | PreparedLinearInput,
        bias: torch.Tensor | None = None,
        tp_rank: int | None = 0,
    ) -> torch.Tensor:
        if not self.keeps_blocks:
            return super().apply(layer, x, bias, tp_rank)
        codes, scale = quantize_activation(_pad_to_blocks(x.reshape(-1, x.shape[-1]), pad_rows=False))
        output = torch_npu.npu_quant_matmul(
            codes,
            layer.weight.t(),
            layer.weight_scale_inv.t(),
            pertoken_scale=scale,
            # The operator takes no bias with these scales, so a bias is added to float32 sums, before the rounding.
            output_dtype=x.dtype if bias is None else torch.float32,
            group_sizes=[1, NATIVE_BLOCK, NATIVE_BLOCK],
        )
        output = output[:, : self.output_size]
        if bias is not None:
            output = (output + bias).to(x.dtype)
        return output.reshape(*x.shape[:-1], self.output_size)


@register_scheme(FP8_METHOD, "moe_native")
class AscendFp8BlockNativeFusedMoEMethod(AscendFp8BlockFusedMoEMethod):
    """FusedMoE method that multiplies block-wise FP8 experts with their own scales.

    Tokens are dispatched in the model dtype (``QuantType.NONE``), because no dispatch operator quantizes in groups of
    128 channels. They are quantized right before each of the two grouped products.
    """

    def __init__(self, weight_block_size: tuple[int, int], moe_config):
        super().__init__(weight_block_size, moe_config)
        self.mxfp8_method = None
        unsupported = {
            "additional_config.enable_fused_mc2": get_ascend_config().enable_fused_mc2,
            "LoRA on experts": moe_config.is_lora_enabled,
            "experts with a bias": moe_config.has_bias,
            f"more than {MAX_GROUPS} experts on a rank": moe_config.num_local_experts > MAX_GROUPS,
        }
        for what, asked in unsupported.items():
            if asked:
                raise NotImplementedError(f"additional_config.keep_block_fp8 does not support {what}.")

    def get_dynamic_quant_param(
        self, num_experts: int, intermediate_size_per_partition: int, hidden_sizes: int, params_dtype: torch.dtype
    ) -> dict[str, Any]:
        if intermediate_size_per_partition % NATIVE_BLOCK or hidden_sizes % NATIVE_BLOCK:
            # A rank's share of the scales would begin inside a block, and gate and up would share a row of them.
            raise ValueError(
                f"additional_config.keep_block_fp8 needs expert sizes per rank in multiples of {NATIVE_BLOCK}, got an "
                f"intermediate size of {intermediate_size_per_partition} and a hidden size of {hidden_sizes}. Use a "
                "smaller tensor parallel size, or --enable-expert-parallel."
            )
        return super().get_dynamic_quant_param(num_experts, intermediate_size_per_partition, hidden_sizes, params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing: the operators take weights and scales as they are loaded."""

    def get_eplb_weight_views(self, layer: torch.nn.Module) -> list[torch.Tensor]:
        return [layer.w13_weight, layer.w2_weight, layer.w13_weight_scale_inv, layer.w2_weight_scale_inv]

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        return _EXTRA_CTX.moe_comm_method.fused_experts(
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

    def _grouped_matmul(
        self, mlp_compute_input: MoEMlpComputeInput, codes: torch.Tensor, scale: torch.Tensor, name: str
    ) -> torch.Tensor:
        weight = getattr(mlp_compute_input.layer, name)
        weight_scale = getattr(mlp_compute_input.layer, f"{name}_scale_inv")
        return torch_npu.npu_grouped_matmul(
            x=[codes],
            weight=[weight.transpose(1, 2)],
            scale=[weight_scale.transpose(1, 2)],
            per_token_scale=[scale],
            split_item=2,
            group_list_type=mlp_compute_input.group_list_type,
            group_type=0,
            group_list=mlp_compute_input.group_list,
            output_dtype=self.model_dtype,
        )[0]

    def apply_gmm1(self, mlp_compute_input: MoEMlpComputeInput) -> torch.Tensor:
        codes, scale = quantize_activation(mlp_compute_input.hidden_states)
        return self._grouped_matmul(mlp_compute_input, codes, scale, "w13_weight")

    def apply_act_quant(
        self, mlp_compute_input: MoEMlpComputeInput, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if mlp_compute_input.topk_scales is not None:
            hidden_states = hidden_states * mlp_compute_input.topk_scales
        return quantize_activation(hidden_states)

    def apply_gmm2(
        self, mlp_compute_input: MoEMlpComputeInput, hidden_states: torch.Tensor, act_out_scale: torch.Tensor
    ) -> torch.Tensor:
        return self._grouped_matmul(mlp_compute_input, hidden_states, act_out_scale, "w2_weight")
