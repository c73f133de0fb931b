"""Quantization as the compilers lowered it, executed on x86: bit for bit its specification."""

import itertools

import pytest
import torch

from qwen3_fp8_ascend.testing import nonfinite
from qwen3_fp8_ascend.testing.judges import beside_powers_of_two
from qwen3_fp8_ascend.testing.nonfinite import same_numbers
from qwen3_fp8_ascend.triton_kernels.group_quantize import group_quantize_specification, group_values_specification
from tests.support.triton_ascend import cases
from tests.support.triton_ascend.execution import CORES, FORMS, TYPES, executable, wide_range, with_forms


@pytest.mark.parametrize(("dtype", "ue8m0", "form"), with_forms(list(itertools.product(TYPES, (False, True)))))
def test_quantize_is_bit_exact(dtype, ue8m0, form):
    groups = 301
    x = wide_range(groups, 128, TYPES[dtype])
    x[3], x[4], x[5, 7], x[6, 9], x[7, 0] = 0.0, -0.0, float("nan"), float("inf"), float("-inf")
    codes, scale = torch.zeros(groups, 128, dtype=torch.int8), torch.zeros(groups)
    edges = beside_powers_of_two(TYPES[dtype])
    x[8 : 8 + len(edges)] = edges
    executable(cases.quantize_case(dtype, CORES, ue8m0=ue8m0), form)((CORES,), x, codes, scale, groups)
    expected, expected_scale = group_quantize_specification(x, ue8m0)
    assert int((codes != expected).sum()) == 0 and same_numbers(scale, expected_scale)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES)
def test_quantize_any_nan_and_infinity(dtype, form):
    """All cases of the dtype, one after another, through one compiled kernel."""
    kernel = executable(cases.quantize_case(dtype, CORES), form)
    wrong = {}
    for case in nonfinite.NON_FINITE:
        if case.dtype != TYPES[dtype]:
            continue
        x = nonfinite.activation(case)
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 128))
        codes, scale = torch.zeros(padded.shape, dtype=torch.int8), torch.zeros(x.shape[0], padded.shape[1] // 128)
        kernel((CORES,), padded, codes, scale, scale.numel())
        wrong[str(case)] = nonfinite.wrong_quantization(x, codes[:, : x.shape[1]].contiguous(), scale)
    assert len(wrong) >= 16 and {name: what for name, what in wrong.items() if what} == {}


VALUES = [(0, "bf16"), (0, "fp32"), (1, "bf16"), (1, "fp32"), (2, "fp32"), (3, "bf16"), (3, "fp32")]


@pytest.mark.parametrize(("kind", "dtype", "form"), with_forms(VALUES))
def test_values_are_bit_exact(kind, dtype, form):
    m, m_padded, x_blocks, k_blocks = 21, 32, 3, 4
    x = wide_range(m, x_blocks * 128, TYPES[dtype])
    x[4], x[5, 3], x[6, 200] = 0.0, float("inf"), float("-inf")
    values = torch.full((m_padded, k_blocks * 128), 7.0, dtype=torch.float16)
    scale = torch.zeros(k_blocks, m_padded)
    kernel = executable(cases.values_case(dtype, kind, CORES), form)
    kernel((CORES,), x, values, scale, m, m_padded, x_blocks, k_blocks)
    expected, expected_scale = group_values_specification(x, m_padded, k_blocks, kind)
    assert same_numbers(values, expected) and torch.equal(scale, expected_scale)
