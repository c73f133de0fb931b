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

import os
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch

from tests.ut.base import TestBase
from tests.ut.quantization.conftest_quantization import create_mock_vllm_config
from vllm_ascend.quantization.configs.fp8_config import AscendFp8Config
from vllm_ascend.quantization.configs.modelslim_config import AscendModelSlimConfig
from vllm_ascend.quantization.methods import get_scheme_class
from vllm_ascend.quantization.methods.w8a8 import fp8_block_exact
from vllm_ascend.quantization.methods.w8a8.fp8_block_exact import (
    AscendFp8BlockExactLinearMethod,
    decode_e4m3,
    normalizing_powers,
    round_to_e4m3,
)
from vllm_ascend.utils import FP8_METHOD

MODULE = "vllm_ascend.quantization.methods.w8a8.fp8_block_exact"
PARENT = "vllm_ascend.quantization.methods.w8a8.fp8_block"
HF_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def build_scheme(is_950: bool = False, block=(128, 128), dtype=torch.bfloat16) -> AscendFp8BlockExactLinearMethod:
    config = create_mock_vllm_config()
    config.model_config.dtype = dtype
    with (
        patch(f"{PARENT}.get_current_vllm_config", return_value=config),
        patch(f"{PARENT}.is_950", return_value=is_950),
        patch(f"{PARENT}.AscendW8A8MXFP8DynamicLinearMethod"),
        patch(f"{MODULE}.is_950", return_value=is_950),
    ):
        return AscendFp8BlockExactLinearMethod(block)


def build_layer(n: int, k: int, block=(128, 128), prefix: str = "model.layers.0.mlp.down_proj", **attributes):
    generator = torch.Generator().manual_seed(n * 1000 + k)
    layer = torch.nn.Module()
    layer.prefix = prefix
    weight = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=generator) + 0.5
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def dense(layer, block=(128, 128)) -> torch.Tensor:
    n, k = layer.weight.shape
    scale = layer.weight_scale_inv.repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]
    return layer.weight.double() * scale.double()


class TestArithmetic(TestBase):
    def test_every_finite_code_decodes_exactly(self):
        codes = torch.arange(256, dtype=torch.uint8)
        codes = codes[(codes & 0x7F) != 0x7F]
        expected = codes.view(torch.float8_e4m3fn).float()
        decoded = decode_e4m3(codes)
        self.assertTrue(torch.equal(decoded, expected))
        self.assertTrue(torch.equal(decoded.signbit(), expected.signbit()))

    def test_activations_are_rounded_as_torch_casts(self):
        generator = torch.Generator().manual_seed(0)
        for k in (128, 300, 5):
            x = torch.randn(9, k, generator=generator) * 10 ** torch.randn(9, 1, generator=generator)
            x[3] = 0
            groups = torch.nn.functional.pad(x, (0, -k % 128)).view(9, -1, 128)
            scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
            values, x_scale = round_to_e4m3(x, 128)
            self.assertTrue(torch.equal(values, (groups / scale).to(torch.float8_e4m3fn).float()))
            self.assertTrue(torch.equal(x_scale, scale.squeeze(-1)))

    def test_powers_normalize_every_scale(self):
        scale = torch.cat([torch.exp2(torch.arange(-126, 117).float()), torch.logspace(-30, 30, 100), torch.zeros(1)])
        shrink, grow = normalizing_powers(scale)
        self.assertTrue((shrink * grow == 1).all())
        self.assertTrue((scale.double() * 448 * shrink <= 0.875).all())
        self.assertTrue((scale.double() * 448 * shrink)[:-1].min() >= 0.4375)


def rounded(x: torch.Tensor, block_k: int) -> torch.Tensor:
    """What quantization leaves of an activation, in fp64."""
    values, scale = round_to_e4m3(x, block_k)
    return (values.double() * scale.double().unsqueeze(-1)).flatten(1)[:, : x.shape[1]]


