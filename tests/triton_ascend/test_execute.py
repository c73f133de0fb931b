"""Both lowered forms run on x86 and agree with the specification; broken ones do not."""

import re

import pytest
import torch

from qwen3_fp8_ascend.testing import nonfinite
from qwen3_fp8_ascend.testing.judges import beside_powers_of_two
from qwen3_fp8_ascend.testing.nonfinite import same_numbers
from qwen3_fp8_ascend.triton_kernels.block_dequantize import (
    block_dequantize_specification,
    packed_dequantize_specification,
)
from qwen3_fp8_ascend.triton_kernels.block_linear import (
    block_linear_folded_specification,
    block_linear_specification,
)
from qwen3_fp8_ascend.triton_kernels.group_quantize import (
    group_quantize_specification,
    group_values_specification,
)
from qwen3_fp8_ascend.triton_kernels.lanes import pack_lanes
from tests.support.triton_ascend import cases, hivm_executor
from tests.support.triton_ascend.compiler import IR_VERSIONS, compile_to_hivm, lower_to_linalg
from tests.support.triton_ascend.hivm_executor import ExecutionError, HivmKernel
from tests.support.triton_ascend.hivm_intrinsics import OutOfBounds
from tests.support.triton_ascend.linalg_executor import LinalgKernel

CHIP = "Ascend910B3"
CORES = 3
FORMS = ("linalg", *(f"hivm-{version}" for version in IR_VERSIONS))
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


_compiled: dict[tuple[str, str, str], str] = {}


def hivm_text(case, version):
    key = (case.name, repr(case.constants), version)
    if key not in _compiled:
        _compiled[key] = compile_to_hivm(lower_to_linalg(case, CHIP), CHIP, version)
    return _compiled[key]


def executable(case, form):
    if form == "linalg":
        return LinalgKernel(lower_to_linalg(case, CHIP))
    return HivmKernel(hivm_text(case, form.removeprefix("hivm-")))


def wide_range(m, k, dtype):
    x = torch.randn(m, k) * torch.exp2(torch.randint(-14, 3, (m, k)).float())
    return (x * torch.logspace(-5, 3, m)[:, None]).to(dtype)


