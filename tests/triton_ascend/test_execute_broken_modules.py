"""The executor notices modules that are wrong: each is the correct one with one thing changed."""

import re

import pytest
import torch

from qwen3_fp8_ascend.triton_kernels.block_dequantize import packed_dequantize_specification
from qwen3_fp8_ascend.triton_kernels.block_grouped_linear import block_grouped_linear_specification
from qwen3_fp8_ascend.triton_kernels.block_linear import block_linear_specification
from qwen3_fp8_ascend.triton_kernels.group_quantize import group_quantize_specification
from qwen3_fp8_ascend.triton_kernels.lanes import pack_lanes
from tests.support.triton_ascend import cases, hivm_executor, hivm_intrinsics
from tests.support.triton_ascend.compiler import IR_VERSIONS
from tests.support.triton_ascend.execution import (
    CORES,
    grouped_operands,
    hivm_text,
    linear_operands,
    relative,
    wide_range,
)
from tests.support.triton_ascend.hivm_executor import ExecutionError, HivmKernel
from tests.support.triton_ascend.hivm_intrinsics import OutOfBounds


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
