"""Dequantization as the compilers lowered it, executed on x86: bit for bit its specification."""

import itertools

import pytest
import torch

from qwen3_fp8_ascend.testing.nonfinite import same_numbers
from qwen3_fp8_ascend.triton_kernels.block_dequantize import (
    block_dequantize_specification,
    packed_dequantize_specification,
)
from qwen3_fp8_ascend.triton_kernels.lanes import pack_lanes
from tests.support.triton_ascend import cases
from tests.support.triton_ascend.execution import CORES, FORMS, TYPES, executable, finite_codes, with_forms


@pytest.mark.parametrize(("dtype", "subnormals", "form"), with_forms(list(itertools.product(TYPES, (True, False)))))
def test_dequantize_has_no_mismatch(dtype, subnormals, form):
    n, k_blocks = 320, 3
    codes = torch.arange(256, dtype=torch.uint8).repeat(n * k_blocks // 2).view(n, -1).view(torch.int8)
    scale = torch.rand(3, k_blocks) + 0.1
    out = torch.zeros(n, k_blocks * 128, dtype=TYPES[dtype])
    executable(cases.dequantize_case(dtype, subnormals, CORES), form)((CORES,), codes, scale, out, n, k_blocks)
    assert same_numbers(out, block_dequantize_specification(codes, scale, TYPES[dtype]))


PACKED = list(itertools.product(("fp16", "bf16"), (True, False)))


@pytest.mark.parametrize(("dtype", "subnormals", "form"), with_forms(PACKED))
def test_packed_dequantize_has_no_mismatch(dtype, subnormals, form):
    """fp16 is what the scratch holds, with scales that bring the largest weight below 1; much is subnormal here."""
    lanes, scale = pack_lanes(finite_codes(256, 512)), torch.rand(4, 256) + 0.1
    if dtype == "fp16":
        scale *= torch.exp2(torch.randint(-22, -9, scale.shape).float())
        expected = packed_dequantize_specification(lanes, scale, torch.float16)
        assert expected.abs().max() < 1 and 0.2 < ((expected != 0) & (expected.abs() < 2.0**-14)).float().mean() < 0.6
    out = torch.zeros(256, 512, dtype=TYPES[dtype])
    executable(cases.packed_dequantize_case(dtype, subnormals, CORES), form)((CORES,), lanes, scale, out, 256, 4, 1)
    assert torch.equal(out, packed_dequantize_specification(lanes, scale, TYPES[dtype]))


@pytest.mark.parametrize("form", FORMS)
def test_packed_dequantize_of_experts(form):
    lanes, scale = torch.stack([pack_lanes(finite_codes(256, 512)) for _ in range(3)]), torch.rand(3, 4, 256) + 0.1
    out = torch.zeros(3, 256, 512)
    kernel = executable(cases.packed_dequantize_case("fp32", True, CORES), form)
    kernel((CORES,), lanes, scale, out, 256, 4, 3)
    for expert in range(3):
        expected = packed_dequantize_specification(lanes[expert], scale[expert], torch.float32)
        assert torch.equal(out[expert], expected)
