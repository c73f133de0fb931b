"""The backend on torch_npu's operators. Without an NPU: A2/A3's path runs as it is, on the CPU; A5's native operators
are stood in for by their documented meaning, with every shape and dtype checked. Their real schemas and shape
functions are tested in tests/vllm_ascend."""

import dataclasses
from typing import Any

import pytest
import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import prefill, registry, soc, torch_npu
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid, BlockSize
from qwen3_fp8_ascend.testing import nonfinite
from qwen3_fp8_ascend.testing.judges import (
    Problem,
    assert_bias_before_rounding,
    assert_exact,
    assert_prefill,
    beside_powers_of_two,
    random_problem,
)
from tests.support.documented_npu import DocumentedOperators

QUANTIZING = (Activation.W8A8, Activation.W8A8_UE8M0)
SHAPES = [((256, 128, 128), 384), ((576, 192, 192), 576), ((40,), 130), ((1,), 1)]


def pack(problem: Problem, **options: Any) -> ops.PackedWeight:
    return ops.pack_weight(problem.weight, problem.scale, problem.grid, "torch_npu", **options)


@pytest.mark.parametrize("activation", QUANTIZING)
@pytest.mark.parametrize(("widths", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 7, 65, 512])
def test_linear(chip: str, widths: tuple[int, ...], k: int, m: int, activation: Activation) -> None:
    """A5 multiplies exactly; A2 and A3 decode into the scratch whatever the number of rows."""
    problem = random_problem(m, widths, k, bias=True)
    packed = pack(problem)
    for bias in (None, problem.bias):
        got = ops.block_linear(problem.x, packed, bias, activation)
        judge = assert_exact if chip == "A5" else assert_prefill
        judge(got, dataclasses.replace(problem, bias=bias), activation)


@pytest.mark.parametrize("activation", QUANTIZING)
@pytest.mark.parametrize("case", nonfinite.NON_FINITE, ids=str)
@pytest.mark.parametrize("chip", ["A2"], indirect=True)
def test_nan_and_infinities(chip: str, case: nonfinite.NonFinite, activation: Activation) -> None:
    x = nonfinite.activation(case)
    got = ops.quantize_activation(x, activation=activation, backend="torch_npu")
    assert nonfinite.wrong_quantization(x, *got, activation) == []
    weight = random_problem(0, (200,), 300)
    oracle = dataclasses.replace(weight, x=x).oracle(activation)
    assert nonfinite.wrong_linear(case, ops.block_linear(x, pack(weight), activation=activation), oracle) == []


@pytest.mark.parametrize("m", [1, 70])
def test_bias_is_added_before_the_rounding(chip: str, m: int) -> None:
    """On A2 and A3 it is added to the stock product, which is rounded to fp16, and before that is rounded to bf16."""
    problem = random_problem(m, (256, 192), 384)
    packed = pack(problem)
    assert_bias_before_rounding(lambda bias: ops.block_linear(problem.x, packed, bias), 0.9 if chip == "A5" else 0.8)


@pytest.mark.parametrize("chip", ["A2"], indirect=True)
@pytest.mark.parametrize(("widths", "k"), SHAPES)
def test_the_scratch_path_is_exact_in_fp32(chip: str, widths: tuple[int, ...], k: int) -> None:
    problem = random_problem(3, widths, k)
    assert_exact(ops.block_linear(problem.x.float(), pack(problem)), dataclasses.replace(problem, x=problem.x.float()))


