"""Both lowered forms run on x86 and agree with the specification; broken ones do not."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from benchmarks.triton_folded import block_linear_folded_specification
from qwen3_fp8_ascend.testing import nonfinite
from qwen3_fp8_ascend.testing.judges import beside_powers_of_two
from qwen3_fp8_ascend.testing.nonfinite import same_numbers
from qwen3_fp8_ascend.triton_kernels import block_grouped_linear
from qwen3_fp8_ascend.triton_kernels.block_dequantize import (
    block_dequantize_specification,
    packed_dequantize_specification,
)
from qwen3_fp8_ascend.triton_kernels.block_grouped_linear import block_grouped_linear_specification
from qwen3_fp8_ascend.triton_kernels.block_linear import block_linear_specification
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


_executables: dict[tuple[str, str, str], LinalgKernel | HivmKernel] = {}


def executable(case, form):
    """Made once, however many tests run it."""
    key = (case.name, repr(case.constants), form)
    if key not in _executables:
        if form == "linalg":
            _executables[key] = LinalgKernel(lower_to_linalg(case, CHIP))
        else:
            _executables[key] = HivmKernel(hivm_text(case, form.removeprefix("hivm-")))
    return _executables[key]


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


def grouped_operands(groups, m_padded, n, k_blocks):
    values, a_scale, _, _ = linear_operands(m_padded, 256, k_blocks)
    layer = [linear_operands(1, n, k_blocks)[2:] for _ in range(groups)]
    return values, a_scale, torch.stack([lanes for lanes, _ in layer]), torch.stack([scale for _, scale in layer])


GROUPS = {
    "uneven and empty": (3, 0, 17, 0, 0, 1, 9),
    "all on one": (0, 0, 70, 0),
    "one row each": (1,) * 8,
    "none": (0, 0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("block_m", "subnormals"), [(16, True), (16, False), (32, True), (64, True)])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_grouped_linear(counts, block_m, subnormals, form):
    n, k_blocks, owned = 256, 2, sum(counts)
    m = owned + 2  # two rows are nobody's
    m_padded = -(-(m + block_m - 1) // 16) * 16
    operands = grouped_operands(len(counts), m_padded, n, k_blocks)
    ends, out = torch.tensor(counts).cumsum(0), torch.full((m, n), 7.0)
    kernel = executable(cases.grouped_linear_case(block_m, subnormals, CORES), form)
    kernel((CORES,), *operands, ends, out, m, m_padded, n, k_blocks, len(counts))
    expected = block_grouped_linear_specification(*operands, ends)[:m]
    assert (out[:owned].double() - expected[:owned]).norm() <= 1e-6 * expected[:owned].norm()
    assert (out[owned:] == 7.0).all(), "rows that are nobody's were written"


@pytest.mark.parametrize("form", FORMS)
def test_tiles_go_round_the_cores(form):
    """Of all groups without a seam: launched on some of the cores alone, every so many of them are missing."""
    counts, n, k_blocks, m, m_padded = (5, 0, 20, 3), 512, 2, 28, 48
    operands, ends = grouped_operands(len(counts), m_padded, n, k_blocks), torch.tensor(counts).cumsum(0)
    kernel = executable(cases.grouped_linear_case(16, False, CORES), form)
    for launched in range(1, CORES + 1):
        out = torch.full((m, n), 7.0)
        kernel((launched,), *operands, ends, out, m, m_padded, n, k_blocks, len(counts))
        tiles = [out[rows, column : column + 128] for rows in PASSES for column in range(0, n, 128)]
        assert [bool((tile != 7.0).all()) for tile in tiles] == [i % CORES < launched for i in range(len(tiles))]


PASSES = (slice(0, 5), slice(5, 21), slice(21, 25), slice(25, 28))
"""Rows that are multiplied together where groups have 5, 0, 20 and 3, at most 16 at a time."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ends", [(9, 2, 30, 4), (-5, 3, 3, 90), (2**31 + 1, 2**40, 7, -(2**35))])
def test_a_list_that_is_none_leaves_no_operand(ends, form):
    """Decreasing, negative, beyond the last row, beyond 32 bits: what is read and written is still the operands'."""
    n, k_blocks, m, m_padded = 256, 2, 20, 48
    operands = grouped_operands(4, m_padded, n, k_blocks)
    guarded = torch.full((m + 64, n), 7.0)
    kernel = executable(cases.grouped_linear_case(16, True, CORES), form)
    kernel((CORES,), *operands, torch.tensor(ends), guarded[:m], m, m_padded, n, k_blocks, 4)
    assert (guarded[m:] == 7.0).all()


