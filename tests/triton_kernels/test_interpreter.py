"""The kernels and the backend in upstream Triton's interpreter, against the specification."""

import dataclasses
import itertools
import os

import pytest

pytest.importorskip("triton", reason="upstream Triton lives in .venv-triton: `make test-triton`")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is chosen by TRITON_INTERPRET=1: `make test-triton`", allow_module_level=True)

import torch
import triton
import triton.language as tl

from benchmarks import triton_folded
from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import prefill
from qwen3_fp8_ascend.backends.triton import backend, launch
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
from qwen3_fp8_ascend.triton_kernels import block_linear, group_quantize, lanes
from tests.support.products import DTYPES, ONE_OF_EACH, with_dtypes_and_activations

FORMS = ("subnormals", "no-subnormals")


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Both forms of decoding."""
    monkeypatch.setenv(launch.KEEPS_SUBNORMALS_VARIABLE, "1" if request.param == "subnormals" else "0")
    launch.keeps_subnormals.cache_clear()
    yield request.param == "subnormals"
    launch.keeps_subnormals.cache_clear()


def wide_range(m, k, dtype):
    x = torch.randn(m, k) * torch.exp2(torch.randint(-14, 3, (m, k)).float())
    return (x * torch.logspace(-5, 3, max(m, 1))[:m, None]).to(dtype)


def random_weight(widths, k):
    grid = BlockGrid(tuple(widths), k)
    codes = torch.randint(0, 256, (grid.n, k), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    return codes.view(torch.float8_e4m3fn), torch.rand(grid.scale_shape) * 0.01 + 1e-4


@triton.jit
def _decode_all(lanes_ptr, out_ptr, KEEPS_SUBNORMALS: tl.constexpr):
    offset = tl.program_id(0) * 4096 + tl.arange(0, 4096)
    tl.store(out_ptr + offset, lanes.decode_lane(tl.load(lanes_ptr + offset), KEEPS_SUBNORMALS).to(tl.float32))


@pytest.mark.parametrize("subnormals", [False, True])
def test_every_lane_decodes_exactly_whatever_the_other_half_holds(subnormals):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    out = torch.empty(1 << 16)
    _decode_all[(16,)](every, out, KEEPS_SUBNORMALS=subnormals)
    expected = lanes.decode_lane_specification(every)
    finite = ~expected.isnan()
    assert torch.equal(out[finite], expected[finite]) and int(finite.sum()) == 254 * 256


def test_lanes_round_trip():
    codes = torch.randint(-128, 128, (40, 512), dtype=torch.int8)
    packed = lanes.pack_lanes(codes)
    assert packed.shape == (2, 40, 128) and torch.equal(lanes.unpack_lanes(packed), codes)
    assert torch.equal(packed[1, 7] & 0xFF, codes[7, 256:384].to(torch.int16) & 0xFF)
    assert torch.equal(packed[1, 7] >> 8, codes[7, 384:].to(torch.int16))


QUANTIZING = (Activation.W8A8, Activation.W8A8_UE8M0)


@pytest.mark.parametrize("activation", QUANTIZING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(0, 128), (1, 1), (3, 300), (33, 128)])
def test_quantize_is_bit_exact(m, k, dtype, activation):
    x = wide_range(m, k, dtype)
    if m > 2:
        x[0], x[1, 5], x[2, 6] = 0.0, float("nan"), float("-inf")
    codes, scale = ops.quantize_activation(x, activation=activation, backend="triton")
    expected, expected_scale = reference.quantize_activation(x, activation=activation)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale.view(torch.int32), expected_scale.view(torch.int32)) or torch.allclose(
        scale, expected_scale, rtol=0, atol=0, equal_nan=True
    )


def non_finite(dtype):
    """The cases of a dtype and their activations, one below the other, since a launch of the interpreter takes long."""
    found = [case for case in nonfinite.NON_FINITE if case.dtype == dtype]
    return found, torch.cat([nonfinite.activation(case) for case in found])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_at_the_edges_of_powers_of_two(dtype):
    x = beside_powers_of_two(dtype)
    codes, scale = ops.quantize_activation(x, activation=Activation.W8A8_UE8M0, backend="triton")
    expected, expected_scale = reference.quantize_activation(x, activation=Activation.W8A8_UE8M0)
    assert torch.equal(scale, expected_scale) and torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("activation", QUANTIZING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_any_nan_and_infinity(dtype, activation):
    found, x = non_finite(dtype)
    got = ops.quantize_activation(x, activation=activation, backend="triton")
    parts = zip(found, *(part.split(6) for part in (x, *got)), strict=True)
    wrong = {str(case): nonfinite.wrong_quantization(*rest, activation) for case, *rest in parts}
    assert len(wrong) >= 16 and {name: what for name, what in wrong.items() if what} == {}


def test_without_the_two_limits_these_cases_fail(monkeypatch):
    """Patterns that leave int32 when e4m3's rounding is added, and inf - inf in what fp16 leaves of fp32."""
    monkeypatch.setattr(group_quantize, "_INFINITY_BITS", tl.constexpr(0x7FFFFFFF))
    found, x = non_finite(torch.float32)
    parts = zip(found, *(part.split(6) for part in (x, *ops.quantize_activation(x, backend="triton"))), strict=True)
    wrong = {case.name for case, *rest in parts if nonfinite.wrong_quantization(*rest)}
    patterns = {"quiet-all", "signalling-all", "overflow"}
    assert wrong == patterns | {f"negative-{name}" for name in patterns}
    monkeypatch.setattr(group_quantize, "_FP16_MAX", tl.constexpr(float("inf")))
    values, _ = launch.group_values(torch.tensor([[float("inf")]]), 2, 1, 16)
    assert values[0, 0].isnan()


