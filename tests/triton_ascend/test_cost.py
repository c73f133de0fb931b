"""What decoding costs, counted in the HIVM; docs/triton.md shows the table."""

import pytest

from tests.support.triton_ascend.cases import compile_case, folded_case, linear_case
from tests.support.triton_ascend.compiler import IR_VERSIONS
from tests.support.triton_ascend.hivm_report import decode_cost, read_hivm

PRIOR_ART = 20  # softfp8_w8a16_matmul of sgl-kernel-npu: 10 operations per 128 weights


@pytest.mark.parametrize("ir_version", IR_VERSIONS)
@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_decode_with_subnormals_takes_at_most_ten_operations(block_m, ir_version):
    cost = decode_cost(read_hivm(compile_case(linear_case(block_m, True, 20), "Ascend910B3", ir_version)))
    assert cost.decode == 8


@pytest.mark.parametrize("ir_version", IR_VERSIONS)
@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_decode_without_subnormals_takes_less_than_the_prior_art(block_m, ir_version):
    cost = decode_cost(read_hivm(compile_case(linear_case(block_m, False, 20), "Ascend910B3", ir_version)))
    assert cost.decode == 18 < PRIOR_ART


def test_exact_scaling_is_cheap_where_it_is_used():
    exact = decode_cost(read_hivm(compile_case(linear_case(16, True, 20), "Ascend910B3", "1.2.0")))
    folded = decode_cost(read_hivm(compile_case(folded_case(16, True, 20), "Ascend910B3", "1.2.0")))
    assert exact.cycles < folded.cycles
    assert exact.moved["cube stores"] == 0.5 and folded.moved["cube stores"] == 0
