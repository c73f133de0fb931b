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
"""Block-wise FP8 linears at one byte per element, with the checkpoint's own scales and activation quantization.

``AscendFp8BlockLinearMethod`` re-quantizes to MXFP8 on Ascend 950, which rounds every weight once more, and expands to
the model dtype elsewhere, which doubles the memory. This scheme does neither:

* Ascend 950: ``npu_dynamic_block_quant`` and ``npu_quant_matmul`` with ``group_sizes=[1, 128, 128]``.
* Atlas A2 and A3, which know no FP8: the codes stay bytes; a linear decodes them into a temporary buffer, then runs the
  ordinary GEMM on activations rounded to e4m3 per token and 128 channels. Both operands are fp16, divided by powers of
  two that bring their largest magnitudes below 1 (one for the weight, one for each token): eight times as exact as bf16
  operands at the same cost, and no sum overflows for up to 74752 channels.

Selected by ``VLLM_ASCEND_BLOCK_FP8_EXACT=1``.
"""

import torch
import torch_npu
from vllm.logger import logger
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_ascend.utils import FP8_METHOD, is_950

from ..base import PreparedLinearInput, WeightSwitchConfig
from ..registry import register_scheme
from .fp8_block import BLOCK_FP8_WEIGHT_DTYPE, AscendFp8BlockLinearMethod, _is_absorbed_by_attention

E4M3_MAX = 448.0

# Lower bound of a group's maximum, as in vLLM's block quantization: an all-zero group has a finite scale.
AMAX_FLOOR = 1e-10

# The chip's block product knows this block only.
NATIVE_BLOCK = 128

# Elements decoded at a time: bounds the 32-bit temporaries to about 80 MB.
_DECODE_PIECE = 1 << 22

# fp32's exponent bias less e4m3's, in the exponent's place.
_BIAS_STEP = (127 - 7) << 23

# Magnitudes of e4m3 are below 2 ** 9.
_CODE_BITS = 9

# The largest number of channels whose products of at most 0.875 each sum up to less than fp16's 65504.
MAX_CHANNELS = 74752


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Values of e4m3 codes given as bytes, by integer arithmetic: A2 and A3 cannot cast FP8 on the device.

    Exact for every finite code. No fp32 subnormal occurs, since vector units may flush those.
    """
    wide = codes.to(torch.int32)
    magnitude = wide & 0x7F
    normal = ((magnitude << 20) + _BIAS_STEP).view(torch.float32)
    value = torch.where(magnitude < 8, magnitude.to(torch.float32) * 2.0**-9, normal)
    return torch.where(wide > 0x7F, -value, value)


def round_to_e4m3(x: torch.Tensor, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic block quantization of ``x``: values on the e4m3 grid ``[m, groups, block_k]``, scales ``[m, groups]``.

    Rounds to nearest even, with one fp32 scale per token and ``block_k`` channels; a ragged group is padded by zeros.
    """
    m, k = x.shape
    groups = torch.nn.functional.pad(x.float(), (0, -k % block_k)).view(m, -1, block_k)
    scale = (groups.abs().amax(-1, keepdim=True).clamp_min(AMAX_FLOOR)) / E4M3_MAX
    scaled = (groups / scale).clamp(-E4M3_MAX, E4M3_MAX)
    # Steps of the grid are powers of two, and torch.round is half to even.
    exponent = (scaled.abs().view(torch.int32) >> 23).clamp_min(127 - 6)
    step = ((exponent - 3) << 23).view(torch.float32)
    inverse = ((2 * 127 + 3 - exponent) << 23).view(torch.float32)
    rounded = torch.where(scaled.isnan(), scaled, torch.round(scaled * inverse) * step)
    return rounded, scale.squeeze(-1)