NON_FINITE_LINEARS = [
    pytest.param(
        through,
        dtype,
        activation,
        id=f"{through}-{str(dtype).removeprefix('torch.')}-{activation}",
        marks=[] if through == "scratch" or activation is Activation.W8A16 or one_of_each else pytest.mark.long,
    )
    for through, dtype, activation in itertools.product(("fused kernel", "scratch"), DTYPES, Activation)
    for one_of_each in [(dtype, activation) in ONE_OF_EACH]
]
"""Both ways multiply what one kernel makes of an x that is quantized: every dtype of those goes the faster one."""


@pytest.mark.parametrize(("through", "dtype", "activation"), NON_FINITE_LINEARS)
def test_linear_of_any_nan_and_infinity(through, dtype, activation):
    (found, x), (weight, scale) = non_finite(dtype), random_weight((40,), 300)
    scale = scale.clamp_min(1e-3)  # no weight is lost in the scratch
    oracle = reference.block_linear(x, weight, scale, activation=activation, compute_dtype=torch.float64)
    packed = ops.pack_weight(weight, scale, backend="triton")
    if through == "scratch":
        out = backend.through_scratch(x, *packed.tensors, 40, activation.value, None)
    else:
        out = ops.block_linear(x, packed, activation=activation)
    parts = zip(found, out.split(6), oracle.split(6), strict=True)
    assert {str(case): w for case, *rest in parts if (w := nonfinite.wrong_linear(case, *rest))} == {}


def test_quantize_ties_and_every_code():
    every = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (every[1:] + every[:-1]) / 2
    for values in (every, middles, torch.nextafter(middles, every[1:]), torch.nextafter(middles, every[:-1])):
        x = torch.cat([values, torch.tensor([448.0]), torch.zeros(127 - len(values))])[None]
        for signed in (x, -x):
            codes, scale = ops.quantize_activation(signed, backend="triton")
            expected, _ = reference.quantize_activation(signed)
            assert scale.item() == 1.0 and torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_values_match_their_specification(kind):
    x = wide_range(21, 384, torch.float32 if kind == 2 else torch.bfloat16)
    x[4], x[5, 3], x[6, 200] = 0.0, float("inf"), float("-inf")
    values, scale = launch.group_values(x, kind, 4, 32)
    expected, expected_scale = group_quantize.group_values_specification(x, 32, 4, kind)
    assert nonfinite.same_numbers(values, expected) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("widths", "k"), [((200, 72, 130), 300), ((1,), 1), ((256,), 256)])