def finite_codes(n, k):
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    return codes.view(torch.int8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kind", "dtype"), [(0, "bf16"), (0, "fp32"), (1, "bf16"), (1, "fp32"), (2, "fp32"), (3, "bf16"), (3, "fp32")]
)
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("subnormals", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_dequantize_has_no_mismatch(dtype, subnormals, form):
    n, k_blocks = 320, 3
    codes = torch.arange(256, dtype=torch.uint8).repeat(n * k_blocks // 2).view(n, -1).view(torch.int8)
    scale = torch.rand(3, k_blocks) + 0.1
    out = torch.zeros(n, k_blocks * 128, dtype=TYPES[dtype])
    executable(cases.dequantize_case(dtype, subnormals, CORES), form)((CORES,), codes, scale, out, n, k_blocks)
    assert same_numbers(out, block_dequantize_specification(codes, scale, TYPES[dtype]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("subnormals", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_packed_dequantize_has_no_mismatch(dtype, subnormals, form):
    """fp16 is what the scratch holds, with scales that bring the largest weight below 1; much is subnormal here."""
    lanes, scale = pack_lanes(finite_codes(256, 512)), torch.rand(4, 256) + 0.1
    if dtype == "fp16":
        scale *= torch.exp2(torch.randint(-22, -9, scale.shape).float())
        expected = packed_dequantize_specification(lanes, scale, torch.float16)
        assert expected.abs().max() < 1 and 0.2 < ((expected != 0) & (expected.abs() < 2.0**-14)).float().mean() < 0.6
    out = torch.zeros(256, 512, dtype=TYPES[dtype])
    executable(cases.packed_dequantize_case(dtype, subnormals, CORES), form)((CORES,), lanes, scale, out, 256, 4)
    assert torch.equal(out, packed_dequantize_specification(lanes, scale, TYPES[dtype]))


def linear_operands(m, n, k_blocks):
    """Quantized activations with real scales; a scale per weight row, as merged shards have."""
    values, a_scale = group_values_specification(torch.randn(m, k_blocks * 128), m, k_blocks, 0)
    return values, a_scale, pack_lanes(finite_codes(n, k_blocks * 128)), torch.rand(k_blocks, n) * 0.01 + 1e-4


def relative(out, expected):
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("subnormals", [False, True])
@pytest.mark.parametrize(("block_m", "m", "split_k"), [(16, 32, 2), (32, 32, 1), (64, 64, 3)])
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


def mutate(text, old, new, count=1):
    assert old in text, f"the module no longer has {old!r}"
    return text.replace(old, new, count)


class TestBrokenKernelsAreNoticed:
    """Negative controls: each is the correct module with one thing changed."""

    def quantize(self, text):
        x = wide_range(64, 128, torch.bfloat16)
        codes, scale = torch.zeros(64, 128, dtype=torch.int8), torch.zeros(64)
        HivmKernel(text)((CORES,), x, codes, scale, 64)
        return int((codes != group_quantize_specification(x)[0]).sum())

    def quantize_text(self, version):
        return hivm_text(cases.quantize_case("bf16", CORES), version)

    def linear(self, text):
        operands = linear_operands(16, 256, 4)
        out = torch.full((1, 16, 256), float("nan"))
        HivmKernel(text)((CORES,), *operands, out, 16, 256, 4)
        return relative(out, block_linear_specification(*operands, 1))

    def linear_text(self, version):
        return hivm_text(cases.linear_case(16, True, CORES), version)

    @pytest.mark.parametrize("version", IR_VERSIONS)
    def test_the_unchanged_modules_pass(self, version):
        assert self.quantize(self.quantize_text(version)) == 0
        assert self.linear(self.linear_text(version)) <= 1e-6

    @pytest.mark.parametrize("version", IR_VERSIONS)
    def test_a_changed_constant(self, version):
        text = mutate(self.quantize_text(version), "arith.constant -960 : i32", "arith.constant -952 : i32")
        assert self.quantize(text) > 1000

    @pytest.mark.parametrize("version", IR_VERSIONS)
    def test_a_memory_plan_that_overlaps(self, version):
        text = re.sub(r"pointer_cast\(%c\d+_i64\)", "pointer_cast(%c0_i64)", self.quantize_text(version))
        assert self.quantize(text) > 1000

    @pytest.mark.parametrize("version", IR_VERSIONS)
    def test_a_changed_mask_in_the_decode(self, version):
        text = mutate(self.linear_text(version), "arith.constant -16512 : i16", "arith.constant -16384 : i16")
        assert self.linear(text) > 1e-3

    @pytest.mark.parametrize("version", IR_VERSIONS)
    def test_a_dropped_cross_core_flag(self, version, monkeypatch):
        monkeypatch.setattr(hivm_executor, "DEADLOCK_S", 1.0)
        lines = self.linear_text(version).split("\n")
        dropped = next(i for i, line in enumerate(lines) if "sync_block_set[<VECTOR>, <PIPE_MTE3>" in line)
        with pytest.raises(ExecutionError, match="deadlock"):
            self.linear("\n".join(lines[:dropped] + lines[dropped + 1 :]))

    @pytest.mark.parametrize("version", IR_VERSIONS)
    def test_a_surplus_cross_core_flag(self, version):
        lines = self.linear_text(version).split("\n")
        doubled = next(i for i, line in enumerate(lines) if "sync_block_set[<VECTOR>, <PIPE_MTE3>" in line)
        with pytest.raises(ExecutionError):
            self.linear("\n".join([*lines[: doubled + 1], lines[doubled], *lines[doubled + 1 :]]))

    def test_a_tensor_that_is_too_small(self):
        operands = linear_operands(16, 256, 4)
        with pytest.raises(OutOfBounds):
            HivmKernel(self.linear_text(IR_VERSIONS[-1]))((CORES,), *operands, torch.empty(1, 8, 256), 16, 256, 4)

    def test_an_unknown_library_function(self):
        text = self.quantize_text(IR_VERSIONS[-1]).replace("vdiv_vs_1d_float", "vmystery_1d_float")
        with pytest.raises(NotImplementedError, match="vmystery_1d_float"):
            HivmKernel(text)

    def test_a_flushing_vector_unit_would_be_noticed(self, monkeypatch):
        """The cheaper form needs subnormals; the other gives the same bits on a machine that flushes them."""
        from tests.support.triton_ascend import hivm_intrinsics

        honest = hivm_intrinsics.read

        def flushing(descriptor, rank, element):
            values = honest(descriptor, rank, element)
            if element == "half":
                values[abs(values) < 2.0**-14] = 0
            return values

        codes = torch.arange(256, dtype=torch.uint8).repeat(128).view(64, 512)
        codes[(codes & 0x7F) == 0x7F] = 0
        lanes, scale = pack_lanes(codes.view(torch.int8)), torch.ones(4, 64)
        expected = packed_dequantize_specification(lanes, scale, torch.float32)
        monkeypatch.setattr(hivm_intrinsics, "read", flushing)
        wrong = {}
        for subnormals in (True, False):
            case = cases.packed_dequantize_case("fp32", subnormals, CORES)
            out = torch.zeros(64, 512)
            HivmKernel(hivm_text(case, IR_VERSIONS[-1]))((CORES,), lanes, scale, out, 64, 4)
            wrong[subnormals] = int((out != expected).sum())
        assert wrong[True] == 14 * 128 and wrong[False] == 0
