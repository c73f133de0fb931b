"""Many rows on an NPU without FP8: what is rounded, what cannot overflow, and whose memory the scratch is."""

import weakref
from collections.abc import Callable

import pytest
import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends import e4m3, prefill, torch_npu
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing import judges, nonfinite
from qwen3_fp8_ascend.testing.judges import Problem, assert_prefill, random_problem, rel_l2

SHAPES = [(65, (512,), 1024), (65, (576, 192, 192), 576), (512, (256,), 2048), (70, (40,), 130), (65, (130, 62), 300)]
FP32 = torch.finfo(torch.float32)


@pytest.fixture(autouse=True)
def product(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The product as the cube's documentation has it, the same on every processor: fp32 sums, rounded once."""

    def documented(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x.float() @ weight.float().T).to(x.dtype)

    monkeypatch.setattr(prefill, "stock_product", documented)
    monkeypatch.setattr(torch_npu, "_has_fp8_matmul", lambda: False)
    return documented


def linear(problem: Problem, activation: Activation = Activation.W8A8) -> torch.Tensor:
    """What a backend does beyond its hand-over, from the pieces in this module; `torch_npu` decodes."""
    x = problem.x
    codes, scales, powers = torch_npu.pack(problem.weight, problem.scale, problem.grid)
    weight = prefill.scratch(*codes.shape, x)
    weight.copy_((e4m3.decode(codes).unflatten(1, (-1, 128)) * (scales * powers[0]).unsqueeze(-1)).flatten(1))
    if activation is Activation.W8A16:
        operand, grow = prefill.normalise_rows(x)
    else:
        operand, grow = prefill.normalise_groups(*e4m3.quantize_values(x, 128, activation), x)
    return prefill.multiply(operand, weight, len(codes), grow * powers[1], problem.bias, x.dtype)


def linear_of_bf16_operands(problem: Problem, activation: Activation) -> torch.Tensor:
    """Both operands rounded to bf16 instead: what this did until it was normalised."""
    x = problem.x
    if activation is not Activation.W8A16:
        values, scale = e4m3.quantize_values(x, 128, activation)
        x = (values * scale.unsqueeze(-1)).flatten(1)[:, : x.shape[1]].to(x.dtype)
    weight = reference.dequantize_weight(problem.weight, problem.scale, problem.grid, x.dtype)
    return (x.float() @ weight.float().T).to(x.dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", nonfinite.BITS)
@pytest.mark.parametrize(("m", "widths", "k"), SHAPES)
def test_linear(
    m: int, widths: tuple[int, ...], k: int, dtype: torch.dtype, activation: Activation, bias: bool
) -> None:
    problem = random_problem(m, widths, k, dtype=dtype, bias=bias)
    got = linear(problem, activation)
    assert got.is_contiguous()
    assert_prefill(got, problem, activation)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize(("m", "widths", "k"), SHAPES[:3])
def test_several_times_more_exact_than_bf16_operands(
    m: int, widths: tuple[int, ...], k: int, activation: Activation
) -> None:
    """Before the results themselves are rounded, which is 1.66e-3 of either's error, and by the judge."""
    problem = random_problem(m, widths, k)
    oracle = problem.oracle(activation)
    new, old = linear(problem, activation), linear_of_bf16_operands(problem, activation)
    own = rel_l2(oracle.bfloat16(), oracle)
    added = [(rel_l2(y, oracle) ** 2 - own**2) ** 0.5 for y in (new, old)]
    assert added[0] <= judges.PREFILL_FP16 and added[1] >= 3 * added[0]
    equal = [float((y == oracle.bfloat16()).double().mean()) for y in (new, old)]
    assert equal[0] >= judges.PREFILL_FP16_EQUAL and equal[1] <= 0.65
    with pytest.raises(AssertionError):
        assert_prefill(old, problem, activation)


def test_the_judge_notices_w8a16_for_w8a8_and_one_wrong_element() -> None:
    problem = random_problem(65, (256,), 512)
    with pytest.raises(AssertionError):
        assert_prefill(linear(problem, Activation.W8A16), problem, Activation.W8A8)
    got = linear(problem)
    got[3, 5] *= 1.05
    with pytest.raises(AssertionError, match="an element is off"):
        assert_prefill(got, problem)


@pytest.mark.parametrize("bits", [0, 9])
def test_powers(bits: int) -> None:
    largest = torch.cat(
        [torch.exp2(torch.arange(-149, 128).float()), torch.logspace(-30, 30, 400), torch.ones(1) * 448]
    )
    largest = torch.cat([largest, torch.nextafter(largest, torch.tensor(0.0)), torch.zeros(1)])
    shrink, grow = prefill._powers(largest, bits)
    assert (
        (shrink * grow == 1).all() and (shrink >= FP32.smallest_normal).all() and (grow >= FP32.smallest_normal).all()
    )
    assert (torch.frexp(shrink).mantissa == 0.5).all()
    normal = (largest >= FP32.smallest_normal) & (largest < 2.0 ** (126 - bits))
    normalised = (largest.double() * 2**bits * shrink.double())[normal]
    assert (normalised < 1).all() and (normalised >= 0.5).all()
    special = torch.tensor([float("inf"), float("nan")])
    assert all(power.isfinite().all() for power in prefill._powers(special, bits))


def largest_problem(k: int, sign: float = 1.0) -> Problem:
    """Every operand as large as normalisation lets it be: codes 448 and scales just below a power of two."""
    below = float(torch.nextafter(torch.tensor(2.0), torch.tensor(0.0)))
    weight = torch.full((128, k), 448.0).to(torch.float8_e4m3fn)
    x = torch.full((1, k), sign * 65280.0, dtype=torch.bfloat16)  # just below 2^16
    return Problem(x, weight, torch.full((1, -(-k // 128)), below))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("k", [32768, prefill.MAX_COLUMNS])
def test_the_largest_sums_do_not_overflow(k: int, activation: Activation, sign: float) -> None:
    problem = largest_problem(k, sign)
    got, oracle = linear(problem, activation), problem.oracle(activation)
    assert got.isfinite().all() and rel_l2(got, oracle) <= 2**-8


def test_a_few_columns_more_would_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is tight: 0.875 * 0.996 * k passes 65520 here, and the result, 4e12, would be infinite."""
    assert prefill.fits(1, prefill.MAX_COLUMNS) and not prefill.fits(1, prefill.MAX_COLUMNS + 128)
    k = prefill.MAX_COLUMNS + 4 * 128
    monkeypatch.setattr(prefill, "MAX_COLUMNS", k)  # or the weight would be refused
    assert linear(largest_problem(k), Activation.W8A16).isinf().all()


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("exponents", [(0, 0), (100, -100), (-20, 90), (60, 50), (-20, -60), (3, -100)])
def test_any_magnitude(exponents: tuple[int, int], activation: Activation) -> None:
    """Rows and weights of very different sizes; plain fp16 operands would be infinite or zero."""
    problem = random_problem(65, (200,), 300, seed=2)
    # A bf16 row or a scale moved by a power of two moves the result by it.
    moved = Problem(problem.x * 2.0 ** exponents[0], problem.weight, problem.scale * 2.0 ** exponents[1])
    assert torch.equal(linear(moved, activation), linear(problem, activation) * 2.0 ** sum(exponents))


@pytest.mark.parametrize("activation", list(Activation))
def test_rows_do_not_notice_each_other(activation: Activation) -> None:
    problem = random_problem(65, (200,), 300)
    alone = linear(problem, activation)
    x = problem.x.clone()
    x[1:] *= 2.0**40
    assert torch.equal(linear(Problem(x, problem.weight, problem.scale), activation)[0], alone[0])


def test_beyond_the_range_of_the_powers_results_are_not_finite() -> None:
    """Never a finite number that is wrong: a row and a weight whose largest magnitudes have a product beyond 2^127."""
    problem = random_problem(65, (200,), 300)
    moved = Problem(problem.x * 2.0**100, problem.weight, problem.scale * 2.0**40)
    assert not linear(moved, Activation.W8A16).isfinite().any()


def test_zero_rows_and_zero_weights() -> None:
    problem = random_problem(65, (200,), 300)
    x = problem.x.clone()
    x[3] = 0
    for activation in Activation:
        got = linear(Problem(x, problem.weight, problem.scale), activation)
        assert not got[3].any() and torch.equal(got[4], linear(problem, activation)[4])
        assert not linear(Problem(x, problem.weight, torch.zeros_like(problem.scale)), activation).any()


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("case", nonfinite.NON_FINITE, ids=str)
def test_nan_and_infinities(case: nonfinite.NonFinite, activation: Activation) -> None:
    weight = random_problem(0, (200,), 300)
    x = nonfinite.activation(case)
    problem = Problem(x, weight.weight, weight.scale.clamp_min(float(weight.scale.max()) / 16))
    assert nonfinite.wrong_linear(case, linear(problem, activation), problem.oracle(activation)) == []


def test_an_infinity_times_a_weight_that_is_lost_is_nan() -> None:
    """The one place where an infinity does not come out as specified: 0 stands for a weight 2^25 times too small."""
    code = torch.tensor([0x38, 0x01], dtype=torch.uint8).expand(128, 2).contiguous().view(torch.float8_e4m3fn)
    x = torch.tensor([[1.0, float("inf")]], dtype=torch.bfloat16)
    for smaller, expected in ((1.0, float("inf")), (2.0**-20, float("nan"))):
        codes = torch.nn.functional.pad(code.view(torch.uint8), (0, 126)).view(torch.float8_e4m3fn)
        weight = torch.cat([codes, codes]).contiguous()
        scale = torch.tensor([[1.0], [smaller]])
        out = linear(Problem(torch.nn.functional.pad(x, (0, 126)), weight, scale), Activation.W8A16)
        assert out[0, 0].isposinf() and torch.equal(out[0, 128:].isnan(), torch.full((128,), expected != expected))


def test_bf16_without_bias_takes_a_shorter_way_to_the_same_bits() -> None:
    problem = random_problem(65, (512,), 1024)
    zero = Problem(problem.x, problem.weight, problem.scale, torch.zeros(512))
    assert torch.equal(linear(problem).view(torch.int16), linear(zero).view(torch.int16))


@pytest.mark.parametrize(("k", "columns", "n", "rows"), [(128, 128, 64, 64), (100, 128, 60, 64)])
def test_the_product_ignores_padding(k: int, columns: int, n: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((5, k), (rows, columns), (n,)))
    weight[:, k:] = 0
    got = prefill.multiply(x, weight, n, torch.full((5, 1), 4.0), bias, torch.float32)
    torch.testing.assert_close(got, 4 * x @ weight[:n, :k].T + bias, rtol=0, atol=1e-3)
    assert got.is_contiguous()


def test_layers_on_two_streams_do_not_share_memory(monkeypatch: pytest.MonkeyPatch, product: Callable) -> None:
    """Whatever runs between a layer's decoding and its product, as another stream may, leaves its scratch alone."""
    first, second = random_problem(65, (256,), 512, seed=1), random_problem(65, (384,), 512, seed=2)
    alone = [linear(first), linear(second)]
    between: list[torch.Tensor] = []

    def interrupted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(prefill, "stock_product", product)
        between.append(linear(second))
        return product(x, weight)

    monkeypatch.setattr(prefill, "stock_product", interrupted)
    assert torch.equal(linear(first), alone[0]) and torch.equal(between[0], alone[1])

    # A buffer that all streams share would fail this.
    shared = torch.empty(1 << 20, dtype=torch.uint8)
    monkeypatch.setattr(prefill, "stock_product", interrupted)
    monkeypatch.setattr(prefill, "scratch", lambda n, k, x: shared[: 2 * n * k].view(torch.float16).view(n, k))
    assert not torch.equal(linear(first), alone[0])


def test_the_scratch_is_gone_when_the_call_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[weakref.ref[torch.Tensor]] = []
    honest = prefill.scratch

    def watched(rows: int, columns: int, x: torch.Tensor) -> torch.Tensor:
        out = honest(rows, columns, x)
        taken.append(weakref.ref(out))
        assert out.numel() * out.itemsize == prefill.scratch_bytes(rows, columns) and out.is_contiguous()
        return out

    monkeypatch.setattr(prefill, "scratch", watched)
    out = linear(random_problem(65, (256,), 512))
    assert len(taken) == 1 and taken[0]() is None and out.isfinite().all()


def test_the_largest_weights_do_not_use_it() -> None:
    assert prefill.fits(25600 * 2, 5120)  # gate and up of a 32B model
    assert not prefill.fits(151936, 4096)  # an output head