def test_dequantize_is_bit_exact_nan_codes_included(widths, k, dtype, form):
    weight, scale = random_weight(widths, k)
    weight.view(torch.uint8)[0, 0] = 0xFF
    out = ops.dequantize_weight(weight, scale, BlockGrid(widths, k), dtype, backend="triton")
    expected = reference.dequantize_weight(weight, scale, BlockGrid(widths, k), dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


LINEARS = ((0, (128,), 128), (1, (200, 72), 300), (17, (64,), 640), (70, (96,), 1))
"""(m, widths, k): no token, merged ragged shards, two rows of tiles, and a K that is nearly all padding."""

LINEARS_OF_FORMS = [(form, *shape) for form in FORMS for shape in LINEARS]
# x is quantized by another kernel: every dtype and activation meets one shape in one form. No token costs nothing.
WHOLE = [shape for shape in LINEARS_OF_FORMS if shape[1] == 0 or shape == (FORMS[0], *LINEARS[1])]
# Every lane is decoded in both forms by a test of its own; here the second has to arrive, in one shape.
LONG = [(FORMS[1], *shape) for shape in LINEARS[2:]]


@pytest.mark.parametrize(
    ("form", "m", "widths", "k", "dtype", "activation"),
    with_dtypes_and_activations(LINEARS_OF_FORMS, WHOLE, LONG),
    indirect=["form"],
)
def test_linear(m, widths, k, dtype, activation, form):
    weight, scale = random_weight(widths, k)
    x = torch.randn(m, k).to(dtype)
    bias = torch.randn(sum(widths)).to(dtype)
    grid = BlockGrid(widths, k)
    packed = ops.pack_weight(weight, scale, grid, "triton")
    out = ops.block_linear(x, packed, None, activation)
    oracle = reference.block_linear(x, weight, scale, grid=grid, activation=activation, compute_dtype=torch.float64)
    assert out.shape == (m, sum(widths)) and out.dtype == dtype
    if m == 0:
        return
    if dtype == torch.float32:
        assert (out - oracle).norm() / oracle.norm() <= 1e-6
    else:
        assert (out == oracle.to(dtype)).float().mean() >= 0.995
    biased = ops.block_linear(x, packed, bias, activation)
    assert_exact(biased, Problem(x, weight, scale, bias, grid), activation)
    if dtype != torch.float32:
        assert_bias_before_rounding(lambda bias: out if bias is None else ops.block_linear(x, packed, bias, activation))


def test_linear_survives_extreme_scales(form):
    weight, scale = random_weight((128,), 256)
    x = torch.randn(4, 256) * torch.tensor([1e-20, 1e-6, 1.0, 1e20])[:, None]
    for factor in (1e-20, 1e15):
        packed = ops.pack_weight(weight, scale * factor, backend="triton")
        oracle = reference.block_linear(x, weight, scale * factor, compute_dtype=torch.float64)
        out = ops.block_linear(x, packed)
        assert ((out - oracle).norm(dim=1) <= 1e-6 * oracle.norm(dim=1)).all()


def test_fp32_activations_keep_their_precision_in_w8a16():
    """Without the residual pass fp16 alone would miss this by three orders of magnitude."""
    weight, scale = random_weight((128,), 256)
    x = torch.randn(8, 256)
    oracle = reference.block_linear(x, weight, scale, activation=Activation.W8A16, compute_dtype=torch.float64)
    out = ops.block_linear(x, ops.pack_weight(weight, scale, backend="triton"), None, Activation.W8A16)
    assert (out - oracle).norm() / oracle.norm() <= 1e-6


def test_split_k_adds_up_to_the_same():
    weight, scale = random_weight((256,), 1024)
    a, a_scale = group_quantize.group_values_specification(torch.randn(16, 1024), 16, 8, 0)
    packed, w_scale, _ = backend.pack(weight, scale, BlockGrid((256,), 1024))
    expected = block_linear.block_linear_specification(a, a_scale, packed, w_scale, 3)
    cut = launch.LinearShape(16, 128, 3, 16)
    out = launch.launch_linear(a, a_scale, packed, w_scale, cut, torch.float32, True)
    assert out.shape == (3, 16, 256) and (out - expected).norm() / expected.norm() <= 1e-6


def test_folded_kernel_matches_its_specification_and_the_oracle_less_well():
    weight, scale = random_weight((128,), 512)
    a, a_scale = group_quantize.group_values_specification(torch.randn(16, 512), 16, 4, 0)
    packed, w_scale, _ = backend.pack(weight[:128], scale, BlockGrid((128,), 512))
    packed, w_scale = packed[:, :128].contiguous(), w_scale[:, :128].contiguous()
    out = torch.empty(16, 128)
    triton_folded.block_linear_folded_kernel[(1,)](
        a, a_scale, packed, w_scale, out, 16, 128, 4, BLOCK_M=16, KEEPS_SUBNORMALS=True, DOT=tl.float32, CORES=1
    )
    folded = triton_folded.block_linear_folded_specification(a, a_scale, packed, w_scale)
    exact = block_linear.block_linear_specification(a, a_scale, packed, w_scale, 1)[0]
    assert (out - folded).norm() / folded.norm() <= 1e-6
    assert 1e-6 < (folded - exact).norm() / exact.norm() <= 5e-4


def test_packed_weight_is_one_byte_a_weight_and_a_scale_per_row():
    weight, scale = random_weight((512,), 1024)
    packed = ops.pack_weight(weight, scale, backend="triton")
    assert packed.nbytes == 512 * 1024 * (1 + 4 / 128) + 8
    lanes_there, w_scale, powers = packed.tensors
    for dtype in (torch.float32, torch.float16):
        scratch = torch.empty(512, 1024, dtype=dtype)
        launch.launch_packed_dequantize(lanes_there, w_scale * powers[0], scratch)
        # A power of two moves no rounding, but for fp16's subnormals, to which the scratch rounds once as well.
        assert torch.equal(
            scratch, (reference.dequantize_weight(weight, scale, dtype=torch.float32) * powers[0]).to(dtype)
        )


PREFILLS = ((65, (256,), 512), (65, (130, 62), 300), (130, (60, 100), 260))
"""(m, widths, k): whole blocks, ragged shards, a third tile of rows."""


@pytest.mark.parametrize(
    ("m", "widths", "k", "dtype", "activation"), with_dtypes_and_activations(PREFILLS, whole=PREFILLS[1:2])
)
def test_prefill_through_the_scratch(m, widths, k, dtype, activation, monkeypatch):
    """By the bound that has a name; on an NPU the operator itself takes this way beyond `HAND_OVER_ROWS`."""
    problem = random_problem(m, widths, k, dtype=dtype, bias=True)
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, "triton")
    monkeypatch.setattr(prefill, "stock_product", lambda x, w: (x.float() @ w.float().T).to(x.dtype))
    for bias in (None, problem.bias):
        got = backend.through_scratch(problem.x, *packed.tensors, sum(widths), activation.value, bias)
        assert_prefill(got, dataclasses.replace(problem, bias=bias), activation)


