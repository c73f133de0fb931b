"""The CPU kernels on every instruction set of this machine: exact decoding and quantization, linear, misuse."""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import PackedWeight, cpu
from qwen3_fp8_ascend.format import Activation, BlockGrid, BlockSize, ceil_div
from qwen3_fp8_ascend.testing.judges import Problem, assert_bias_before_rounding, assert_exact, random_problem
from tests.support.cpu_levels import DTYPES, instruction_set, lacking, needs_cpu_backend

pytestmark = needs_cpu_backend

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 33, 70, 130)
RAGGED = (576, 192, 192)
"""SmolLM2's q, k and v: 4.5, 1.5 and 1.5 blocks."""


@pytest.fixture(params=cpu.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; those this machine lacks are skipped."""
    name = request.param
    if reason := lacking(name):
        pytest.skip(reason)
    with instruction_set(name):
        yield name


def pack(problem: Problem) -> PackedWeight:
    return ops.pack_weight(problem.weight, problem.scale, problem.grid, "cpu")


def linear(problem: Problem, activation: Activation = Activation.W8A8) -> torch.Tensor:
    return ops.block_linear(problem.x, pack(problem), problem.bias, activation)


def assert_same_numbers(got: torch.Tensor, want: torch.Tensor) -> None:
    """Bit for bit, except that any NaN equals any NaN."""
    same = got.view(BITS[got.dtype]) == want.view(BITS[want.dtype])
    assert (same | (got.isnan() & want.isnan())).all()


def decode_through_linear(weight: torch.Tensor, m: int) -> torch.Tensor:
    """The weight as the kernels see it: unit vectors times its transpose, `m` rows at a time."""
    k = weight.shape[1]
    grid_scale = torch.ones(ceil_div(weight.shape[0], 128), ceil_div(k, 128))
    # Not through ops, which refuses NaN codes.
    grid = BlockGrid((weight.shape[0],), k)
    packed = PackedWeight("cpu", grid, cpu.BACKEND.pack(weight, grid_scale, grid))
    return torch.cat([ops.block_linear(rows, packed, None, Activation.W8A16) for rows in torch.eye(k).split(m)]).T


@pytest.mark.parametrize("m", [1, 2, 5, 16, 40])
def test_decodes_every_code(isa: str, m: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F]
    weight = torch.stack([finite.roll(i) for i in range(40)]).view(torch.float8_e4m3fn)
    assert torch.equal(decode_through_linear(weight, m), weight.float())


@pytest.mark.parametrize("m", [1, 2, 5, 16, 40])
def test_nan_codes_poison_their_row_only(isa: str, m: int) -> None:
    weight = torch.full((70, 36), 0x38, dtype=torch.uint8)
    weight[3, 7], weight[66, 30] = 0x7F, 0xFF
    got = decode_through_linear(weight.view(torch.float8_e4m3fn), m)
    poisoned = torch.zeros(70, 36, dtype=torch.bool)
    poisoned[3], poisoned[66] = True, True  # 0 * NaN is NaN
    assert torch.equal(got.isnan(), poisoned)
    assert (got[~poisoned] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantizes_every_code(isa: str, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).repeat(1, 2)[:, :201].contiguous()
    weight, scale = codes.view(torch.float8_e4m3fn), torch.tensor([[0.37, 1e-3]])
    got = ops.dequantize_weight(weight, scale, dtype=dtype, backend="cpu")
    assert_same_numbers(got, reference.dequantize_weight(weight, scale, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
# The fixture sets the same instruction set for all examples.
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    k=st.integers(1, 300),
    block_k=st.sampled_from([128, 128, 64, 7, 1, 300]),
    activation=st.sampled_from([Activation.W8A8, Activation.W8A8_UE8M0]),
)
def test_quantizes_any_bits(
    isa: str, dtype: torch.dtype, data: st.DataObject, k: int, block_k: int, activation: Activation
) -> None:
    """Random bit patterns: subnormals, infinities, NaN of any payload, both zeros."""
    kind = "int32" if dtype == torch.float32 else "int16"
    x = torch.from_numpy(data.draw(arrays(kind, (2, k)))).view(dtype)
    codes, scale = ops.quantize_activation(x, block_k=block_k, activation=activation, backend="cpu")
    want_codes, want_scale = reference.quantize_activation(x, block_k, activation)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
    assert_same_numbers(scale, want_scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizes_halfway_cases(isa: str, dtype: torch.dtype) -> None:
    """Every multiple of 2^-10 up to 448 in a group whose scale is 1, and every midpoint of two codes."""
    steps = torch.cat([torch.arange(0, 2**13) * 2.0**-10, torch.arange(0, 448 * 4) * 0.25])
    groups = steps.to(dtype).view(-1, 64)
    x = torch.cat([torch.full((groups.shape[0], 1), 448.0, dtype=dtype), groups, -groups], 1)
    codes, scale = ops.quantize_activation(x, block_k=129, backend="cpu")
    want_codes, want_scale = reference.quantize_activation(x, 129)
    assert torch.equal(scale, want_scale) and (scale == 1).all()
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))


@functools.cache
def every_bf16_quotient() -> torch.Tensor:
    """Groups of 128: every significand of a bf16 number as the largest, with all numbers down to 2^-19 of it.

    Both signs of each. Then all numbers down to 2^-19 of 1e-10, below which the scale stays as it is. Shape
    (groups, 128). Other exponents divide alike.
    """
    below_two = torch.arange(0x3F80 - 19 * 128, 0x4000, dtype=torch.int16).view(torch.bfloat16)
    numbers = torch.nn.functional.pad(below_two, (0, -len(below_two) % 127)).view(1, -1, 127)
    largest = below_two[-128:].view(-1, 1, 1)
    groups = torch.where(numbers <= largest, numbers, 0)
    least = int(torch.tensor(1e-10, dtype=torch.bfloat16).view(torch.int16))
    floored = torch.arange(least - 19 * 128, least + 128, dtype=torch.int16).view(torch.bfloat16)
    with_largest = torch.cat([largest.expand(-1, numbers.shape[1], 1), groups], 2)
    return torch.cat([with_largest.reshape(-1, 128), -with_largest.reshape(-1, 128), floored.view(-1, 128)])


@pytest.mark.parametrize("activation", [Activation.W8A8, Activation.W8A8_UE8M0])
def test_quantizes_every_quotient_of_bf16_numbers(isa: str, activation: Activation) -> None:
    """By themselves, and inside a linear, whose weight here is a unit matrix."""
    x = every_bf16_quotient()
    codes, scale = ops.quantize_activation(x, activation=activation, backend="cpu")
    want_codes, want_scale = reference.quantize_activation(x, 128, activation)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
    unit = ops.pack_weight(torch.eye(128).to(torch.float8_e4m3fn), torch.ones(1, 1), backend="cpu")
    got = ops.block_linear(x, unit, None, activation)
    assert torch.equal(got, (want_codes.float() * want_scale).to(torch.bfloat16))


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_merged_ragged_shards(isa: str, dtype: torch.dtype, m: int, activation: Activation) -> None:
    problem = random_problem(m, RAGGED, 576, dtype=dtype, seed=m)
    assert_exact(linear(problem, activation), problem, activation)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("m", [1, 2, 6, 19, 40])
@pytest.mark.parametrize(("widths", "k"), [((1,), 1), ((33,), 5), ((100, 7), 131), ((130,), 390)])
def test_linear_of_ragged_edges(isa: str, widths: tuple[int, ...], k: int, m: int, activation: Activation) -> None:
    for dtype in DTYPES:
        problem = random_problem(m, widths, k, dtype=dtype, bias=True, seed=k)
        assert_exact(linear(problem, activation), problem, activation)


@pytest.mark.parametrize("m", [1, 5, 33])
@pytest.mark.parametrize("block", [BlockSize(32, 4), BlockSize(64, 64), BlockSize(100, 200), BlockSize(256, 1024)])
def test_linear_of_other_block_sizes(isa: str, block: BlockSize, m: int) -> None:
    k = min(500, 17 * block.k)  # the oracle goes block by block
    problem = random_problem(m, (250, 90), k, dtype=torch.float32, block=block)
    for activation in Activation:
        assert_exact(linear(problem, activation), problem, activation)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 9, 40])
def test_bias_is_added_to_the_fp32_sums(isa: str, m: int, dtype: torch.dtype, activation: Activation) -> None:
    problem = random_problem(m, (200,), 256, dtype=dtype, bias=True)
    packed = pack(problem)
    if dtype != torch.float32:
        assert_bias_before_rounding(lambda bias: ops.block_linear(problem.x, packed, bias, activation))
    assert problem.bias is not None
    # Of any dtype, and not rounded to that of x. It is read in one place, whatever m and the path are.
    for bias_dtype in (*DTYPES, torch.float64) if m == 9 else (torch.float32,):
        bias = (problem.bias.double() * 1.001).to(bias_dtype)
        got = ops.block_linear(problem.x, packed, bias, activation)
        assert_exact(got, dataclasses.replace(problem, bias=bias), activation)


@pytest.mark.parametrize("m", [1, 3, 20])
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_go_where_the_reference_sends_them(
    isa: str, dtype: torch.dtype, activation: Activation, m: int
) -> None:
    problem = random_problem(m, (96,), 300, dtype=dtype)
    problem.weight.view(torch.uint8)[5, :] = 0
    problem.x[0, 17] = float("inf")
    if m > 2:
        problem.x[1, 200], problem.x[2, 3] = float("nan"), -float("inf")
    got = linear(problem, activation)
    want = reference.block_linear(problem.x, problem.weight, problem.scale, activation=activation)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf()) and torch.equal(got[got.isinf()], want[want.isinf()])


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("m", [1, 4, 20])
@pytest.mark.parametrize("exponent", [-130, -100, -60, 0, 60, 100])
def test_magnitudes_to_the_ends_of_fp32(isa: str, exponent: int, m: int, activation: Activation) -> None:
    """Neither the kernels' powers of two nor bf16 arithmetic, which flushes subnormals, may show."""
    problem = random_problem(m, (64,), 260, dtype=torch.float32)
    scaled = Problem(problem.x * 2.0**exponent, problem.weight, problem.scale * 2.0 ** (-exponent // 2))
    if exponent == -130:
        scaled = Problem(scaled.x, problem.weight, problem.scale * 2.0**80)
    assert_exact(linear(scaled, activation), scaled, activation)


@pytest.mark.parametrize("activation", list(Activation))
def test_batch_and_threads_do_not_change_bits(isa: str, activation: Activation) -> None:
    problem = random_problem(70, (192, 96, 96), 700)  # enough for two threads, also one row
    packed = pack(problem)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([ops.block_linear(problem.x[:m], packed, None, activation) for m in (1, 2, 5, 20, 70)])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(results[0][3], results[0][4][:20])  # m = 20 and 70 share a kernel on every level
    shuffled = ops.block_linear(problem.x[:70].flip(0).contiguous(), packed, None, activation)
    assert torch.equal(shuffled.flip(0), results[0][4])


def test_rows_may_lie_apart(isa: str) -> None:
    problem = random_problem(20, (96,), 300)
    wide = torch.zeros(20, 512, dtype=problem.x.dtype)
    wide[:, 100:400] = problem.x
    packed = pack(problem)
    want = ops.block_linear(problem.x, packed)
    assert torch.equal(ops.block_linear(wide[:, 100:400], packed), want)
    assert torch.equal(ops.block_linear(problem.x.T.contiguous().T, packed), want)
    same = ops.block_linear(problem.x[:1].expand(5, 300), packed)
    assert torch.equal(same, ops.block_linear(problem.x[:1].repeat(5, 1), packed))


def test_long_batches_are_taken_in_passes(isa: str) -> None:
    problem = random_problem(700, (40,), 64, dtype=torch.float32)
    for activation in Activation:
        assert_exact(linear(problem, activation), problem, activation)


@pytest.mark.parametrize(("n", "k"), [(0, 64), (64, 0), (0, 0)])
def test_empty_sizes(isa: str, n: int, k: int) -> None:
    bias = torch.randn(n).bfloat16()
    packed = ops.pack_weight(
        torch.zeros(n, k).to(torch.float8_e4m3fn), torch.ones(ceil_div(n, 128), ceil_div(k, 128)), backend="cpu"
    )
    got = ops.block_linear(torch.ones(3, k, dtype=torch.bfloat16), packed, bias)
    assert torch.equal(got, bias.expand(3, n))


def test_one_byte_a_weight() -> None:
    problem = random_problem(1, (1024, 512), 2048)
    packed = pack(problem)
    codes, scales, panels = packed.tensors
    assert codes.numel() == codes.untyped_storage().nbytes() == 1536 * 2048
    assert packed.nbytes - codes.numel() == 4 * (scales.numel() + panels.numel()) < 0.001 * codes.numel()


def test_compiles_whole_with_dynamic_rows() -> None:
    problem = random_problem(40, (96, 40), 300, bias=True)
    packed = pack(problem)

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(ops.block_linear(x * 2, packed, problem.bias))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (1, 7, 40):
        assert torch.equal(compiled(problem.x[:m]), step(problem.x[:m]))


def test_operators_agree_with_their_fakes() -> None:
    problem = random_problem(3, (40,), 36, bias=True)
    codes, scales, panels = pack(problem).tensors
    operators = torch.ops.qwen3_fp8_ascend
    checks = ("test_schema", "test_faketensor")
    arguments = (problem.x, codes, scales, panels, problem.bias, 40, 36, 128, 1)
    torch.library.opcheck(operators.cpu_block_linear.default, arguments, test_utils=checks)
    torch.library.opcheck(operators.cpu_quantize_activation.default, (problem.x, 128, 2), test_utils=checks)
    rows = torch.zeros(40, dtype=torch.int32)
    arguments = (problem.weight.view(torch.uint8), problem.scale, rows, 128, torch.bfloat16)
    torch.library.opcheck(operators.cpu_dequantize_weight.default, arguments, test_utils=checks)


def _misuses() -> dict[str, tuple[dict[str, object], str]]:
    bad_row = torch.tensor([[0, 32, 0, 0], [31, 8, 0, 0]], dtype=torch.int32)
    bad_scale = torch.tensor([[0, 32, 0, 0], [32, 8, 9, 0]], dtype=torch.int32)
    return {
        "x of another k": ({"x": torch.zeros(2, 35).bfloat16()}, r"x must have shape \(m, 36\)"),
        "x of one dimension": ({"x": torch.zeros(36).bfloat16()}, "x must have 2 dimensions"),
        "x of fp64": ({"x": torch.zeros(2, 36).double()}, "x must be bfloat16"),
        "x transposed": ({"x": torch.zeros(36, 2).bfloat16().T}, "x must be contiguous in its last"),
        "too few codes": ({"codes": torch.zeros(1, 36, 32, dtype=torch.uint8)}, "codes must have shape"),
        "float codes": ({"codes": torch.zeros(2, 36, 32)}, "codes must be uint8"),
        "strided codes": ({"codes": torch.zeros(2, 72, 32, dtype=torch.uint8)[:, ::2]}, "codes must be contiguous"),
        "scales of another width": ({"scales": torch.ones(1, 2)}, "scales must have 1 columns"),
        "scales of fp64": ({"scales": torch.ones(1, 1).double()}, "scales must be float32"),
        "overlapping panels": ({"panels": bad_row}, "panel 1 is wrong"),
        "a scale row beyond": ({"panels": bad_scale}, "panel 1 names scale row 9"),
        "panels of int64": ({"panels": torch.zeros(2, 4, dtype=torch.int64)}, "panels must be int32"),
        "another n": ({"n": 41}, "the panels hold 40 rows, expected 41"),
        "a negative k": ({"k": -36}, "must not be negative"),
        "a block of 6": ({"block_k": 6}, "multiple of 4"),
        "an unknown quantization": ({"quantization": 3}, r"quantization must be 0 \(none\), 1 .* got 3"),
        "a block of 0": ({"block_k": 0}, "multiple of 4"),
        "a bias of fp64": ({"bias": torch.zeros(40).double()}, "bias must be bfloat16, float16 or float32"),
        "a short bias": ({"bias": torch.zeros(39).bfloat16()}, "bias must be contiguous and have 40"),
    }


@pytest.mark.parametrize("misuse", _misuses())
def test_direct_misuse_raises(misuse: str) -> None:
    problem = random_problem(2, (40,), 36)
    codes, scales, panels = pack(problem).tensors
    good: dict[str, object] = {
        "x": problem.x,
        "codes": codes,
        "scales": scales,
        "panels": panels,
        "bias": None,
        "n": 40,
        "k": 36,
        "block_k": 128,
        "quantization": 1,
    }
    change, message = _misuses()[misuse]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qwen3_fp8_ascend.cpu_block_linear(**{**good, **change})


def test_direct_misuse_of_the_other_operators_raises() -> None:
    operators = torch.ops.qwen3_fp8_ascend
    weight = torch.zeros(40, 36, dtype=torch.uint8)
    panels = torch.tensor([[0, 32, 0, 0], [32, 8, 0, 0]], dtype=torch.int32)
    codes = torch.zeros(2, 36, 32, dtype=torch.uint8)
    for arguments in ((weight.float(), panels, codes), (weight[:39], panels, codes), (weight, panels, codes[:1])):
        with pytest.raises(RuntimeError, match=r"must|panel"):
            operators.cpu_pack(*arguments)
    with pytest.raises(RuntimeError, match="block_k must be positive"):
        operators.cpu_quantize_activation(torch.zeros(1, 4), 0, 1)
    with pytest.raises(RuntimeError, match="quantization must be 1 or 2"):
        operators.cpu_quantize_activation(torch.zeros(1, 4), 128, 0)
    with pytest.raises(RuntimeError, match=r"scale_rows\[39\] is 1 of 1"):
        rows = torch.zeros(40, dtype=torch.int32)
        rows[39] = 1
        operators.cpu_dequantize_weight(weight, torch.ones(1, 1), rows, 128, torch.float32)
    with pytest.raises(RuntimeError, match="instruction set 9"):
        operators.cpu_set_isa(9)


def _in_new_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_environment_variable_lowers_the_instruction_set() -> None:
    code = "from qwen3_fp8_ascend.backends import cpu; print(cpu.BACKEND.unusable(), cpu.isa())"
    assert _in_new_process(code, **{cpu.ENVIRONMENT_VARIABLE: "portable"}) == "None portable"


@pytest.mark.parametrize(("value", "message"), [("sse9", "is unknown"), ("avx512", "is not available")])
def test_wrong_instruction_set_is_reported(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, value)
    monkeypatch.setattr(cpu, "isas", lambda: ("portable", "avx2"))
    reason = cpu._choose_isa()
    assert reason is not None and message in reason and "portable, avx2" in reason


def test_missing_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LIBRARY", cpu.LIBRARY.with_name("_absent.so"))
    reason = cpu.unusable.__wrapped__()
    assert reason is not None and "was not built; reinstall" in reason


def test_a_library_of_older_sources_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        torch.library.register_fake("qwen3_fp8_ascend::cpu_of_tomorrow", lambda: None)

    monkeypatch.setattr(cpu.cpu_fakes, "register", absent)
    reason = cpu.unusable.__wrapped__()
    assert reason is not None and "is older than this package" in reason and "cpu_of_tomorrow" in reason


def test_only_torch_runs_threads() -> None:
    """The library links no OpenMP runtime of its own: a second one would fight over the cores."""
    needed = subprocess.run(["readelf", "-d", str(cpu.LIBRARY)], capture_output=True, text=True, check=True).stdout
    libraries = [line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line]
    assert "libtorch_cpu.so" in libraries
    assert not [name for name in libraries if "omp" in name or "python" in name or name == "libtorch_python.so"]