def normalizing_powers(largest_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The power of two that brings e4m3 codes times scales of up to ``largest_scale`` below 1, and its inverse.

    Exponents are moved as integers, because exp2 and log2 of a device need not be exact.
    Both powers are normal numbers.
    """
    lift = _CODE_BITS + 1
    exponent = ((largest_scale.view(torch.int32) >> 23) & 0xFF).clamp(1, 2 * 127 - 1 - lift)
    shrink = ((2 * 127 - lift - exponent) << 23).view(torch.float32)
    return shrink, ((exponent + lift) << 23).view(torch.float32)


def _block_fp8_scratch_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    powers: torch.Tensor,
    bias: torch.Tensor | None,
    block_n: int,
    block_k: int,
) -> torch.Tensor:
    n, k = codes.shape
    dtype = torch.float32 if x.dtype == torch.float32 else torch.float16
    # Allocated by each call: the allocator gives it to the next layer of this stream,
    # or keeps it in a graph's own pool.
    weight = torch.empty(n, k, dtype=dtype, device=x.device)
    rows = max(block_n, _DECODE_PIECE // max(k, 1) // block_n * block_n)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        scales = scale[start // block_n : -(-stop // block_n)] * powers[0]
        scales = scales.repeat_interleave(block_n, dim=0)[: stop - start]
        scales = scales.repeat_interleave(block_k, dim=1)[:, :k]
        weight[start:stop].copy_(decode_e4m3(codes[start:stop]) * scales)
    values, x_scale = round_to_e4m3(x, block_k)
    shrink, grow = normalizing_powers(x_scale.amax(1, keepdim=True))
    operand = (values * (x_scale * shrink).unsqueeze(-1)).flatten(1)[:, :k].to(dtype)
    out = torch.nn.functional.linear(operand, weight) * (grow * powers[1])
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _block_fp8_scratch_linear_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    powers: torch.Tensor,
    bias: torch.Tensor | None,
    block_n: int,
    block_k: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


# One opaque node to graphs: what is inside is not worth fusing, and its pieces depend on sizes.
direct_register_custom_op(
    op_name="block_fp8_scratch_linear",
    op_func=_block_fp8_scratch_linear,
    fake_impl=_block_fp8_scratch_linear_fake,
    mutates_args=[],
    dispatch_key="CompositeExplicitAutograd",
)


@register_scheme(FP8_METHOD, "linear_exact")
class AscendFp8BlockExactLinearMethod(AscendFp8BlockLinearMethod):
    """Linear method for native block-wise FP8 checkpoints that keeps weight and scales as they are published."""

    # The codes and their scales would have to travel together, split at whole tiles.
    supports_weight_switch = False

    def __init__(self, weight_block_size: tuple[int, int]):
        super().__init__(weight_block_size)
        # A layer that cannot be kept exact is served as the parent class does without MXFP8.
        self.mxfp8_method = None
        self.native = is_950()
        self.exact = True

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        reason = self._why_not_exact(layer)
        if reason is not None:
            self.exact = False
            if not _is_absorbed_by_attention(layer):
                name = getattr(layer, "prefix", "the linear layer")
                logger.warning_once("%s is served in %s: %s", name, self.model_dtype, reason)
            super().process_weights_after_loading(layer)
            return
        weight, scale = layer.weight.data, layer.weight_scale_inv.data
        expected = (-(-weight.shape[0] // self.block_n), -(-weight.shape[1] // self.block_k))
        if tuple(scale.shape) != expected:
            raise ValueError(
                f"A weight of shape {tuple(weight.shape)} needs scales {expected}, got {tuple(scale.shape)}."
            )
        del layer.weight_scale_inv
        # Views only: on A2 and A3 every copy or cast of an FP8 tensor on the device may fail.
        layer.weight = torch.nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(scale.float(), requires_grad=False)
        if not self.native:
            powers = torch.cat(normalizing_powers(layer.weight_scale.data.amax().view(1)))
            layer.weight_powers = torch.nn.Parameter(powers, requires_grad=False)

    def _why_not_exact(self, layer: torch.nn.Module) -> str | None:
        n, k = layer.weight.shape
        if _is_absorbed_by_attention(layer):
            return "its weight is folded into the attention's"
        if any(size % self.block_n for size in getattr(layer, "output_partition_sizes", [n])[:-1]):
            return "a merged shard ends inside a block"
        if not self.native and k > MAX_CHANNELS:
            return f"sums over {k} channels could overflow"
        if self.native and (self.block_n, self.block_k) != (NATIVE_BLOCK, NATIVE_BLOCK):
            return f"the chip multiplies blocks of {NATIVE_BLOCK}x{NATIVE_BLOCK} only"
        if self.native and (n % NATIVE_BLOCK or k % NATIVE_BLOCK):
            return f"the chip multiplies whole blocks only, not a weight of {n}x{k}"
        return None

    def prepare_input_for_overlap(self, layer: torch.nn.Module, x: torch.Tensor) -> PreparedLinearInput | None:
        return None

    def _get_weight_switch_specs(self, layer: torch.nn.Module, config: WeightSwitchConfig):
        raise NotImplementedError("Weights of exact block FP8 cannot be switched yet.")

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor | PreparedLinearInput,
        bias: torch.Tensor | None = None,
        tp_rank: int | None = 0,
    ) -> torch.Tensor:
        if not self.exact:
            return super().apply(layer, x, bias, tp_rank)
        rows = x.reshape(-1, x.shape[-1])
        if self.native:
            out = self._native(rows, layer.weight, layer.weight_scale, bias)
        else:
            out = torch.ops.vllm.block_fp8_scratch_linear(
                rows, layer.weight, layer.weight_scale, layer.weight_powers, bias, self.block_n, self.block_k
            )
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def _native(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x_codes, x_scale = torch_npu.npu_dynamic_block_quant(
            x.contiguous(),
            min_scale=AMAX_FLOOR / E4M3_MAX,
            dst_type=BLOCK_FP8_WEIGHT_DTYPE,
            row_block_size=1,
            col_block_size=NATIVE_BLOCK,
        )
        out = torch_npu.npu_quant_matmul(
            x_codes,
            codes.view(BLOCK_FP8_WEIGHT_DTYPE).t(),
            scale.t(),
            pertoken_scale=x_scale,
            # With these scales the operator takes no bias, so that is added to fp32 outputs before they are rounded.
            output_dtype=x.dtype if bias is None else torch.float32,
            group_sizes=[1, NATIVE_BLOCK, NATIVE_BLOCK],
        )
        return out if bias is None else (out + bias.float()).to(x.dtype)