def test_operator_is_traceable():
    weight, scale = random_weight((128,), 256)
    packed = ops.pack_weight(weight, scale, backend="triton")
    torch.library.opcheck(
        backend.triton_block_linear,
        (torch.randn(3, 256), *packed.tensors, 128, "w8a8"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_probe_finds_subnormals_kept_here():
    assert launch.probe_subnormals(torch.device("cpu"))


def test_probe_notices_a_device_that_flushes(monkeypatch):
    """A device whose decoded subnormals come out as zero must fail the probe."""
    honest = launch.launch_linear

    def flushing(*arguments, **named):
        out = honest(*arguments, **named)
        return torch.where(out.abs() < 2.0**-6, 0.0, out)

    monkeypatch.setattr(launch, "launch_linear", flushing)
    assert not launch.probe_subnormals(torch.device("cpu"))


def test_bad_input_is_refused_before_any_launch(monkeypatch):
    weight, scale = random_weight((128,), 256)
    packed = ops.pack_weight(weight, scale, backend="triton")
    grid = BlockGrid((128,), 256)

    def launched(*_, **__):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(backend, "launch_linear", launched)
    x = torch.randn(2, 256)
    with pytest.raises(BlockFp8Error, match="wrong dtype"):
        backend.triton_block_linear(x.double(), *packed.tensors, 128, "w8a8")
    with pytest.raises(BlockFp8Error, match="two dimensions"):
        backend.triton_block_linear(x[0], *packed.tensors, 128, "w8a8")
    lanes_there, w_scale, powers = packed.tensors
    for bad in (
        (x[:, :100], lanes_there[:0], w_scale),
        (x, lanes_there.int(), w_scale),
        (x, lanes_there, w_scale.half()),
        (x, lanes_there.transpose(0, 1), w_scale),
        (x, lanes_there[:, :128].contiguous(), w_scale[:, :128].contiguous()),
        (torch.randn(2, 257), lanes_there, w_scale),
    ):
        with pytest.raises(BlockFp8Error, match="is not a packed weight's"):
            backend.triton_block_linear(*bad, powers, 128, "w8a8")
    with pytest.raises(BlockFp8Error, match="groups of one size"):
        ops.quantize_activation(x, block_k=64, backend="triton")
    with pytest.raises(BlockFp8Error, match="blocks of 128x128"):
        ops.pack_weight(weight, torch.rand(2, 4), BlockGrid((128,), 256, BlockSize(64, 64)), "triton")
    with pytest.raises(BlockFp8Error, match="wrong device"):
        backend.pack(weight, scale.to("meta"), grid)
    with pytest.raises(BlockFp8Error, match="32-bit"):
        launch.check_operand("x", torch.empty(1 << 16, 1 << 16, device="meta"), DTYPES, torch.device("meta"))
    monkeypatch.setenv(launch.KEEPS_SUBNORMALS_VARIABLE, "perhaps")
    launch.keeps_subnormals.cache_clear()
    with pytest.raises(BlockFp8Error, match="0 or 1"):
        launch.keeps_subnormals("cpu", None)
    launch.keeps_subnormals.cache_clear()
