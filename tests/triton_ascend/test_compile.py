"""Every kernel, for every chip, with every compiler version, reaches hivmc without a scalar loop."""

import itertools

import pytest
import triton
import triton.language as tl

from qwen3_fp8_ascend.triton_kernels.configuration import architecture
from tests.support.triton_ascend.cases import (
    ASCEND_ARCHITECTURES,
    all_cases,
    compile_case,
    linear_case,
    one_of_each,
    quantize_case,
)
from tests.support.triton_ascend.compiler import (
    IR_VERSIONS,
    CompileError,
    KernelCase,
    compile_to_hivm,
    lower_to_linalg,
)
from tests.support.triton_ascend.hivm_report import read_hivm

# 910B's and 910C's unified buffer, L1 and L0C; 950's modules address part of theirs indirectly.
CAPACITY = {"ub": 192 << 10, "cbuf": 512 << 10, "cc": 128 << 10}


WHOLE = {"Ascend910B3": IR_VERSIONS, "Ascend950PR_9589": IR_VERSIONS[:1]}
"""One chip of each configuration, and the compilers that get all its variants in the short form: for 950 the later one
takes four times as long, and gets one of each kernel, as do chips that differ in their number of cores."""


def compilations():
    for name in ASCEND_ARCHITECTURES:
        some = {case.name for case in one_of_each(name)}
        for case, version in itertools.product(all_cases(name), IR_VERSIONS):
            short = version in WHOLE.get(name, ()) or case.name in some
            marks = [] if short else pytest.mark.long
            yield pytest.param(name, case, version, id=f"{name}-{case.name}-{version}", marks=marks)


def test_a_chip_of_every_configuration_compiles_every_variant():
    assert {architecture(name) for name in WHOLE} == {architecture(name) for name in ASCEND_ARCHITECTURES}


@pytest.mark.parametrize(("architecture_name", "case", "ir_version"), list(compilations()))
def test_reaches_hivmc(architecture_name, case, ir_version, record_property):
    report = read_hivm(compile_case(case, architecture_name, ir_version))
    assert report.cores, "no device code"
    assert not report.scalar_fallbacks
    if architecture_name.startswith("Ascend910"):
        assert all(used <= CAPACITY[space] for space, used in report.peak_memory.items())
        assert report.peak_memory["ub"] <= 0.75 * CAPACITY["ub"], "no margin for another compiler version"
        assert report.vector.shared, "one of the two vector cores idles"
    record_property("memory", report.peak_memory)


@triton.jit
def _overflows(x_ptr, ROWS: tl.constexpr):
    offset = tl.arange(0, ROWS)[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(x_ptr + offset, tl.exp(tl.load(x_ptr + offset)))


@triton.jit
def _gathers(x_ptr, index_ptr, out_ptr, N: tl.constexpr):
    offset = tl.arange(0, N)
    tl.store(out_ptr + offset, tl.load(x_ptr + tl.load(index_ptr + offset)))


@pytest.mark.parametrize("ir_version", IR_VERSIONS)
def test_too_large_a_tile_is_refused_with_its_size(ir_version):
    case = KernelCase("overflows", _overflows, {"x_ptr": "*fp32", "ROWS": "constexpr"}, {"ROWS": 1024})
    with pytest.raises(CompileError, match="ub overflow, requires"):
        compile_case(case, "Ascend910B3", ir_version)


@pytest.mark.parametrize("ir_version", IR_VERSIONS)
def test_a_scalar_loop_is_noticed(ir_version):
    case = KernelCase(
        "gathers",
        _gathers,
        {"x_ptr": "*fp32", "index_ptr": "*i32", "out_ptr": "*fp32", "N": "constexpr"},
        {"N": 256},
    )
    assert read_hivm(compile_case(case, "Ascend910B3", ir_version)).scalar_fallbacks


def test_why_950_does_not_split_over_vector_cores():
    """ascendnpu-ir 1.1.0 crashes; when this fails, `bind_sub_block` of 950 may be reconsidered."""
    name = "Ascend950PR_9589"
    linalg = lower_to_linalg(linear_case(16, True, 32, block_n=128), name)
    with pytest.raises(CompileError):
        compile_to_hivm(linalg, name, "1.1.0", bind_sub_block=True)
    assert compile_to_hivm(linalg, name, "1.2.0", bind_sub_block=True)


def test_a_wrong_chip_name_is_an_error():
    with pytest.raises(CompileError):
        compile_case(quantize_case("bf16", 40), "Ascend910B99", IR_VERSIONS[-1])
