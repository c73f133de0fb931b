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
"""Block-wise FP8 on Atlas A2 and A3 at one byte per weight (``additional_config.keep_block_fp8``).

These chips know no FP8, so ``AscendFp8BlockLinearMethod`` and ``AscendFp8BlockFusedMoEMethod`` expand the weights to
the model dtype, which doubles their memory and the bytes that a decode step reads. Here the codes stay bytes. Up to
``MAX_FUSED_ROWS`` tokens a kernel decodes them on the vector cores and multiplies them on the cube cores, block by
block, with the scales applied to float32 sums. With more tokens the weight is decoded once into a temporary buffer in
the model dtype and the ordinary product runs, as it does without the option. Activations are not quantized.
"""

import torch
import torch_npu
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_ascend.ops.fused_moe.dataclass.moe_mlp import MoEMlpComputeInput
from vllm_ascend.ops.fused_moe.moe_utils import cumsum_group_list
from vllm_ascend.utils import FP8_METHOD, enable_custom_op

from ..base import PreparedLinearInput
from ..registry import register_scheme
from .fp8_block_native import AscendFp8BlockNativeFusedMoEMethod, AscendFp8BlockNativeLinearMethod

# Block that the kernels work on, and the columns of a strip in the cube's operand format.
KERNEL_BLOCK = 128
FRACTAL = 16

# Most rows of ``block_fp8_linear``, and of an expert on average for ``block_fp8_grouped_linear``, before decoding the
# weight first takes less time (estimated, not measured: kMaxRows in csrc/kernels/block_fp8/tiling.h).
MAX_FUSED_ROWS = 64

# Most rows of one launch of ``block_fp8_grouped_linear`` (kMaxGroupedRows).
MAX_GROUPED_ROWS = 4096

# Most elements of a temporary buffer: 1 GB in 16 bits. Larger weights keep to the fused kernel.
MAX_DECODED_ELEMENTS = 1 << 29

# Columns that the cube's load instruction can address.
MAX_COLUMNS = 65408

# Packed codes decode to their value times 2 ** -8, which saves an instruction. Packed scales make up for it.
DECODE_BIAS = 256.0

# A scale is repeated to the 32 bytes of a vector block, a span (first row, rows, zeros) padded to as many.
SCALE_REPEATS = 8
SPAN_WORDS = 8

# Number of the activation format "as it is" in csrc/kernels/block_fp8/tiling.h.
UNQUANTIZED_ACTIVATION = 1