class TestLinear(TestBase):
    def test_close_to_double_precision(self):
        for n, k, block in [(256, 384, (128, 128)), (200, 300, (128, 128)), (7, 5, (4, 3))]:
            layer, scheme = build_layer(n, k, block), build_scheme(block=block, dtype=torch.float32)
            weight = dense(layer, block)
            scheme.process_weights_after_loading(layer)
            x = torch.randn(6, k, generator=torch.Generator().manual_seed(1))
            bias = torch.randn(n)
            expected = rounded(x, block[1]) @ weight.T + bias.double()
            error = (scheme.apply(layer, x, bias) - expected).norm() / expected.norm()
            self.assertLess(error, 1e-6)

    def test_the_bias_is_added_before_the_rounding(self):
        layer, scheme = build_layer(256, 384), build_scheme()
        scheme.process_weights_after_loading(layer)
        x = torch.randn(1, 384, generator=torch.Generator().manual_seed(1)).bfloat16()
        rounded = scheme.apply(layer, x)
        left = scheme.apply(layer, x, -rounded[0])  # zero if it were added to the rounded sums
        self.assertTrue((left.abs() <= 2.0**-8 * rounded.abs() + 2.0**-16 * rounded.abs().max()).all())
        # The product is rounded to fp16 first: three bits more than bf16, all zero in an eighth of the outputs.
        self.assertGreater((left != 0).float().mean(), 0.8)

    def test_close_to_the_rounded_result_in_16_bits(self):
        layer, scheme = build_layer(256, 1024), build_scheme()
        weight = dense(layer)
        scheme.process_weights_after_loading(layer)
        x = torch.randn(65, 1024, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.arange(-32, 33).view(-1, 1)
        for dtype, bound in ((torch.bfloat16, 1.8e-3), (torch.float16, 5e-4)):
            rows = x[20:36].to(dtype)
            expected = rounded(rows, 128) @ weight.T
            error = (scheme.apply(layer, rows).double() - expected).norm(dim=1) / expected.norm(dim=1)
            self.assertLess(error.mean(), bound)

    def test_no_sum_overflows(self):
        layer, scheme = build_layer(128, fp8_block_exact.MAX_CHANNELS), build_scheme()
        layer.weight = torch.nn.Parameter(torch.full(layer.weight.shape, 448.0).to(torch.float8_e4m3fn), False)
        layer.weight_scale_inv.data.fill_(1.9999999)
        scheme.process_weights_after_loading(layer)
        out = scheme.apply(layer, torch.full((1, fp8_block_exact.MAX_CHANNELS), 65280.0).bfloat16())
        self.assertTrue(out.isfinite().all())

    def test_rows_decoded_in_pieces_are_the_same(self):
        layer, scheme = build_layer(520, 256), build_scheme()
        scheme.process_weights_after_loading(layer)
        x = torch.randn(3, 256).bfloat16()
        whole = scheme.apply(layer, x)
        with patch(f"{MODULE}._DECODE_PIECE", 1):
            self.assertTrue(torch.equal(scheme.apply(layer, x), whole))

    def test_weights_stay_at_one_byte(self):
        scheme = build_scheme()
        layers = [build_layer(256, 128), build_layer(512, 256), build_layer(128, 128)]
        for layer in layers:
            storage = layer.weight.data_ptr()
            scheme.process_weights_after_loading(layer)
            self.assertEqual((layer.weight.dtype, layer.weight.data_ptr()), (torch.uint8, storage))
            self.assertFalse(hasattr(layer, "weight_scale_inv"))
            self.assertEqual(layer.weight_powers.shape, (2,))

    def test_leading_dimensions_are_kept(self):
        layer, scheme = build_layer(256, 128), build_scheme()
        scheme.process_weights_after_loading(layer)
        self.assertEqual(scheme.apply(layer, torch.randn(2, 3, 128).bfloat16()).shape, (2, 3, 256))

    def test_scales_that_do_not_fit_are_rejected(self):
        layer = build_layer(256, 128)
        layer.weight_scale_inv = torch.nn.Parameter(torch.ones(3, 1), requires_grad=False)
        with self.assertRaisesRegex(ValueError, "needs scales"):
            build_scheme().process_weights_after_loading(layer)

    def test_layers_that_cannot_be_exact_are_served_dense(self):
        cases = [
            (build_scheme(), build_layer(256, 128, prefix="model.layers.0.self_attn.kv_b_proj")),
            (build_scheme(), build_layer(256, 128, output_partition_sizes=[100, 156])),
            (build_scheme(is_950=True), build_layer(200, 128)),
            (build_scheme(is_950=True, block=(64, 64)), build_layer(256, 128, (64, 64))),
        ]
        for scheme, layer in cases:
            block = (scheme.block_n, scheme.block_k)
            expected = dense(layer, block).bfloat16()
            with patch(f"{PARENT}.maybe_trans_nz", side_effect=lambda weight: weight):
                scheme.process_weights_after_loading(layer)
            self.assertTrue(torch.equal(layer.weight.data, expected))
            self.assertFalse(scheme.exact)

    def test_950_uses_the_block_product(self):
        layer, scheme = build_layer(256, 384), build_scheme(is_950=True)
        scheme.process_weights_after_loading(layer)
        npu = MagicMock()
        npu.npu_dynamic_block_quant.return_value = codes, scale = MagicMock(), MagicMock()
        npu.npu_quant_matmul.return_value = torch.zeros(5, 256)
        with patch(f"{MODULE}.torch_npu", npu):
            out = scheme.apply(layer, torch.zeros(5, 384).bfloat16())
            self.assertEqual(npu.npu_quant_matmul.call_args.kwargs["output_dtype"], torch.bfloat16)
            npu.npu_quant_matmul.return_value = torch.full((5, 256), 1 + 2.0**-12)
            biased = scheme.apply(layer, torch.zeros(5, 384).bfloat16(), -torch.ones(256).bfloat16())
        self.assertEqual(npu.npu_quant_matmul.call_args.kwargs["output_dtype"], torch.float32)
        self.assertTrue((biased == 2.0**-12).all())
        self.assertEqual((out.shape, biased.dtype), ((5, 256), torch.bfloat16))
        quantize = npu.npu_dynamic_block_quant.call_args.kwargs
        self.assertEqual((quantize["row_block_size"], quantize["col_block_size"]), (1, 128))
        arguments, options = npu.npu_quant_matmul.call_args
        self.assertIs(arguments[0], codes)
        self.assertEqual((arguments[1].shape, arguments[1].dtype), ((384, 256), torch.float8_e4m3fn))
        self.assertEqual(arguments[2].shape, (3, 2))
        self.assertIs(options["pertoken_scale"], scale)
        self.assertEqual(options["group_sizes"], [1, 128, 128])
        self.assertFalse(hasattr(layer, "weight_powers"))


class TestSelection(TestBase):
    def test_the_variable_selects_the_scheme(self):
        from vllm.model_executor.layers.linear import LinearBase

        config = AscendFp8Config(True, "dynamic", None, [128, 128])
        layer = MagicMock(spec=LinearBase)
        for value, expected in [("0", "linear"), ("1", "linear_exact")]:
            with (
                patch.dict(os.environ, {"VLLM_ASCEND_BLOCK_FP8_EXACT": value}),
                patch("vllm_ascend.quantization.configs.fp8_config.get_scheme_class") as get,
                patch("vllm_ascend.quantization.method_adapters.AscendLinearMethod"),
            ):
                config.get_quant_method(layer, "model.layers.0.mlp.down_proj")
            get.assert_called_once_with(FP8_METHOD, expected)
        self.assertIs(get_scheme_class(FP8_METHOD, "linear_exact"), AscendFp8BlockExactLinearMethod)

    def test_the_ascend_flag_takes_block_fp8(self):
        override = AscendModelSlimConfig.override_quantization_method
        self.assertEqual(override(HF_CONFIG, "ascend"), "ascend")
        self.assertIsNone(override(HF_CONFIG, None))
        self.assertIsNone(override({"quant_method": "awq"}, "ascend"))
        self.assertIsInstance(AscendModelSlimConfig.from_config(HF_CONFIG), AscendFp8Config)
        self.assertIsInstance(AscendModelSlimConfig.from_config({}), AscendModelSlimConfig)

    def test_the_parent_s_interface_is_kept(self):
        scheme, layer = build_scheme(), SimpleNamespace()
        self.assertIsNone(scheme.prepare_input_for_overlap(layer, torch.zeros(1, 1)))
        self.assertEqual(scheme.get_weight(512, 256, torch.bfloat16)["weight"].dtype, torch.float8_e4m3fn)
