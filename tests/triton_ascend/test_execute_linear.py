"""The dense linears as the compilers lowered them, executed on x86, against their specifications in fp64."""

import pytest
import torch

from benchmarks.triton_folded import block_linear_folded_specification
from qwen3_fp8_ascend.triton_kernels.block_linear import block_linear_specification
from qwen3_fp8_ascend.triton_kernels.group_quantize import group_values_specification
from tests.support.triton_ascend import cases
from tests.support.triton_ascend.execution import CORES, FORMS, executable, linear_operands, relative, with_forms

LINEARS = [(*shape, keeps) for keeps in (True, False) for shape in ((16, 32, 2), (32, 32, 1), (64, 64, 3))]


@pytest.mark.parametrize(("block_m", "m", "split_k", "subnormals", "form"), with_forms(LINEARS))
def test_linear(block_m, m, split_k, subnormals, form):
    n, k_blocks = 512, 6
    operands = linear_operands(m, n, k_blocks)
    out = torch.full((split_k, m, n), float("nan"))
    case = cases.linear_case(block_m, subnormals, CORES, split_k=split_k)
    executable(case, form)((CORES,), *operands, out, m, n, k_blocks)
    assert relative(out, block_linear_specification(*operands, split_k)) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_m", [16, 64])
def test_folded_linear(block_m, form):
    n, k_blocks = 256, 4
    values, a_scale, lanes, w_scale = linear_operands(block_m, n, k_blocks)
    w_scale = w_scale.view(k_blocks, n // 128, 128)[..., :1].expand(-1, -1, 128).reshape(k_blocks, n).contiguous()
    out = torch.full((block_m, n), float("nan"))
    kernel = executable(cases.folded_case(block_m, True, CORES), form)
    kernel((CORES,), values, a_scale, lanes, w_scale, out, block_m, n, k_blocks)
    exact = block_linear_specification(values, a_scale, lanes, w_scale, 1)[0]
    assert relative(out, block_linear_folded_specification(values, a_scale, lanes, w_scale)) <= 1e-6
    assert relative(out, exact) <= 5e-4


@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)])
def test_linear_at_a_qwen3_8b_shape_scaled_down(shape):
    """An eighth of each dimension, through quantization and linear, against the oracle of the codes."""
    n, k = shape[0] // 8, shape[1] // 8
    k_blocks = k // 128
    x = torch.randn(5, k).bfloat16()
    values, a_scale = torch.empty(16, k, dtype=torch.float16), torch.empty(k_blocks, 16)
    values_kernel = executable(cases.values_case("bf16", 0, CORES), FORMS[-1])
    values_kernel((CORES,), x, values, a_scale, 5, 16, k_blocks, k_blocks)
    _, _, lanes, w_scale = linear_operands(1, n, k_blocks)
    out = torch.empty(1, 16, n)
    executable(cases.linear_case(16, True, CORES), FORMS[-1])(
        (CORES,), values, a_scale, lanes, w_scale, out, 16, n, k_blocks
    )
    expected, expected_scale = group_values_specification(x, 16, k_blocks, 0)
    oracle = block_linear_specification(expected, expected_scale, lanes, w_scale, 1)
    assert relative(out[0, :5], oracle[0, :5]) <= 1e-6