def has_block_fp8_kernels() -> bool:
    """Whether this build of vLLM Ascend has the kernels: A2 and A3 do, unless custom operators are off."""
    return bool(enable_custom_op()) and hasattr(torch.ops._C_ascend, "block_fp8_linear")


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Lay out a weight for the kernels: ``[n, k]`` bytes to ``[tiles, k_blocks, 128 * 128]``.

    Within a block of 128x128 the order is the cube's: strips of 16 columns, each 128 rows of 16. Its two halves share
    16-bit lanes, the first in the low bytes. Rows and columns are filled up with zeros.
    """
    n, k = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -k % KERNEL_BLOCK, 0, -n % KERNEL_BLOCK))
    tiles, k_blocks = codes.shape[0] // KERNEL_BLOCK, codes.shape[1] // KERNEL_BLOCK
    strips = codes.view(tiles, KERNEL_BLOCK, k_blocks, KERNEL_BLOCK // FRACTAL, FRACTAL).permute(0, 2, 3, 1, 4)
    halves = strips.reshape(tiles, k_blocks, 2, KERNEL_BLOCK * KERNEL_BLOCK // 2)
    return halves.transpose(2, 3).reshape(tiles, k_blocks, KERNEL_BLOCK * KERNEL_BLOCK).contiguous()


def pack_scales(scale: torch.Tensor) -> torch.Tensor:
    """``[..., tiles, k_blocks]`` to ``[..., tiles, k_blocks, SCALE_REPEATS]``."""
    return (scale.float() * DECODE_BIAS).unsqueeze(-1).expand(*scale.shape, SCALE_REPEATS).contiguous()


def make_spans(n: int, device: torch.device) -> torch.Tensor:
    """First row and number of rows of each tile, ``[tiles, SPAN_WORDS]`` int32."""
    starts = torch.arange(0, n, KERNEL_BLOCK, dtype=torch.int32)
    spans = torch.zeros(starts.numel(), SPAN_WORDS, dtype=torch.int32)
    spans[:, 0] = starts
    spans[:, 1] = (n - starts).clamp(max=KERNEL_BLOCK)
    return spans.to(device)


def _block_fp8_fused_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    spans: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
) -> torch.Tensor:
    m, k = x.shape
    x = x.contiguous()
    operators = torch.ops._C_ascend
    if m > MAX_FUSED_ROWS and n * k <= MAX_DECODED_ELEMENTS:
        weight = torch.empty(n, k, dtype=x.dtype, device=x.device)
        operators.block_fp8_dequantize_out(codes, scale, spans, weight)
        return torch.nn.functional.linear(x, weight, bias)
    parts = [
        operators.block_fp8_linear(part, codes, scale, spans, bias, n, UNQUANTIZED_ACTIVATION)
        for part in x.split(MAX_FUSED_ROWS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _block_fp8_fused_linear_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    spans: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], n)


# One node to graphs, because what runs inside depends on the number of rows.
direct_register_custom_op(
    op_name="block_fp8_fused_linear",
    op_func=_block_fp8_fused_linear,
    fake_impl=_block_fp8_fused_linear_fake,
    mutates_args=[],
    dispatch_key="CompositeExplicitAutograd",
)


@register_scheme(FP8_METHOD, "linear_fused")
class AscendFp8BlockFusedLinearMethod(AscendFp8BlockNativeLinearMethod):
    """Linear method that decodes a block-wise FP8 weight while it multiplies.

    Which layers can keep their blocks is decided as on Ascend 950; others are expanded to the model dtype.
    """

    def _keep_blocks(self, layer: torch.nn.Module, weight: torch.Tensor, scale: torch.Tensor) -> None:
        del layer.weight_scale_inv
        # As bytes, since casts and copies of FP8 tensors are not supported on these devices.
        layer.weight = torch.nn.Parameter(pack_codes(weight.view(torch.uint8)), requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(pack_scales(scale), requires_grad=False)
        layer.weight_spans = torch.nn.Parameter(make_spans(self.output_size, weight.device), requires_grad=False)

    def _why_not_kept(self, layer: torch.nn.Module) -> str | None:
        if layer.weight.shape[1] > MAX_COLUMNS:
            return f"it has more than {MAX_COLUMNS} columns"
        return super()._why_not_kept(layer)

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor | PreparedLinearInput,
        bias: torch.Tensor | None = None,
        tp_rank: int | None = 0,
    ) -> torch.Tensor:
        if not self.keeps_blocks:
            return super().apply(layer, x, bias, tp_rank)
        rows = x.reshape(-1, x.shape[-1])
        output = torch.ops.vllm.block_fp8_fused_linear(
            rows, layer.weight, layer.weight_scale, layer.weight_spans, bias, self.output_size
        )
        return output.view(*x.shape[:-1], self.output_size)


@register_scheme(FP8_METHOD, "moe_fused")
class AscendFp8BlockFusedKernelMoEMethod(AscendFp8BlockNativeFusedMoEMethod):
    """FusedMoE method that decodes block-wise FP8 experts while it multiplies them.

    What is declared, refused and handed to the communication method is the same as on Ascend 950.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        for name in ("w13_weight", "w2_weight"):
            codes = getattr(layer, name).data.view(torch.uint8)
            num_experts, n, k = codes.shape
            tiles, k_blocks = n // KERNEL_BLOCK, k // KERNEL_BLOCK
            for expert in codes:  # in place: the sizes are multiples of the block
                expert.view(-1).copy_(pack_codes(expert).view(-1))
            packed = codes.view(num_experts, tiles, k_blocks, KERNEL_BLOCK * KERNEL_BLOCK)
            scale = pack_scales(getattr(layer, f"{name}_scale_inv").data)
            spans = make_spans(n, codes.device).expand(num_experts, tiles, SPAN_WORDS).contiguous()
            delattr(layer, f"{name}_scale_inv")
            setattr(layer, name, torch.nn.Parameter(packed, requires_grad=False))
            setattr(layer, f"{name}_scale", torch.nn.Parameter(scale, requires_grad=False))
            setattr(layer, f"{name}_spans", torch.nn.Parameter(spans, requires_grad=False))

    def get_eplb_weight_views(self, layer: torch.nn.Module) -> list[torch.Tensor]:
        return [layer.w13_weight, layer.w2_weight, layer.w13_weight_scale, layer.w2_weight_scale]

    def apply_gmm1(self, mlp_compute_input: MoEMlpComputeInput) -> torch.Tensor:
        return self._grouped_linear(mlp_compute_input, mlp_compute_input.hidden_states, "w13_weight")

    def apply_act_quant(
        self, mlp_compute_input: MoEMlpComputeInput, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if mlp_compute_input.topk_scales is not None:
            hidden_states = hidden_states * mlp_compute_input.topk_scales
        return hidden_states, None

    def apply_gmm2(
        self, mlp_compute_input: MoEMlpComputeInput, hidden_states: torch.Tensor, act_out_scale: torch.Tensor | None
    ) -> torch.Tensor:
        return self._grouped_linear(mlp_compute_input, hidden_states, "w2_weight")

    def _grouped_linear(self, mlp_compute_input: MoEMlpComputeInput, x: torch.Tensor, name: str) -> torch.Tensor:
        layer = mlp_compute_input.layer
        codes, scale, spans = (getattr(layer, name + part) for part in ("", "_scale", "_spans"))
        num_experts, tiles, k_blocks = codes.shape[:3]
        n = tiles * KERNEL_BLOCK
        rows, x = x.shape[0], x.contiguous()
        ends = cumsum_group_list(
            mlp_compute_input.group_list.to(torch.int64), mlp_compute_input.group_list_type, dst_list_type=0
        )
        elements = codes.numel()
        if rows > MAX_FUSED_ROWS * num_experts and elements <= MAX_DECODED_ELEMENTS:
            weights = torch.empty(num_experts * n, k_blocks * KERNEL_BLOCK, dtype=x.dtype, device=x.device)
            below = spans.clone()  # the experts below each other
            below[:, :, 0] += (torch.arange(num_experts, dtype=torch.int32, device=x.device) * n).unsqueeze(1)
            torch.ops._C_ascend.block_fp8_dequantize_out(
                codes.flatten(0, 1), scale.flatten(0, 1), below.flatten(0, 1), weights
            )
            return torch_npu.npu_grouped_matmul(
                x=[x],
                weight=[weights.view(num_experts, n, -1).transpose(1, 2)],
                split_item=2,
                group_list_type=0,
                group_type=0,
                group_list=ends,
            )[0]
        outputs = []
        for first in range(0, rows, MAX_GROUPED_ROWS):
            part = x[first : first + MAX_GROUPED_ROWS]
            ends_of_part = ends.clamp(first, first + part.shape[0]) - first
            outputs.append(
                torch.ops._C_ascend.block_fp8_grouped_linear(
                    part, codes, scale, spans, ends_of_part, n, UNQUANTIZED_ACTIVATION
                )
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else x.new_empty(0, n)
