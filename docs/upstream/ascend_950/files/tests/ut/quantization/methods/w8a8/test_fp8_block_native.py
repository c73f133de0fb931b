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
from vllm_ascend.quantization.methods import get_scheme_class
from vllm_ascend.quantization.methods.w8a8.fp8_block_native import (
    MIN_SCALE,
    AscendFp8BlockNativeFusedMoEMethod,
    AscendFp8BlockNativeLinearMethod,
)
from vllm_ascend.quantization.quant_type import QuantType

MODULE = "vllm_ascend.quantization.methods.w8a8.fp8_block_native"
PARENT = "vllm_ascend.quantization.methods.w8a8.fp8_block"
BLOCK = 128


class BlockOperators:
    """The operators as CANN documents them for Ascend 950, strict about their operands."""

    @staticmethod
    def npu_dynamic_block_quant(x, *, min_scale, dst_type, row_block_size, col_block_size):
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] % BLOCK == 0
        assert (dst_type, row_block_size, col_block_size) == (torch.float8_e4m3fn, 1, BLOCK)
        groups = x.float().unflatten(1, (-1, BLOCK))
        scale = (groups.abs().amax(-1) / 448).clamp_min(min_scale)
        return (groups / scale.unsqueeze(-1)).to(dst_type).flatten(1), scale

    @staticmethod
    def npu_quant_matmul(x1, x2, scale, *, pertoken_scale, output_dtype, group_sizes):
        (m, k), n = x1.shape, x2.shape[1]
        assert x1.dtype == x2.dtype == torch.float8_e4m3fn and x2.t().is_contiguous()
        assert x2.shape[0] == k and k % BLOCK == n % BLOCK == 0 and group_sizes == [1, BLOCK, BLOCK]
        assert scale.shape == (k // BLOCK, n // BLOCK) and pertoken_scale.shape == (m, k // BLOCK)
        out = torch.zeros(m, n)
        for block in range(k // BLOCK):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            partial = x1[:, part].float() @ x2[part].float()
            out += partial * pertoken_scale[:, block, None] * scale[block].repeat_interleave(BLOCK)
        return out.to(output_dtype)

    @classmethod
    def npu_grouped_matmul(
        cls, *, x, weight, scale, per_token_scale, split_item, group_list_type, group_type, group_list, output_dtype
    ):
        assert split_item in (2, 3) and group_type == 0 and group_list.dtype == torch.int64
        (codes,), (weights,), (scales,), (token_scale,) = x, weight, scale, per_token_scale
        counts = group_list if group_list_type == 1 else group_list.diff(prepend=torch.zeros(1, dtype=torch.int64))
        out = torch.full((codes.shape[0], weights.shape[2]), torch.nan, dtype=output_dtype)
        start = 0
        for group, count in enumerate(counts.tolist()):
            rows = slice(start, start + count)
            out[rows] = cls.npu_quant_matmul(
                codes[rows],
                weights[group],
                scales[group],
                pertoken_scale=token_scale[rows],
                output_dtype=output_dtype,
                group_sizes=[1, BLOCK, BLOCK],
            )
            start += count
        return [out]


def make_weight(*shape, seed=0):
    """A weight, its scales, and the dense matrix they stand for in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator).to(torch.float8_e4m3fn)
    *experts, n, k = shape
    scale = torch.rand(*experts, -(-n // BLOCK), -(-k // BLOCK), generator=generator) + 0.5
    expanded = scale.repeat_interleave(BLOCK, -2)[..., :n, :].repeat_interleave(BLOCK, -1)[..., :k]
    return weight, scale, weight.double() * expanded.double()


def make_linear_layer(n, k, prefix="model.layers.0.mlp.down_proj", **attributes):
    """A layer as it is loaded, and its dense weight."""
    weight, scale, dense = make_weight(n, k)
    layer = torch.nn.Module()
    layer.prefix = prefix
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer, dense


def make_experts_layer(experts, hidden, intermediate):
    """A layer of experts as it is loaded, and its dense weights by name."""
    layer, dense = torch.nn.Module(), {}
    for name, shape in {"w13": (2 * intermediate, hidden), "w2": (hidden, intermediate)}.items():
        weight, scale, dense[name] = make_weight(experts, *shape)
        layer.register_parameter(f"{name}_weight", torch.nn.Parameter(weight, requires_grad=False))
        layer.register_parameter(f"{name}_weight_scale_inv", torch.nn.Parameter(scale, requires_grad=False))
    return layer, dense


def quantized(x):
    """What block quantization leaves of an activation, in float64."""
    k = x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -k % BLOCK))
    codes, scale = BlockOperators.npu_dynamic_block_quant(
        padded, min_scale=MIN_SCALE, dst_type=torch.float8_e4m3fn, row_block_size=1, col_block_size=BLOCK
    )
    return codes.double()[:, :k] * scale.double().repeat_interleave(BLOCK, 1)[:, :k]


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


class TestNativeLinear(TestBase):
    def setUp(self):
        config = create_mock_vllm_config()
        for target, value in [
            (f"{PARENT}.get_current_vllm_config", MagicMock(return_value=config)),
            (f"{PARENT}.is_950", MagicMock(return_value=True)),
            (f"{PARENT}.AscendW8A8MXFP8DynamicLinearMethod", MagicMock()),
            (f"{MODULE}.torch_npu", BlockOperators),
        ]:
            patcher = patch(target, value)
            patcher.start()
            self.addCleanup(patcher.stop)
        self.scheme = AscendFp8BlockNativeLinearMethod((BLOCK, BLOCK))

    def load(self, n, k, **attributes):
        layer, self.dense = make_linear_layer(n, k, **attributes)
        return layer

    def test_is_registered(self):
        self.assertIs(get_scheme_class("fp8", "linear_native"), AscendFp8BlockNativeLinearMethod)

    def test_equals_the_product_of_the_checkpoint(self):
        for n, k in [(256, 384), (576, 256), (128, 300)]:
            layer = self.load(n, k)
            self.scheme.process_weights_after_loading(layer)
            x = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(1)).bfloat16()
            out = self.scheme.apply(layer, x)
            self.assertEqual((out.shape, out.dtype), ((2, 3, n), torch.bfloat16))
            expected = quantized(x.view(6, k)) @ self.dense.T
            self.assertLess(relative_error(out.view(6, n), expected), 2.0**-9)

    def test_the_bias_is_added_before_the_rounding(self):
        layer = self.load(256, 384)
        self.scheme.process_weights_after_loading(layer)
        x = torch.randn(1, 384, generator=torch.Generator().manual_seed(1)).bfloat16()
        rounded = self.scheme.apply(layer, x)
        # What is left is the rounding error, which would be zero if the bias came after it.
        left = self.scheme.apply(layer, x, -rounded[0])
        self.assertTrue((left.abs() <= 2.0**-8 * rounded.abs()).all())
        self.assertGreater((left != 0).float().mean(), 0.9)

    def test_weight_and_scales_are_those_that_were_loaded(self):
        layer = self.load(256, 384)
        addresses = layer.weight.data_ptr(), layer.weight_scale_inv.data_ptr()
        self.scheme.process_weights_after_loading(layer)
        self.assertEqual((layer.weight.data_ptr(), layer.weight_scale_inv.data_ptr()), addresses)
        self.assertEqual(layer.weight.dtype, torch.float8_e4m3fn)

    def test_scales_that_do_not_fit_are_rejected(self):
        layer = self.load(256, 384)
        layer.weight_scale_inv = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
        with self.assertRaisesRegex(ValueError, "needs scales of shape"):
            self.scheme.process_weights_after_loading(layer)

    def test_other_layers_are_served_by_the_parent(self):
        for layer in [
            self.load(256, 128, prefix="model.layers.0.self_attn.kv_b_proj"),
            self.load(256, 128, output_partition_sizes=[100, 156]),
        ]:
            scheme = AscendFp8BlockNativeLinearMethod((BLOCK, BLOCK))
            with patch(f"{PARENT}.AscendFp8BlockLinearMethod.process_weights_after_loading") as parent:
                scheme.process_weights_after_loading(layer)
            parent.assert_called_once_with(layer)
            self.assertFalse(scheme.keeps_blocks)
            scheme.mxfp8_method.apply.return_value = "parent"
            self.assertEqual(scheme.apply(layer, torch.zeros(1, 128)), "parent")


class TestNativeFusedMoE(TestBase):
    EXPERTS, HIDDEN, INTERMEDIATE = 4, 256, 128

    def setUp(self):
        self.ascend_config = MagicMock(enable_fused_mc2=0)
        for target, value in [
            (f"{PARENT}.get_current_vllm_config", MagicMock(return_value=create_mock_vllm_config())),
            (f"{PARENT}.is_950", MagicMock(return_value=False)),
            (f"{MODULE}.get_ascend_config", MagicMock(return_value=self.ascend_config)),
            (f"{MODULE}.torch_npu", BlockOperators),
        ]:
            patcher = patch(target, value)
            patcher.start()
            self.addCleanup(patcher.stop)

    def build(self, **changes):
        settings = {"is_lora_enabled": False, "has_bias": False, "num_local_experts": self.EXPERTS}
        return AscendFp8BlockNativeFusedMoEMethod((BLOCK, BLOCK), SimpleNamespace(**(settings | changes)))

    def load(self):
        layer, self.dense = make_experts_layer(self.EXPERTS, self.HIDDEN, self.INTERMEDIATE)
        return layer

    def compute_input(self, layer, hidden_states, counts, group_list_type=1, topk_scales=None):
        group_list = torch.tensor(counts)
        return SimpleNamespace(
            layer=layer,
            hidden_states=hidden_states,
            group_list=group_list if group_list_type == 1 else group_list.cumsum(0),
            group_list_type=group_list_type,
            topk_scales=topk_scales,
        )

    def test_is_registered_and_dispatches_unquantized_tokens(self):
        self.assertIs(get_scheme_class("fp8", "moe_native"), AscendFp8BlockNativeFusedMoEMethod)
        scheme = self.build()
        self.assertIs(scheme.quant_type, QuantType.NONE)
        self.assertFalse(scheme.supports_fused_activation("silu"))

    def test_both_products_equal_those_of_the_checkpoint(self):
        scheme, layer = self.build(), self.load()
        scheme.process_weights_after_loading(layer)
        counts = [3, 0, 1, 2]
        owner = [0, 0, 0, 2, 3, 3]
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(6, self.HIDDEN, generator=generator).bfloat16()
        for group_list_type in (0, 1):
            given = self.compute_input(layer, x, counts, group_list_type)
            gate_up = scheme.apply_gmm1(given)
            expected = torch.stack([self.dense["w13"][e] @ row for e, row in zip(owner, quantized(x))])
            self.assertEqual(gate_up.dtype, torch.bfloat16)
            self.assertLess(relative_error(gate_up, expected), 2.0**-9)
            activated = torch.randn(6, self.INTERMEDIATE, generator=generator).bfloat16()
            out = scheme.apply_gmm2(given, *scheme.apply_act_quant(given, activated))
            expected = torch.stack([self.dense["w2"][e] @ row for e, row in zip(owner, quantized(activated))])
            self.assertLess(relative_error(out, expected), 2.0**-9)

    def test_router_weights_before_the_down_projection(self):
        scheme, layer = self.build(), self.load()
        activated = torch.randn(2, self.INTERMEDIATE).bfloat16()
        scales = torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16)
        given = self.compute_input(layer, activated, [2, 0, 0, 0], topk_scales=scales)
        codes, scale = scheme.apply_act_quant(given, activated)
        self.assertTrue(torch.equal(codes.double() * scale.double(), quantized(activated * scales)))

    def test_weights_stay_as_they_are_loaded(self):
        scheme, layer = self.build(), self.load()
        before = [parameter.data_ptr() for parameter in layer.parameters()]
        scheme.process_weights_after_loading(layer)
        self.assertEqual([parameter.data_ptr() for parameter in layer.parameters()], before)
        views = scheme.get_eplb_weight_views(layer)
        self.assertEqual([view.shape[0] for view in views], [self.EXPERTS] * 4)

    def test_apply_hands_the_layer_to_the_communication_method(self):
        scheme, layer = self.build(), MagicMock()
        with patch(f"{MODULE}._EXTRA_CTX") as context:
            scheme.apply(layer, torch.zeros(1, 256), torch.ones(1, 1), torch.zeros(1, 1), None, None)
        _, options = context.moe_comm_method.fused_experts.call_args
        self.assertIs(options["quant_method"], scheme)
        self.assertIs(options["fused_experts_input"].layer, layer)
        self.assertFalse(options["fused_experts_input"].quant.is_quant)

    def test_sizes_inside_a_block_are_rejected(self):
        scheme = self.build()
        for intermediate, hidden in [(192, 256), (128, 200)]:
            with self.assertRaisesRegex(ValueError, "multiples of 128"):
                scheme.get_dynamic_quant_param(4, intermediate, hidden, torch.bfloat16)
        params = scheme.get_dynamic_quant_param(4, 128, 256, torch.bfloat16)
        self.assertEqual(params["w13_weight_scale_inv"].shape, (4, 2, 2))

    def test_what_is_not_supported_is_refused_by_name(self):
        for changes, message in [
            ({"is_lora_enabled": True}, "LoRA"),
            ({"has_bias": True}, "bias"),
            ({"num_local_experts": 1025}, "more than 1024"),
        ]:
            with self.assertRaisesRegex(NotImplementedError, message):
                self.build(**changes)
        self.ascend_config.enable_fused_mc2 = 1
        with self.assertRaisesRegex(NotImplementedError, "enable_fused_mc2"):
            self.build()


if __name__ == "__main__":
    unittest.main()