@pytest.mark.parametrize(("widths", "k"), SHAPES)
def test_one_byte_a_weight(chip: str, widths: tuple[int, ...], k: int) -> None:
    problem = random_problem(0, widths, k)
    packed = pack(problem)
    rows = sum(-(-width // 128) * 128 for width in widths) if chip == "A5" else sum(widths)
    columns = -(-k // 128) * 128
    assert packed.tensors[0].shape == (rows, columns) and packed.tensors[0].dtype == torch.uint8
    scales = rows // 128 * columns // 128 if chip == "A5" else rows * columns // 128
    moved = 8 * sum(widths) if chip == "A5" and rows != sum(widths) else 0
    powers = 0 if chip == "A5" else 8
    assert packed.nbytes == rows * columns + 4 * scales + moved + powers


def test_zero_rows(chip: str) -> None:
    problem = random_problem(0, (64,), 128)
    assert ops.block_linear(problem.x.bfloat16(), pack(problem)).shape == (0, 64)


def test_quantization_and_dequantization_are_the_specification(chip: str) -> None:
    problem = random_problem(5, (40, 24), 130)
    for activation in QUANTIZING:
        for x in (problem.x, beside_powers_of_two(torch.bfloat16)):
            codes, scale = ops.quantize_activation(x, activation=activation, backend="torch_npu")
            want_codes, want_scale = reference.quantize_activation(x, activation=activation)
            assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8)) and torch.equal(scale, want_scale)
    got = ops.dequantize_weight(problem.weight, problem.scale, problem.grid, backend="torch_npu")
    assert torch.equal(got, reference.dequantize_weight(problem.weight, problem.scale, problem.grid))


@pytest.mark.parametrize("chip", ["A5"], indirect=True)
def test_groups_of_zeros_have_the_specification_s_scale(chip: str) -> None:
    _, scale = DocumentedOperators.npu_dynamic_block_quant(
        torch.zeros(1, 128, dtype=torch.bfloat16),
        min_scale=torch_npu.MIN_SCALE,
        dst_type=torch.float8_e4m3fn,
        row_block_size=1,
        col_block_size=128,
    )
    assert torch.equal(scale, reference.quantize_activation(torch.zeros(1, 128))[1])


@pytest.mark.parametrize("chip", ["A5"], indirect=True)
def test_fp32_activations_are_refused_by_the_native_product(chip: str) -> None:
    problem = random_problem(2, (64,), 128)
    with pytest.raises(BlockFp8Error, match="16-bit activations"):
        ops.block_linear(problem.x.float(), pack(problem))


def test_w8a16_and_other_blocks_are_refused(chip: str) -> None:
    problem = random_problem(2, (64,), 128)
    with pytest.raises(BlockFp8Error, match="computes w8a8/w8a8-ue8m0, not w8a16"):
        pack(problem, activation=Activation.W8A16)
    with pytest.raises(BlockFp8Error, match="blocks of 128x128"):
        ops.pack_weight(problem.weight, torch.ones(1, 2), BlockGrid((64,), 128, BlockSize(64, 64)), "torch_npu")


def test_the_automatic_choice(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On A5 the native product is preferred to Triton's kernels; on A2 the backend must be asked for."""
    assert (registry.LOADED["torch_npu"].by_name_only() is None) == (chip == "A5")
    assert torch_npu.BACKEND.plan is not None and len(torch_npu.BACKEND.plan()) == 1
    assert registry.select_backend(None, "cpu", "w8a8").name == ("torch_npu" if chip == "A5" else "cpu")


def test_the_operators_trace_with_any_number_of_rows(chip: str) -> None:
    for widths in ((128,), (64, 100)):
        problem = random_problem(3, widths, 128)
        packed = pack(problem)
        operator, last = torch_npu.torch_npu_scratch_linear, (None,)
        if chip == "A5":
            operator, last = torch_npu.torch_npu_native_linear, (None,) if widths == (128,) else ()
        torch.library.opcheck(
            operator, (problem.x.bfloat16(), *packed.tensors, *last), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize(("widths", "k"), SHAPES)
def test_operands_that_do_not_fit_each_other_are_refused(chip: str, widths: tuple[int, ...], k: int) -> None:
    """torch_npu's shape functions let such operands pass: tests/vllm_ascend/test_environment.py."""
    packed = pack(random_problem(2, widths, k))
    codes, scale, *kept = packed.tensors
    x = torch.ones(2, k, dtype=torch.bfloat16)
    wrong = [
        (codes[:, :-1], scale),
        (codes.view(torch.int8), scale),
        (codes, scale[:, :0]),
        (codes, torch.cat([scale, scale])),
        (codes, scale.bfloat16()),
        (codes.T.contiguous().T, scale) if min(codes.shape) > 1 else (codes.view(torch.float8_e4m3fn), scale),
    ]
    for pair in wrong:
        with pytest.raises(BlockFp8Error, match=r"not a packed weight's"):
            ops.block_linear(x, dataclasses.replace(packed, tensors=(*pair, *kept)))


@pytest.mark.parametrize("chip", ["A2"], indirect=True)
def test_a_weight_beyond_the_scratch_is_refused_at_load(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BlockFp8Error, match=r"(?s)too large for the scratch.*in at most 74752 columns"):
        pack(random_problem(0, (1,), prefill.MAX_COLUMNS + 1))
    monkeypatch.setattr(prefill, "MAX_WEIGHTS", 64 * 128 - 1)
    with pytest.raises(BlockFp8Error, match=r"too large for the scratch"):
        pack(random_problem(2, (64,), 128))


@pytest.mark.parametrize("chip", ["A5"], indirect=True)
def test_a_torch_npu_without_the_operators_is_a_reason(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soc, "missing_npu", lambda: None)
    assert torch_npu.unusable() is None
    monkeypatch.delattr(DocumentedOperators, "npu_quant_matmul")
    assert torch_npu.unusable() == "this torch_npu has no npu_quant_matmul: install a newer one"
    monkeypatch.delattr(DocumentedOperators, "npu_grouped_matmul")
    assert (
        torch_npu.unusable() == "this torch_npu has no npu_quant_matmul and no npu_grouped_matmul: install a newer one"
    )


def test_it_compiles_whole_without_asking_the_machine(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile traces depends on the packed weight alone, and is one graph for any number of rows."""
    problem = random_problem(5, (256, 192), 300, bias=True)
    packed = pack(problem)

    def ask() -> None:
        raise AssertionError("asked which NPU this is")

    monkeypatch.setattr(soc, "current_generation", ask)
    monkeypatch.setattr(soc, "missing_npu", ask)
    compiled = torch.compile(ops.block_linear, backend="eager", fullgraph=True, dynamic=True)
    for rows in (5, 2):
        x = problem.x.bfloat16()[:rows]
        assert torch.equal(compiled(x, packed, problem.bias), ops.block_linear(x, packed, problem.bias))