def planted(old, new, folder):
    """The case of the grouped kernel whose source has one thing changed."""
    source = Path(block_grouped_linear.__file__).read_text()
    assert not old or old in source, f"the kernel no longer has {old!r}"
    file = folder / "defective.py"
    file.write_text(source.replace(old, new) if old else source)
    spec = importlib.util.spec_from_file_location("defective", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    case = cases.grouped_linear_case(16, True, CORES)
    return dataclasses.replace(case, name=f"{old} -> {new}", function=module.block_grouped_linear_kernel)


def beyond_32_bits(kernel):
    """The error of a layer of 4.3 GB of lanes; memory that nothing touches is never there: two experts are real."""
    n, k_blocks = 2048, 16
    groups = (1 << 31) // (n * k_blocks * 64) + 2
    values, a_scale, two_lanes, two_scales = grouped_operands(2, 32, n, k_blocks)
    lanes = torch.empty(groups, *two_lanes.shape[1:], dtype=torch.int16)
    w_scale = torch.empty(groups, k_blocks, n)
    lanes[0], lanes[-1], w_scale[0], w_scale[-1] = *two_lanes, *two_scales
    assert lanes[-1].storage_offset() > 2**31
    ends, out = torch.full((groups,), 3), torch.zeros(7, n)
    ends[-1] = 7
    kernel((CORES,), values, a_scale, lanes, w_scale, ends, out, 7, 32, n, k_blocks, groups)
    expected = block_grouped_linear_specification(values, a_scale, two_lanes, two_scales, torch.tensor((3, 7)))
    return relative(out, expected[:7])


@pytest.mark.parametrize("form", FORMS)
def test_grouped_weights_beyond_32_bits(form):
    assert beyond_32_bits(executable(cases.grouped_linear_case(16, True, CORES), form)) <= 1e-6


def test_offsets_of_32_bits_would_be_found(tmp_path):
    case = planted("tl.cast(group, tl.int64)", "group", tmp_path)
    with pytest.raises(OutOfBounds):
        beyond_32_bits(HivmKernel(compile_to_hivm(lower_to_linalg(case, CHIP), CHIP, IR_VERSIONS[-1])))


DEFECTS = {
    "nothing": ("", ""),
    "the scales of another expert": (
        "tl.cast(group, tl.int64) * (k_blocks * n)",
        "tl.cast(group // 2, tl.int64) * (k_blocks * n)",
    ),
    "the weight of another expert": ("tl.cast(group, tl.int64) * ((k", "tl.cast(group // 2, tl.int64) * ((k"),
    "an end one row early": ("mask=m_row[:, None] < end", "mask=m_row[:, None] < end - 1"),
    "an end one row late": ("first), m)", "first) + 1, m)"),
    "the last rows that fill no tile are lost": ("tl.cdiv(end - first, BLOCK_M)", "((end - first) // BLOCK_M)"),
    "rows beyond the expert's end are written": (", mask=m_row[:, None] < end", ""),
    "a tile that no core takes": ("(core + CORES - passed % CORES) % CORES", "core + passed % CORES"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_planted_in_the_grouped_kernel_are_found(defect, tmp_path):
    """In its source, compiled like the kernel."""
    case = planted(*DEFECTS[defect], tmp_path)
    counts, n, k_blocks = (5, 1, 20, 0, 3), 256, 2
    m, m_padded = sum(counts) + 2, 64
    operands = grouped_operands(len(counts), m_padded, n, k_blocks)
    ends, out = torch.tensor(counts).cumsum(0), torch.zeros(m_padded, n)
    kernel = HivmKernel(compile_to_hivm(lower_to_linalg(case, CHIP), CHIP, IR_VERSIONS[-1]))
    kernel((CORES,), *operands, ends, out, m, m_padded, n, k_blocks, len(counts))
    distance = relative(out, block_grouped_linear_specification(*operands, ends))
    assert distance <= 1e-6 if defect == "nothing" else distance > 1e-3


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

    def grouped(self, text):
        counts, m, m_padded = (5, 0, 20, 3), 28, 48
        operands = grouped_operands(len(counts), m_padded, 256, 4)
        out, ends = torch.zeros(m, 256), torch.tensor(counts).cumsum(0)
        HivmKernel(text)((CORES,), *operands, ends, out, m, m_padded, 256, 4, len(counts))
        return relative(out, block_grouped_linear_specification(*operands, ends)[:m])

    def grouped_text(self, version):
        return hivm_text(cases.grouped_linear_case(16, True, CORES), version)

    @pytest.mark.parametrize("version", IR_VERSIONS)
    def test_the_unchanged_modules_pass(self, version):
        assert self.grouped(self.grouped_text(version)) <= 1e-6
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
    def test_a_cross_core_flag_that_one_expert_takes_from_the_next(self, version, monkeypatch):
        """The vector cores' wait before a tile's decoded weights are overwritten, left out."""
        monkeypatch.setattr(hivm_executor, "DEADLOCK_S", 1.0)
        lines = self.grouped_text(version).split("\n")
        dropped = next(i for i, line in enumerate(lines) if "sync_block_wait[<VECTOR>" in line)
        with pytest.raises(ExecutionError):
            self.grouped("\n".join(lines[:dropped] + lines[dropped + 1 :]))

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
            HivmKernel(hivm_text(case, IR_VERSIONS[-1]))((CORES,), lanes, scale, out, 64, 4, 1)
            wrong[subnormals] = int((out != expected).sum())
        assert wrong[True] == 14 * 128 and wrong[False] == 0
