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

import unittest
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch

from tests.ut.base import TestBase
from tests.ut.quantization.conftest_quantization import create_mock_vllm_config
from tests.ut.quantization.methods.w8a8.test_fp8_block_native import (
    make_experts_layer,
    make_linear_layer,
    make_weight,
    relative_error,
)
from vllm_ascend.quantization.methods import get_scheme_class
from vllm_ascend.quantization.methods.w8a8 import fp8_block_fused
from vllm_ascend.quantization.methods.w8a8.fp8_block_fused import (
    DECODE_BIAS,
    AscendFp8BlockFusedKernelMoEMethod,
    AscendFp8BlockFusedLinearMethod,
    has_block_fp8_kernels,
    make_spans,
    pack_codes,
    pack_scales,
)
from vllm_ascend.quantization.quant_type import QuantType

MODULE = "vllm_ascend.quantization.methods.w8a8.fp8_block_fused"
NATIVE = "vllm_ascend.quantization.methods.w8a8.fp8_block_native"
PARENT = "vllm_ascend.quantization.methods.w8a8.fp8_block"
BLOCK = 128


def unpack(codes, scale, spans, n, k):
    """The dense float64 weight that a packed one stands for, read as the kernels do."""
    tiles, k_blocks, _ = codes.shape
    dense = torch.zeros(n, k_blocks * BLOCK, dtype=torch.float64)
    for tile in range(tiles):
        start, rows = spans[tile, :2].tolist()
        for block in range(k_blocks):
            low_and_high = codes[tile, block].view(-1, 2)
            strips = low_and_high.t().reshape(BLOCK // 16, BLOCK, 16)  # the first half lies in the low bytes
            values = strips.permute(1, 0, 2).reshape(BLOCK, BLOCK).view(torch.float8_e4m3fn).double()
            columns = slice(block * BLOCK, (block + 1) * BLOCK)
            dense[start : start + rows, columns] = values[:rows] / DECODE_BIAS * scale[tile, block, 0].double()
    return dense[:, :k]


class BlockKernels:
    """The custom operators as csrc/block_fp8_ops.cpp checks and defines them."""

    def __init__(self):
        self.calls = []

    def block_fp8_linear(self, x, packed, scale, spans, bias, n, activation):
        assert x.is_contiguous() and 1 <= x.shape[0] <= 64 and activation == 1
        assert packed.dtype == torch.uint8 and packed.is_contiguous() and scale.is_contiguous()
        assert spans.dtype == torch.int32 and bias is None or bias.dtype in (x.dtype, torch.float32)
        self.calls.append(("linear", x.shape[0]))
        out = x.double() @ unpack(packed, scale, spans, n, x.shape[1]).T
        return (out if bias is None else out + bias.double()).to(x.dtype)

    def block_fp8_grouped_linear(self, x, packed, scale, spans, ends, n, activation):
        assert x.is_contiguous() and 1 <= x.shape[0] <= 4096 and activation == 1
        assert ends.dtype == torch.int64 and ends.shape == packed.shape[:1]
        self.calls.append(("grouped", x.shape[0]))
        out = torch.full((x.shape[0], n), torch.nan, dtype=x.dtype)
        start = 0
        for group, end in enumerate(ends.tolist()):
            assert start <= end <= x.shape[0]
            weight = unpack(packed[group], scale[group], spans[group], n, x.shape[1])
            out[start:end] = (x[start:end].double() @ weight.T).to(x.dtype)
            start = end
        return out

    def block_fp8_dequantize_out(self, packed, scale, spans, out):
        assert out.is_contiguous()
        self.calls.append(("dequantize", out.shape[0]))
        out.copy_(unpack(packed, scale, spans, *out.shape))


def grouped_matmul(*, x, weight, split_item, group_list_type, group_type, group_list):
    """npu_grouped_matmul of unquantized operands with a cumulative list."""
    assert (split_item, group_list_type, group_type) == (2, 0, 0)
    out, start = torch.full((x[0].shape[0], weight[0].shape[2]), torch.nan, dtype=x[0].dtype), 0
    for group, end in enumerate(group_list.tolist()):
        out[start:end] = (x[0][start:end].float() @ weight[0][group].float()).to(out.dtype)
        start = end
    return [out]


class KernelTest(TestBase):
    """With the operators in place of those of vllm_ascend_C."""

    def setUp(self):
        self.kernels = BlockKernels()
        self.ascend_config = MagicMock(enable_fused_mc2=0)
        for target, value in [
            (f"{PARENT}.get_current_vllm_config", MagicMock(return_value=create_mock_vllm_config())),
            (f"{PARENT}.is_950", MagicMock(return_value=False)),
            (f"{NATIVE}.get_ascend_config", MagicMock(return_value=self.ascend_config)),
            (f"{MODULE}.torch_npu", SimpleNamespace(npu_grouped_matmul=grouped_matmul)),
            ("torch.ops._C_ascend", self.kernels),
        ]:
            patcher = patch(target, value)
            patcher.start()
            self.addCleanup(patcher.stop)


class TestLayout(TestBase):
    def test_unpacking_gives_the_weight_back(self):
        for n, k in [(128, 128), (256, 384), (200, 300), (7, 5)]:
            weight, scale, dense = make_weight(n, k)
            packed = pack_codes(weight.view(torch.uint8)), pack_scales(scale), make_spans(n, weight.device)
            self.assertTrue(torch.equal(unpack(*packed, n, k), dense))

    def test_kernels_are_looked_for_among_the_custom_operators(self):
        for enabled, operators, expected in [
            (True, SimpleNamespace(block_fp8_linear=None), True),
            (True, SimpleNamespace(), False),
            (False, SimpleNamespace(block_fp8_linear=None), False),
        ]:
            with (
                patch(f"{MODULE}.enable_custom_op", return_value=enabled),
                patch("torch.ops._C_ascend", operators),
            ):
                self.assertEqual(has_block_fp8_kernels(), expected)


class TestFusedLinear(KernelTest):
    def setUp(self):
        super().setUp()
        self.scheme = AscendFp8BlockFusedLinearMethod((BLOCK, BLOCK))

    def load(self, n, k, **attributes):
        layer, self.dense = make_linear_layer(n, k, **attributes)
        return layer

    def test_is_registered(self):
        self.assertIs(get_scheme_class("fp8", "linear_fused"), AscendFp8BlockFusedLinearMethod)

    def test_few_rows_go_to_the_kernel_and_many_through_a_buffer(self):
        layer = self.load(200, 384)
        self.scheme.process_weights_after_loading(layer)
        bias = torch.randn(200, generator=torch.Generator().manual_seed(2)).bfloat16()
        for rows, calls, bound in [(6, [("linear", 6)], 2.0**-9), (65, [("dequantize", 200)], 2.0**-7)]:
            x = torch.randn(rows, 384, generator=torch.Generator().manual_seed(1)).bfloat16()
            for given in (None, bias):
                self.kernels.calls.clear()
                out = self.scheme.apply(layer, x.view(1, rows, 384), given)
                self.assertEqual((out.shape, self.kernels.calls), ((1, rows, 200), calls))
                expected = x.double() @ self.dense.T + (0 if given is None else given.double())
                self.assertLess(relative_error(out[0], expected), bound)

    def test_a_weight_too_large_for_the_buffer_is_multiplied_in_parts(self):
        layer = self.load(128, 128)
        self.scheme.process_weights_after_loading(layer)
        x = torch.randn(130, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
        with patch.object(fp8_block_fused, "MAX_DECODED_ELEMENTS", 1):
            out = self.scheme.apply(layer, x)
        self.assertEqual(self.kernels.calls, [("linear", 64), ("linear", 64), ("linear", 2)])
        self.assertLess(relative_error(out, x.double() @ self.dense.T), 2.0**-9)

    def test_weights_take_one_byte(self):
        layer = self.load(256, 384)
        self.scheme.process_weights_after_loading(layer)
        self.assertEqual((layer.weight.dtype, layer.weight.numel()), (torch.uint8, 256 * 384))
        self.assertFalse(hasattr(layer, "weight_scale_inv"))

    def test_scales_that_do_not_fit_are_rejected(self):
        layer = self.load(256, 384)
        layer.weight_scale_inv = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
        with self.assertRaisesRegex(ValueError, "needs scales of shape"):
            self.scheme.process_weights_after_loading(layer)

    def test_other_layers_are_expanded(self):
        for layer in [
            self.load(256, 128, prefix="model.layers.0.self_attn.kv_b_proj"),
            self.load(256, 128, output_partition_sizes=[100, 156]),
        ]:
            scheme = AscendFp8BlockFusedLinearMethod((BLOCK, BLOCK))
            with patch(f"{PARENT}.maybe_trans_nz", side_effect=lambda weight: weight):
                scheme.process_weights_after_loading(layer)
            self.assertTrue(torch.equal(layer.weight.data, self.dense.bfloat16()))
            with patch("torch.ops.vllm.unquantized_gemm", return_value="dense"):
                self.assertEqual(scheme.apply(layer, torch.zeros(1, 128)), "dense")


class TestFusedKernelMoE(KernelTest):
    EXPERTS, HIDDEN, INTERMEDIATE = 4, 256, 128

    def build(self):
        moe_config = SimpleNamespace(is_lora_enabled=False, has_bias=False, num_local_experts=self.EXPERTS)
        return AscendFp8BlockFusedKernelMoEMethod((BLOCK, BLOCK), moe_config)

    def load(self):
        layer, self.dense = make_experts_layer(self.EXPERTS, self.HIDDEN, self.INTERMEDIATE)
        return layer

    def run_stages(self, scheme, layer, counts, bound):
        rows = sum(counts)
        owner = torch.arange(self.EXPERTS).repeat_interleave(torch.tensor(counts))
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(rows, self.HIDDEN, generator=generator).bfloat16()
        activated = torch.randn(rows, self.INTERMEDIATE, generator=generator).bfloat16()
        for group_list_type in (0, 1):
            group_list = torch.tensor(counts)
            given = SimpleNamespace(
                layer=layer,
                hidden_states=x,
                group_list=group_list if group_list_type == 1 else group_list.cumsum(0),
                group_list_type=group_list_type,
                topk_scales=None,
            )
            expected = torch.einsum("rnk,rk->rn", self.dense["w13"][owner], x.double())
            self.assertLess(relative_error(scheme.apply_gmm1(given), expected), bound)
            expected = torch.einsum("rnk,rk->rn", self.dense["w2"][owner], activated.double())
            out = scheme.apply_gmm2(given, *scheme.apply_act_quant(given, activated))
            self.assertEqual(out.dtype, torch.bfloat16)
            self.assertLess(relative_error(out, expected), bound)

    def test_is_registered_and_dispatches_unquantized_tokens(self):
        self.assertIs(get_scheme_class("fp8", "moe_fused"), AscendFp8BlockFusedKernelMoEMethod)
        self.assertIs(self.build().quant_type, QuantType.NONE)

    def test_few_rows_go_to_the_kernel_and_many_through_a_buffer(self):
        scheme, layer = self.build(), self.load()
        addresses = layer.w13_weight.data_ptr(), layer.w2_weight.data_ptr()
        scheme.process_weights_after_loading(layer)
        self.assertEqual((layer.w13_weight.data_ptr(), layer.w2_weight.data_ptr()), addresses)
        self.run_stages(scheme, layer, [3, 0, 1, 2], 2.0**-9)
        self.assertEqual({name for name, _ in self.kernels.calls}, {"grouped"})
        self.kernels.calls.clear()
        self.run_stages(scheme, layer, [100, 0, 61, 100], 2.0**-7)
        self.assertEqual({name for name, _ in self.kernels.calls}, {"dequantize"})

    def test_more_rows_than_a_launch_takes(self):
        scheme, layer = self.build(), self.load()
        scheme.process_weights_after_loading(layer)
        with patch.object(fp8_block_fused, "MAX_GROUPED_ROWS", 4):
            self.run_stages(scheme, layer, [3, 0, 5, 2], 2.0**-9)
        self.assertEqual({rows for _, rows in self.kernels.calls}, {4, 2})

    def test_no_rows(self):
        scheme, layer = self.build(), self.load()
        scheme.process_weights_after_loading(layer)
        given = SimpleNamespace(
            layer=layer,
            hidden_states=torch.zeros(0, self.HIDDEN, dtype=torch.bfloat16),
            group_list=torch.zeros(self.EXPERTS, dtype=torch.int64),
            group_list_type=1,
        )
        self.assertEqual(scheme.apply_gmm1(given).shape, (0, 2 * self.INTERMEDIATE))


if __name__ == "__main__":
    unittest.main()
