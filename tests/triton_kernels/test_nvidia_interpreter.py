"""The kernels for NVIDIA GPUs and their backend in upstream Triton's interpreter, against the specification."""

import dataclasses
import os

import pytest

pytest.importorskip("triton", reason="upstream Triton lives in .venv-triton: `make test-triton`")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is chosen by TRITON_INTERPRET=1: `make test-triton`", allow_module_level=True)

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import triton_host
from qwen3_fp8_ascend.backends.nvidia import backend, launch
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid, BlockSize
from qwen3_fp8_ascend.testing import nonfinite
from qwen3_fp8_ascend.testing.judges import (
    assert_bias_before_rounding,
    assert_exact,
    beside_powers_of_two,
    judge_exact,
    random_problem,
)
from qwen3_fp8_ascend.triton_kernels.nvidia import decode, linear, shapes
from tests.support.products import DTYPES, with_dtypes_and_activations

QUANTIZING = (Activation.W8A8, Activation.W8A8_UE8M0)


@pytest.fixture
def finished_last(monkeypatch):
    """The stretches of K in any order: a function that says which the interpreter runs as the how-maniest."""
    honest = interpreter.interpreter_builder.set_grid_idx

    def choose(order):
        monkeypatch.setattr(
            interpreter.interpreter_builder, "set_grid_idx", lambda x, y, z: honest(x, order[y] if order else y, z)
        )

    return choose


@triton.jit
def _decode_all(codes_ptr, out_ptr, HARDWARE: tl.constexpr, TYPE: tl.constexpr):
    offset = tl.arange(0, 256)
    value = decode.decode(tl.load(codes_ptr + offset), HARDWARE, TYPE)
    tl.store(out_ptr + offset, value.to(tl.float32))


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("dtype", [tl.float16, tl.bfloat16, tl.float32])
def test_every_code_decodes_exactly(hardware, dtype):
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    out = torch.empty(256)
    _decode_all[(1,)](every, out, HARDWARE=hardware, TYPE=dtype)
    expected = decode.decode_specification(every)
    finite = ~expected.isnan()
    assert torch.equal(out[finite].view(torch.int32), expected[finite].view(torch.int32)) and int(finite.sum()) == 254


@pytest.mark.parametrize("activation", QUANTIZING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 300), (33, 128), (70, 640)])
def test_quantize_is_bit_exact_and_values_are_those_of_the_codes(m, k, dtype, activation):
    wide = torch.empty(m, k + 5, dtype=dtype)  # tokens that do not follow each other
    x = wide[:, :k].copy_(torch.randn(m, k) * torch.exp2(torch.randint(-14, 3, (m, k)).float()))
    codes, scale = ops.quantize_activation(x, activation=activation, backend="nvidia")
    expected, expected_scale = reference.quantize_activation(x, activation=activation)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scale, expected_scale)
    values, by_block = launch.quantize(x, activation, codes=False)
    assert torch.equal(values[:, :k].float(), expected.float()) and not values[:, k:].any()
    assert torch.equal(by_block, expected_scale.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_at_the_edges_of_powers_of_two(dtype):
    x = beside_powers_of_two(dtype)
    codes, scale = ops.quantize_activation(x, activation=Activation.W8A8_UE8M0, backend="nvidia")
    expected, expected_scale = reference.quantize_activation(x, activation=Activation.W8A8_UE8M0)
    assert torch.equal(scale, expected_scale) and torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


def non_finite(dtype):
    """The cases of a dtype and their activations, one below the other, since a launch of the interpreter takes long."""
    found = [case for case in nonfinite.NON_FINITE if case.dtype == dtype]
    return found, torch.cat([nonfinite.activation(case) for case in found])


@pytest.mark.parametrize("activation", QUANTIZING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_any_nan_and_infinity(dtype, activation):
    found, x = non_finite(dtype)
    got = ops.quantize_activation(x, activation=activation, backend="nvidia")
    parts = zip(found, *(part.split(6) for part in (x, *got)), strict=True)
    wrong = {str(case): nonfinite.wrong_quantization(*rest, activation) for case, *rest in parts}
    assert len(wrong) >= 16 and {name: what for name, what in wrong.items() if what} == {}


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_any_nan_and_infinity(dtype, activation):
    (found, x), problem = non_finite(dtype), random_problem(0, (40,), 300)
    oracle = dataclasses.replace(problem, x=x).oracle(activation)
    packed = ops.pack_weight(problem.weight, problem.scale, backend="nvidia")
    out = ops.block_linear(x, packed, activation=activation)
    parts = zip(found, out.split(6), oracle.split(6), strict=True)
    assert {str(case): w for case, *rest in parts if (w := nonfinite.wrong_linear(case, *rest))} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bf16 off
@pytest.mark.parametrize(("widths", "k"), [((200, 72, 130), 300), ((1,), 1), ((256,), 256)])
def test_dequantize_is_bit_exact_nan_codes_included(widths, k, dtype):
    problem = random_problem(0, widths, k)
    problem.weight.view(torch.uint8)[0, 0] = 0xFF
    out = ops.dequantize_weight(problem.weight, problem.scale, problem.grid, dtype, backend="nvidia")
    expected = reference.dequantize_weight(problem.weight, problem.scale, problem.grid, dtype)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.nan_to_num(), expected.nan_to_num())


LINEARS = (
    (1, (200, 72), 300),
    (16, (256,), 1024),
    (17, (64,), 640),
    (64, (130, 126), 256),
    (130, (96,), 1),
    (70, (256,), 8),
)
"""(m, widths, k). The first, merged ragged shards, meets every dtype and activation, the others one of each."""


@pytest.mark.parametrize(
    ("m", "widths", "k", "dtype", "activation"), with_dtypes_and_activations(LINEARS, whole=LINEARS[:1])
)
def test_linear(m, widths, k, dtype, activation):
    problem = random_problem(m, widths, k, dtype=dtype, bias=True)
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, "nvidia")
    alone = ops.block_linear(problem.x, packed, None, activation)
    assert_exact(alone, dataclasses.replace(problem, bias=None), activation)
    assert_exact(ops.block_linear(problem.x, packed, problem.bias, activation), problem, activation)
    if dtype != torch.float32 and k > 1:
        assert_bias_before_rounding(
            lambda bias: alone if bias is None else ops.block_linear(problem.x, packed, bias, activation)
        )


