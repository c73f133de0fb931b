"""The backend on torch_npu's operators. Without an NPU: A2/A3's path runs as it is, on the CPU; A5's native operators
are stood in for by their documented meaning, with every shape and dtype checked. Their real schemas and shape
functions are tested in tests/vllm_ascend."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import prefill, registry, soc, torch_npu
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid, BlockSize
from qwen3_fp8_ascend.testing import nonfinite
from qwen3_fp8_ascend.testing.experts import ExpertsProblem, assert_layer_exact, random_experts
from qwen3_fp8_ascend.testing.judges import (
    Problem,
    assert_bias_before_rounding,
    assert_exact,
    assert_prefill,
    beside_powers_of_two,
    random_problem,
)

SHAPES = [((256, 128, 128), 384), ((576, 192, 192), 576), ((40,), 130), ((1,), 1)]


class DocumentedOperators:
    """torch_npu's operators for e4m3 as their documentation has them, strict about operands."""

    @staticmethod
    def npu_dynamic_block_quant(
        x: torch.Tensor, *, min_scale: float, dst_type: torch.dtype, row_block_size: int, col_block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dtype in (torch.bfloat16, torch.float16) and x.is_contiguous() and x.shape[1] % col_block_size == 0
        assert (dst_type, row_block_size, col_block_size) == (torch.float8_e4m3fn, 1, 128)
        groups = x.float().unflatten(1, (-1, col_block_size))
        scale = (groups.abs().amax(-1) / 448).clamp_min(min_scale)
        return (groups / scale.unsqueeze(-1)).to(dst_type).flatten(1), scale

    @staticmethod
    def npu_quant_matmul(
        x1: torch.Tensor,
        x2: torch.Tensor,
        scale: torch.Tensor,
        *,
        pertoken_scale: torch.Tensor,
        output_dtype: torch.dtype,
        group_sizes: list[int],
    ) -> torch.Tensor:
        (m, k), n = x1.shape, x2.shape[1]
        assert x1.dtype == x2.dtype == torch.float8_e4m3fn and group_sizes == [1, 128, 128]
        assert x2.shape[0] == k and k % 128 == 0 and n % 128 == 0
        assert scale.shape == (k // 128, n // 128) and pertoken_scale.shape == (m, k // 128)
        assert scale.dtype == pertoken_scale.dtype == torch.float32
        out = torch.zeros(m, n)
        for kb in range(k // 128):
            block = slice(kb * 128, kb * 128 + 128)
            partial = x1[:, block].float() @ x2[block].float()
            out += partial * pertoken_scale[:, kb, None] * scale[kb].repeat_interleave(128)
        return out.to(output_dtype)

    @classmethod
    def npu_grouped_matmul(
        cls,
        x: list[torch.Tensor],
        weight: list[torch.Tensor],
        *,
        scale: list[torch.Tensor],
        per_token_scale: list[torch.Tensor],
        group_list: torch.Tensor,
        split_item: int,
        group_type: int,
        group_list_type: int,
        output_dtype: torch.dtype,
    ) -> list[torch.Tensor]:
        """G-B: one weight of three dimensions, transposed, a cumulative list; rows behind it are not written."""
        ((rows,), (codes,), (w_scale,), (x_scale,)) = x, weight, scale, per_token_scale
        assert (split_item, group_type, group_list_type) == (3, 0, 0)
        assert group_list.dtype == torch.int64 and group_list.shape == codes.shape[:1] and len(group_list) <= 1024
        assert codes.transpose(1, 2).is_contiguous() and w_scale.transpose(1, 2).is_contiguous()
        assert output_dtype in (torch.bfloat16, torch.float16, torch.float32)
        out = torch.full((len(rows), codes.shape[2]), float("nan"), dtype=output_dtype)
        for group, (start, end) in enumerate(itertools.pairwise([0, *group_list.tolist()])):
            assert 0 <= start <= end <= len(rows)
            out[start:end] = cls.npu_quant_matmul(
                rows[start:end],
                codes[group],
                w_scale[group],
                pertoken_scale=x_scale[start:end],
                output_dtype=output_dtype,
                group_sizes=[1, 128, 128],
            )
        return [out]


@pytest.fixture(params=["A2", "A5"])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend on a CPU, as if that were a chip of the generation."""
    generation = next(g for g in soc.GENERATIONS if g.name == request.param)
    monkeypatch.setattr(soc, "current_generation", lambda: generation)
    monkeypatch.setattr(torch_npu, "_operators", lambda: DocumentedOperators)
    monkeypatch.setattr(prefill, "stock_product", lambda x, w: (x.float() @ w.float().T).to(x.dtype))
    backend = dataclasses.replace(torch_npu.BACKEND, device_types=frozenset({"cpu"}), unusable=lambda: None)
    monkeypatch.setitem(registry.LOADED, "torch_npu", backend)
    registry.select_backend.cache_clear()
    yield request.param
    registry.select_backend.cache_clear()


def pack(problem: Problem, **options: Any) -> ops.PackedWeight:
    return ops.pack_weight(problem.weight, problem.scale, problem.grid, "torch_npu", **options)


QUANTIZING = (Activation.W8A8, Activation.W8A8_UE8M0)


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


on_a5 = pytest.mark.parametrize("chip", ["A5"], indirect=True)

# Whole blocks, a shard's 96 and 1.5 blocks of 768 / 8 and 768 / 4, one token, no token's expert, all on one.
LAYERS = {
    "whole blocks": lambda dtype: random_experts(6, 4, 2, 256, 128, dtype=dtype),
    "a shard of 96": lambda dtype: random_experts(6, 8, 2, 256, 96, dtype=dtype),
    "a shard of 192": lambda dtype: random_experts(5, 4, 3, 130, 192, dtype=dtype),
    "one token": lambda dtype: random_experts(1, 16, 8, 256, 96, dtype=dtype),
    "a single expert": lambda dtype: random_experts(3, 1, 1, 128, 40, dtype=dtype),
    "some nowhere": lambda dtype: nowhere(random_experts(6, 4, 2, 128, 96, dtype=dtype)),
}


def nowhere(problem: ExpertsProblem) -> ExpertsProblem:
    ids = problem.topk_ids.clone()
    ids[::2, 0] = -1
    ids[1] = -1
    return problem.with_tokens(problem.x, problem.topk_weights, ids)


@on_a5
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("activation", QUANTIZING)
def test_a_layer_of_experts(chip: str, activation: Activation, name: str, dtype: torch.dtype) -> None:
    problem = LAYERS[name](dtype)
    assert_layer_exact(problem.layer("torch_npu", activation), problem, activation)


@on_a5
def test_the_grouped_linear_by_the_gates_of_the_dense_one(chip: str) -> None:
    problem = random_experts(0, 4, 1, 200, 96)
    packed, _ = problem.pack("torch_npu")
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    counts = (5, 0, 30, 3)  # and two rows that are nobody's
    ends = torch.tensor(list(itertools.accumulate(counts)))
    got = ops.grouped_linear(x, packed, ends)
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        one = Problem(x[start:end], problem.w13[expert], problem.w13_scale[expert], grid=problem.w13_grid)
        assert_exact(got[start:end], one)
    assert got[38:].isnan().all()


@on_a5
@pytest.mark.parametrize("intermediate", [128, 96])
def test_experts_at_one_byte_a_weight(chip: str, intermediate: int) -> None:
    """A shard that ends within a block is filled up with rows of zeros; its scales are the checkpoint's own."""
    problem = random_experts(0, 3, 1, 130, intermediate)
    codes, scale = problem.pack("torch_npu")[0].tensors
    assert (codes.shape, codes.dtype) == ((3, 256, 256), torch.uint8)
    assert torch.equal(scale, problem.w13_scale)
    shards = codes.unflatten(1, (2, 128))
    assert not shards[:, :, intermediate:].any() and not codes[:, :, 130:].any()
    assert torch.equal(shards[:, :, :intermediate, :130].flatten(1, 2), problem.w13.view(torch.uint8))


@on_a5
@pytest.mark.parametrize(
    "plant",
    [
        lambda out, scale, ends: (scale.roll(1, 0), ends),
        lambda out, scale, ends: (scale.flip(1), ends),
        lambda out, scale, ends: (scale, (ends - 1).clamp_min(0)),
        lambda out, scale, ends: (scale, ends.roll(1)),
    ],
    ids=["another expert's scales", "up's scales for gate", "ends that are off by one", "another expert's rows"],
)
def test_planted_faults_of_the_grouped_product_are_noticed(
    chip: str, monkeypatch: pytest.MonkeyPatch, plant: Any
) -> None:
    problem = random_experts(6, 4, 2, 256, 128)
    assert_layer_exact(problem.layer("torch_npu"), problem)
    honest = DocumentedOperators.npu_grouped_matmul

    def faulty(x: Any, weight: Any, *, scale: Any, group_list: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        wrong, ends = plant(x, scale[0].transpose(1, 2).contiguous(), group_list)
        ends = ends.cummax(0).values
        out = honest(x, weight, scale=[wrong.contiguous().transpose(1, 2)], group_list=ends, **options)
        return [torch.nan_to_num(out[0])]

    monkeypatch.setattr(DocumentedOperators, "npu_grouped_matmul", faulty)
    with pytest.raises(AssertionError):
        assert_layer_exact(problem.layer("torch_npu"), problem)


def test_experts_are_refused_where_the_chip_has_no_product_for_them(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_experts(2, 2, 1, 128, 64)
    if chip == "A2":
        with pytest.raises(BlockFp8Error, match="serves experts on Ascend 950 alone"):
            problem.pack("torch_npu")
        return
    with pytest.raises(BlockFp8Error, match="computes w8a8/w8a8-ue8m0, not w8a16"):
        problem.pack("torch_npu", activation=Activation.W8A16)
    monkeypatch.setattr(torch_npu, "MAX_EXPERTS", 1)
    with pytest.raises(BlockFp8Error, match="too many experts"):
        problem.pack("torch_npu")


@on_a5
def test_fp32_experts_are_refused(chip: str) -> None:
    with pytest.raises(BlockFp8Error, match="16-bit activations"):
        random_experts(2, 2, 1, 128, 64, dtype=torch.float32).layer("torch_npu")


@on_a5
def test_operands_of_the_grouped_product_that_do_not_fit_are_refused(chip: str) -> None:
    problem = random_experts(2, 3, 1, 128, 64)
    packed, _ = problem.pack("torch_npu")
    codes, scale = packed.tensors
    ends = torch.tensor([1, 1, 2])
    for pair in ((codes[:2], scale), (codes[:, :128].contiguous(), scale), (codes, scale.bfloat16())):
        with pytest.raises(BlockFp8Error, match=r"do not fit each other|not a packed weight's"):
            ops.grouped_linear(problem.x, dataclasses.replace(packed, tensors=pair), ends)


@on_a5
def test_a_layer_compiles_whole(chip: str) -> None:
    """One graph for any number of tokens, with two grouped linears in it that nothing looks into."""
    torch._dynamo.reset()
    problem = random_experts(5, 4, 2, 256, 96)
    w13, w2 = problem.pack("torch_npu")
    compiled = torch.compile(ops.block_experts, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (5, 3):
        operands = (problem.x[:tokens], w13, w2, problem.topk_weights[:tokens], problem.topk_ids[:tokens])
        assert torch.equal(compiled(*operands), ops.block_experts(*operands))


@on_a5
def test_the_grouped_operator_traces_with_any_number_of_rows(chip: str) -> None:
    problem = random_experts(3, 3, 1, 128, 96)
    packed, _ = problem.pack("torch_npu")
    operands = (problem.x, *packed.tensors, torch.tensor([1, 1, 3]), [96, 96], torch.bfloat16)
    operator = torch_npu.torch_npu_native_grouped_linear
    torch.library.opcheck(operator, operands, test_utils=("test_schema", "test_faketensor"))