LINES = [
    pytest.param(
        tile,
        split,
        activation,
        id=f"{tile.block_m}x{tile.block_n}-{split}-{activation}",
        marks=[] if (split == 1) == (activation is Activation.W8A8) else pytest.mark.long,
    )
    for lines, activation in ((shapes.QUANTIZED_LINES, Activation.W8A8), (shapes.LINES, Activation.W8A16))
    for tile in [tile for line in lines for tile in (line.tile, line.wide) if tile]
    for split in (1, 3)
]
"""What is multiplied does not change how stretches of K are added up: with each cut, one activation."""


@pytest.mark.parametrize(("tile", "split", "activation"), LINES)
def test_every_line_of_the_table_at_any_number_of_tokens(tile, split, activation):
    """A whole tile, and one more token; five blocks of K, of which a third stretch gets the one that is left."""
    problem = random_problem(tile.block_m + 1, (72, 56), 600)
    codes, scale, spans = backend.pack(problem.weight, problem.scale, problem.grid)
    cut = shapes.Cut(tile, split)
    for m in (tile.block_m, tile.block_m + 1):
        part = dataclasses.replace(problem, x=problem.x[:m])
        assert_exact(launch.linear(part.x, codes, scale, spans, activation, None, cut), part, activation)


def test_stretches_are_added_in_one_order_whoever_finishes_last(finished_last, monkeypatch):
    problem = random_problem(5, (256,), 1024, dtype=torch.float32)
    packed = backend.pack(problem.weight, problem.scale, problem.grid)
    cut = shapes.Cut(shapes.LINES[0].tile, 4)
    counted = []
    honest = launch.counters
    monkeypatch.setattr(launch, "counters", lambda *given: counted.append(honest(*given)) or counted[-1])
    bits = set()
    for order in (None, (3, 2, 1, 0), (2, 0, 3, 1)):
        finished_last(order)
        out = launch.linear(problem.x, *packed, Activation.W8A16, None, cut)
        assert_exact(out, problem, Activation.W8A16)
        bits.add(out.numpy().tobytes())
    assert len(bits) == 1
    assert len(counted) == 3 and not any(count.any() for count in counted), "counters are not zero again"


def test_a_stretch_that_is_lost_or_counted_wrongly_is_noticed(finished_last, monkeypatch):
    problem = random_problem(5, (256,), 1024, dtype=torch.float32)
    packed = backend.pack(problem.weight, problem.scale, problem.grid)
    cut = shapes.Cut(shapes.LINES[0].tile, 4)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # what is not written is not what an earlier launch left there
    finished_last((0, 1, 2, 2))
    faults = judge_exact(launch.linear(problem.x, *packed, Activation.W8A16, None, cut), problem, Activation.W8A16)
    assert faults.faults
    finished_last(None)
    # Somebody else's launch has counted: the sum is made before all stretches are there.
    monkeypatch.setattr(launch, "counters", lambda count, device: torch.ones(count, dtype=torch.int32))
    out = launch.linear(problem.x, *packed, Activation.W8A16, None, cut)
    assert judge_exact(out, problem, Activation.W8A16).faults


def test_a_token_alone_and_in_a_batch_has_the_same_bits():
    problem = random_problem(16, (200,), 700)
    packed = ops.pack_weight(problem.weight, problem.scale, backend="nvidia")
    for activation in Activation:
        together = ops.block_linear(problem.x, packed, None, activation)
        for row in (0, 7, 15):
            assert torch.equal(ops.block_linear(problem.x[row : row + 1], packed, None, activation)[0], together[row])


def test_extreme_scales_and_small_numbers_beside_large_ones():
    """Where the product of both scales leaves fp32, and where fp16 with one scale a group would lose what counts."""
    problem = random_problem(4, (128,), 256, dtype=torch.float32)
    x = problem.x * torch.tensor([1e-20, 1e-6, 1.0, 1e20])[:, None]
    for factor in (1e-20, 1e15):
        extreme = dataclasses.replace(problem, x=x, scale=problem.scale * factor)
        packed = ops.pack_weight(extreme.weight, extreme.scale, backend="nvidia")
        assert_exact(ops.block_linear(x, packed), extreme)
    weight = problem.weight.clone()
    weight.view(torch.uint8)[:, 0] = 0
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(1, 256, dtype=dtype)
        x[0, 0], x[0, 1] = 1.0, 2.0**-40  # the weight of the large one is zero
        hidden = dataclasses.replace(problem, x=x, weight=weight)
        packed = ops.pack_weight(weight, problem.scale, backend="nvidia")
        assert_exact(ops.block_linear(x, packed, None, Activation.W8A16), hidden, Activation.W8A16)


def test_three_parts_add_up_to_fp32():
    x = torch.randn(4096) * torch.exp2(torch.randint(-60, 60, (4096,)).float())
    x[:4] = torch.tensor([3.4028234663852886e38, -1.1754943508222875e-38, 1e-30, 0.0])

    @triton.jit
    def parts(x_ptr, out_ptr):
        at = tl.arange(0, 4096)
        x = tl.load(x_ptr + at)
        rest = linear.lower_part(x)
        tl.store(out_ptr + at, linear.upper_half(x))
        tl.store(out_ptr + 4096 + at, linear.upper_half(rest))
        tl.store(out_ptr + 2 * 4096 + at, linear.lower_part(rest))

    out = torch.empty(3, 4096)
    parts[(1,)](x, out)
    normal = x.abs() > 1e-30
    assert torch.equal(out.bfloat16().float()[:, normal], out[:, normal]), "a part is no bf16 number"
    assert torch.equal(out.double().sum(0).float()[normal], x[normal])


def test_the_packed_weight_is_the_checkpoint_s_own_bytes():
    problem = random_problem(0, (512,), 1024)
    packed = ops.pack_weight(problem.weight, problem.scale, backend="nvidia")
    codes, scale, spans = packed.tensors
    assert torch.equal(codes, problem.weight.view(torch.uint8)) and torch.equal(scale, problem.scale)
    assert packed.nbytes == 512 * 1024 * (1 + 4 / 128**2) + 8 * 4 and spans.tolist()[-1] == [384, 512]
    problem.weight.view(torch.uint8).zero_()
    assert codes.any(), "the packed weight is the checkpoint's memory"


def test_operators_are_traceable():
    problem = random_problem(3, (130, 70), 300)
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, "nvidia")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(backend.nvidia_block_linear, (problem.x, *packed.tensors, "w8a8"), test_utils=checks)
    torch.library.opcheck(backend.nvidia_quantize_activation, (problem.x, "w8a8"), test_utils=checks)
    codes = problem.weight.view(torch.uint8)
    operands = (codes, problem.scale, problem.grid.widths, torch.bfloat16)
    torch.library.opcheck(backend.nvidia_dequantize_weight, operands, test_utils=checks)


def test_bad_input_is_refused_before_any_launch(monkeypatch):
    problem = random_problem(2, (128,), 256)
    codes, scale, spans = ops.pack_weight(problem.weight, problem.scale, backend="nvidia").tensors

    def launched(*_, **__):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(launch, "kernels", launched)
    x = problem.x
    for bad, said in (
        ((x.double(), codes, scale, spans), "wrong dtype"),
        ((x[0], codes, scale, spans), "two dimensions"),
        ((x[:, :100], codes, scale, spans), "codes is not a packed weight's"),
        ((x, codes.to(torch.int8), scale, spans), "codes is not a packed weight's"),
        ((x, codes.T.contiguous().T, scale, spans), "strided"),
        ((x, codes, scale.half(), spans), "w_scale is not a packed weight's"),
        ((x, codes, scale, spans[:0]), "spans is not a packed weight's"),
    ):
        with pytest.raises(BlockFp8Error, match=said):
            backend.nvidia_block_linear(*bad, "w8a8")
    with pytest.raises(BlockFp8Error, match="wrong device"):
        triton_host.check_operand("x", x.to("meta"), (x.dtype,), codes.device)
    with pytest.raises(BlockFp8Error, match="groups of one size"):
        ops.quantize_activation(x, block_k=64, backend="nvidia")
    with pytest.raises(BlockFp8Error, match="blocks of 128x128"):
        ops.pack_weight(problem.weight, torch.rand(2, 4), BlockGrid((128,), 256, BlockSize(64, 64)), "nvidia")
    with pytest.raises(BlockFp8Error, match="64x64"):
        grid = BlockGrid((128,), 256, BlockSize(64, 64))
        ops.dequantize_weight(problem.weight, torch.rand(2, 4), grid, backend="nvidia")
