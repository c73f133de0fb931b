"""The public operations: every backend against the oracle, and what they refuse."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import load_backend, select_backend
from qwen3_fp8_ascend.backends.registry import LOADED
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.validate.checks import judge
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, Activation, BlockGrid, BlockSize
from qwen3_fp8_ascend.testing.judges import (
    Problem,
    assert_bias_before_rounding,
    assert_exact,
    beside_powers_of_two,
    random_problem,
)
from qwen3_fp8_ascend.testing.strategies import activations, problems
from tests.support.devices import backends, device

BACKENDS = backends()
PLACE = device().place
"""The CPU, or what `pytest --device` names."""


def linear(problem: Problem, backend: str, activation: Activation = Activation.W8A8) -> torch.Tensor:
    problem = problem.to(PLACE)
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, backend)
    return ops.block_linear(problem.x, packed, problem.bias, activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", list(Activation))
@given(problem=problems())
def test_linear(backend: str, activation: Activation, problem: Problem) -> None:
    able = load_backend(backend)
    assume(activation in able.computes and able.unsupported(problem.grid.block) is None)
    got = linear(problem, backend, activation)
    assert judge(able, len(problem.x), got, problem, activation).faults == []


BLOCKS = tuple(BlockSize(*sizes) for sizes in ((64, 64), (128, 64), (64, 128), (1, 128), (48, 40), (32, 32), (256, 96)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("m", [1, 9, 70])
def test_blocks_of_another_size(backend: str, block: BlockSize, m: int) -> None:
    """Exactly, groups of activations included, or not at all: then the reason names the block."""
    able = load_backend(backend)
    problem = random_problem(m, (200, 64), 300, block=block, seed=m)
    if able.unsupported(block) is not None:
        with pytest.raises(BlockFp8Error, match=rf"(?s){backend}.*\b{block}\b"):
            linear(problem, backend)
        return
    for activation in able.computes:
        got = linear(problem, backend, activation)
        assert judge(able, m, got, problem, activation).faults == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 9, 70])
def test_bias_is_added_before_the_rounding(backend: str, m: int, dtype: torch.dtype, activation: Activation) -> None:
    if activation not in load_backend(backend).computes:
        pytest.skip(f"{backend} does not compute {activation}")
    # Ragged, so that a backend that hands whole blocks over computes sums with and without a bias in one way.
    problem = random_problem(m, (200, 64), 300, dtype=dtype, bias=True, seed=m).to(PLACE)
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, backend)
    assert_bias_before_rounding(lambda bias: ops.block_linear(problem.x, packed, bias, activation))
    assert problem.bias is not None
    wide = problem.bias.float() * 1.001  # a bias in fp32 is not rounded to the dtype of x
    assert_exact(
        ops.block_linear(problem.x, packed, wide, activation), dataclasses.replace(problem, bias=wide), activation
    )


def test_a_bias_added_after_the_rounding_is_noticed() -> None:
    problem = random_problem(9, (200,), 300, bias=True)
    sums = reference.block_linear(problem.x, problem.weight, problem.scale)
    with pytest.raises(AssertionError, match="added after it"):
        assert_bias_before_rounding(lambda bias: sums if bias is None else sums + bias)
    assert problem.bias is not None
    with pytest.raises(AssertionError, match="more than fp32 accumulation allows"):
        assert_exact(sums + problem.bias, problem)


QUANTIZING = (Activation.W8A8, Activation.W8A8_UE8M0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", QUANTIZING)
@given(x=activations(), block_k=st.sampled_from([128, 128, 64, 32]))
def test_quantize_activation(backend: str, activation: Activation, x: torch.Tensor, block_k: int) -> None:
    assume(activation in load_backend(backend).computes)
    assume(block_k == DEFAULT_BLOCK.k or load_backend(backend).unsupported(BlockSize(block_k, block_k)) is None)
    codes, scale = ops.quantize_activation(x.to(PLACE), block_k=block_k, activation=activation, backend=backend)
    want_codes, want_scale = reference.quantize_activation(x, block_k, activation)
    assert torch.equal(scale.cpu().view(torch.int32), want_scale.view(torch.int32))
    assert torch.equal(codes.view(torch.uint8).cpu(), want_codes.view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ops.ACTIVATION_DTYPES)
def test_scales_at_the_edges_of_powers_of_two(backend: str, dtype: torch.dtype) -> None:
    """A power of two stays, the next larger number goes up; the largest number of a group never overflows its code."""
    if Activation.W8A8_UE8M0 not in load_backend(backend).computes:
        with pytest.raises(BlockFp8Error, match="not w8a8-ue8m0"):
            ops.quantize_activation(torch.zeros(1, 128, device=PLACE), activation="w8a8-ue8m0", backend=backend)
        return
    x = beside_powers_of_two(dtype)
    assert_power_of_two_scales(x, *ops.quantize_activation(x.to(PLACE), activation="w8a8-ue8m0", backend=backend))


def assert_power_of_two_scales(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Without the specification: the scale is the smallest power of two that no code overflows with.

    Shapes: x (tokens, 128), whose first number is its largest; codes (tokens, 128), scale (tokens, 1).
    """
    scale, largest = scale.cpu()[:, 0].double(), x[:, 0].double()
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    assert (largest <= 448 * scale).all() and (largest > 448 * scale / 2).all()
    values = codes.view(torch.uint8).cpu().view(torch.float8_e4m3fn).double()
    exact = x.double() / scale[:, None]  # which a power of two leaves exact
    step = torch.exp2(torch.frexp(exact.abs().clamp_min(2.0**-6))[1].double() - 1 - 3)
    assert ((values - exact).abs() <= step / 2).all()


PLANTED_ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "down": lambda s: torch.exp2(torch.floor(torch.log2(s.double()))).float(),
    "to nearest": lambda s: torch.exp2(torch.round(torch.log2(s.double()))).float(),
    "up, powers of two too": lambda s: torch.exp2(torch.floor(torch.log2(s.double())) + 1).float(),
    "by a logarithm in fp32": lambda s: torch.exp2(torch.ceil(torch.log2(s))),
    "not at all": lambda s: s,
}


@pytest.mark.parametrize("rounding", PLANTED_ROUNDINGS)
def test_other_roundings_of_scales_are_noticed(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "round_up_to_power_of_two", PLANTED_ROUNDINGS[rounding])
    x = beside_powers_of_two(torch.float32)
    with pytest.raises(AssertionError):
        assert_power_of_two_scales(x, *reference.quantize_activation(x, activation=Activation.W8A8_UE8M0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_e8m0_scales_are_the_fp32_numbers_that_they_stand_for(backend: str) -> None:
    problem = random_problem(3, (96,), 160)
    scale = torch.tensor([[120, 115]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    upcast = dataclasses.replace(problem, scale=torch.tensor([[2.0**-7, 2.0**-12]]))
    want = linear(upcast, backend)
    packed = ops.pack_weight(problem.weight.to(PLACE), scale.to(PLACE), backend=backend)
    assert torch.equal(ops.block_linear(problem.x.to(PLACE), packed), want)
    bad = torch.tensor([[120, 255]], dtype=torch.uint8).view(scale.dtype)
    with pytest.raises(BlockFp8Error, match=r"\(0, 1\): nan"):
        ops.pack_weight(problem.weight.to(PLACE), bad.to(PLACE), backend=backend)


def test_a_backend_never_computes_another_activation_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(3, (96,), 160)
    packed = ops.pack_weight(problem.weight, problem.scale, backend="reference")
    less = dataclasses.replace(load_backend("reference"), computes=frozenset({Activation.W8A8}))
    monkeypatch.setitem(LOADED, "reference", less)
    for activation in (Activation.W8A16, Activation.W8A8_UE8M0):
        with pytest.raises(BlockFp8Error, match=f"'reference' does not compute {activation}"):
            ops.block_linear(problem.x, packed, activation=activation)
    with pytest.raises(BlockFp8Error, match="W8A16 does not quantize"):
        ops.quantize_activation(problem.x, activation="w8a16")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30)
@given(problem=problems(), dtype=st.sampled_from(ops.ACTIVATION_DTYPES))
def test_dequantize_weight(backend: str, problem: Problem, dtype: torch.dtype) -> None:
    assume(load_backend(backend).unsupported(problem.grid.block) is None)
    there = problem.to(PLACE)
    got = ops.dequantize_weight(there.weight, there.scale, there.grid, dtype, backend=backend)
    want = reference.dequantize_weight(problem.weight, problem.scale, problem.grid, dtype)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_dimensions_and_bf16_scales(backend: str) -> None:
    problem = random_problem(6, (96,), 160).to(PLACE)
    scale = problem.scale.bfloat16()
    packed = ops.pack_weight(problem.weight, scale, backend=backend)
    flat = ops.block_linear(problem.x, packed)
    assert torch.equal(ops.block_linear(problem.x.view(2, 3, 160), packed), flat.view(2, 3, 96))
    upcast = ops.block_linear(problem.x, ops.pack_weight(problem.weight, scale.float(), backend=backend))
    assert torch.equal(flat, upcast)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 3, 0), (0, 0), (64,)])
def test_empty_and_one_dimensional_activations(backend: str, shape: tuple[int, ...]) -> None:
    k = shape[-1]
    problem = random_problem(1, (40,), k).to(PLACE)
    packed = ops.pack_weight(problem.weight, problem.scale, backend=backend)
    out = ops.block_linear(torch.zeros(shape, device=PLACE), packed)
    assert out.shape == (*shape[:-1], 40) and not out.any()
    codes, scale = ops.quantize_activation(torch.zeros(shape, device=PLACE), backend=backend)
    assert codes.shape == shape and scale.shape == (*shape[:-1], -(-k // 128))


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_strided_in_every_dimension(backend: str) -> None:
    problem = random_problem(6, (40,), 130).to(PLACE)
    packed = ops.pack_weight(problem.weight, problem.scale, backend=backend)
    strided = torch.empty(130, 6, dtype=problem.x.dtype, device=PLACE).t().copy_(problem.x)
    assert torch.equal(ops.block_linear(strided, packed), ops.block_linear(problem.x, packed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_byte_a_weight(backend: str) -> None:
    problem = random_problem(0, (576, 192, 192), 1536).to(PLACE)
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, backend)
    # Triton: rows padded to tiles, and each scale once for each of its rows.
    padded, times = (1024 * 1536, 128 * 1024 / 960) if backend == "triton" else (problem.weight.numel() * 1.02, 32)
    assert packed.nbytes <= padded + times * problem.scale.numel() * 4 + 64
    assert packed.nbytes >= problem.weight.numel()


GOOD = random_problem(2, (40,), 130)


def _pack(**changes: object) -> object:
    arguments = {"weight": GOOD.weight, "scale": GOOD.scale, "backend": "reference"} | changes
    return ops.pack_weight(**arguments)  # type: ignore[arg-type]


def _with_code(code: int) -> torch.Tensor:
    weight = GOOD.weight.clone()
    weight.view(torch.uint8)[3, 5] = code
    return weight


def _with_scale(value: float) -> torch.Tensor:
    scale = GOOD.scale.clone()
    scale[0, 1] = value
    return scale


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight": GOOD.weight.bfloat16()}, "not block FP8"),
        ({"weight": GOOD.weight[0]}, "two dimensions"),
        ({"weight": _with_code(0x7F)}, r"1 NaN of 5200"),
        ({"weight": _with_code(0xFF)}, r"1 NaN of 5200"),
        ({"scale": GOOD.scale[:, :1]}, r"expected: \(1, 2\)"),
        ({"scale": GOOD.scale.half()}, "scale dtype"),
        ({"scale": _with_scale(float("nan"))}, r"\(0, 1\): nan"),
        ({"scale": _with_scale(float("inf"))}, r"\(0, 1\): inf"),
        ({"scale": _with_scale(-1.0)}, r"\(0, 1\): -1"),
        ({"grid": BlockGrid((30, 11), 130)}, r"block grid is not the weight's: its shards are \(30, 11\)"),
        ({"grid": "cpu"}, "no BlockGrid"),
        ({"grid": BlockGrid((40,), 128)}, r"expected: \(40, 130\)"),
        ({"names": ["q", "k"]}, "each shard has one name"),
        ({"names": ["model.q"], "weight": _with_code(0xFF)}, r"where:\s+model.q.weight\b"),
        ({"names": ["model.q"], "scale": _with_scale(-1.0)}, r"where:\s+model.q.weight_scale_inv"),
        ({"scale": GOOD.scale.to_sparse()}, "scale is sparse"),
        ({"backend": "nonsense"}, "unknown backend 'nonsense'"),
        ({"activation": "static"}, "activation mode"),
    ],
)
def test_refused_weights(changes: dict, said: str) -> None:
    with pytest.raises(BlockFp8Error, match=said):
        _pack(**changes)


@pytest.mark.parametrize(
    ("x", "bias", "said"),
    [
        (GOOD.x[:, :-1], None, r"expected: \(..., 130\)"),
        (GOOD.x.int(), None, "activation dtype"),
        (torch.tensor(1.0), None, "at least one dimension"),
        (GOOD.x, torch.zeros(41), r"expected: \(40,\)"),
        (GOOD.x.to_sparse(), None, "the activation is sparse"),
        (GOOD.x, torch.ones(40).to_sparse(), "the bias is sparse"),
    ],
)
def test_refused_activations(x: torch.Tensor, bias: torch.Tensor | None, said: str) -> None:
    with pytest.raises(BlockFp8Error, match=said):
        ops.block_linear(x, _pack(), bias)  # type: ignore[arg-type]


def _outcome(x: torch.Tensor, packed: ops.PackedWeight, bias: torch.Tensor | None, activation: Activation) -> Any:
    try:
        return ops.block_linear(x, packed, bias, activation)
    except BlockFp8Error as error:
        return str(error)


def _strided(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([t, t], dim=-1)[..., 0]


ACTIVATIONS_IN_SOME_FORM: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda x: x,
    "rows apart": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "numbers apart": _strided,
    "one dimension": lambda x: x[0] if len(x) else x.new_zeros(x.shape[1]),
    "three dimensions": lambda x: x[None],
    "three, rows apart": lambda x: torch.stack([x, x], dim=1)[:, :1],
    "three, turned": lambda x: torch.stack([x, -x]).transpose(0, 1),
    "three, a column less": lambda x: x[None, :, 1:],
    "three, fp64": lambda x: x[None].double(),
    "three, sparse": lambda x: x[None].to_sparse(),
    "four, none": lambda x: x.new_empty(2, 0, 3, x.shape[1]),
    "no row": lambda x: x[:0],
    "a column less": lambda x: x[:, 1:],
    "int32": lambda x: x.int(),
    "fp64": lambda x: x.double(),
    "sparse": lambda x: x.to_sparse(),
    "on no device": lambda x: x.to("meta"),
}
BIASES_IN_SOME_FORM: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "none": lambda b: None,
    "as it is": lambda b: b,
    "numbers apart": _strided,
    "fp64": lambda b: b.double(),
    "one more": lambda b: torch.cat([b, b.new_zeros(1)]),
    "two dimensions": lambda b: b[None],
    "sparse": lambda b: b.to_sparse(),
    "on no device": lambda b: b.to("meta"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x_form", ACTIVATIONS_IN_SOME_FORM)
@pytest.mark.parametrize("bias_form", BIASES_IN_SOME_FORM)
def test_without_gradients_the_same_is_computed_and_refused(backend: str, x_form: str, bias_form: str) -> None:
    """A backend that checks its operands itself is asked before `ops` looks at them."""
    for m, n, k, activation in (
        (2, 40, 130, Activation.W8A8),
        (1, 0, 64, Activation.W8A16),
        (3, 40, 0, Activation.W8A8),
    ):
        problem = random_problem(m, (n,), k).to(PLACE)
        packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, backend)
        x = ACTIVATIONS_IN_SOME_FORM[x_form](problem.x)
        bias = BIASES_IN_SOME_FORM[bias_form](torch.ones(n, device=PLACE))
        want = _outcome(x, packed, bias, activation)
        with torch.no_grad():
            got = _outcome(x, packed, bias, activation)
        assert got == want if isinstance(want, str) else got.shape == want.shape and torch.equal(got, want)


@pytest.mark.skipif(PLACE.type != "cpu", reason="of the backends on this device none checks its operands itself")
@pytest.mark.parametrize(("m", "n", "k"), [(2, 40, 130), (0, 40, 64), (2, 0, 64), (2, 40, 0)])
def test_a_backend_that_checks_its_operands_is_asked_at_once(
    m: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = random_problem(m, (n,), k)
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, "cpu")
    want = ops.block_linear(problem.x, packed)
    monkeypatch.delattr("qwen3_fp8_ascend.ops.dense._checked_linear")
    with torch.no_grad():
        assert torch.equal(ops.block_linear(problem.x, packed), want)
        with pytest.raises(NameError, match="_checked_linear"):
            ops.block_linear(problem.x.double(), packed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_k", [0, -1, 1 << 63, 1 << 70, 128.0, "128", True, None])
def test_refused_group_sizes(backend: str, block_k: object) -> None:
    with pytest.raises(BlockFp8Error, match="block_k must be a positive integer"):
        ops.quantize_activation(GOOD.x.to(PLACE), block_k=block_k, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_may_be_wider_than_anything(backend: str) -> None:
    if backend == "triton" or backend.startswith("nvidia"):
        with pytest.raises(BlockFp8Error, match="groups of one size"):
            ops.quantize_activation(GOOD.x.to(PLACE), block_k=(1 << 63) - 1, backend=backend)
        return
    codes, scale = ops.quantize_activation(GOOD.x.to(PLACE), block_k=(1 << 63) - 1, backend=backend)
    want_codes, want_scale = reference.quantize_activation(GOOD.x, GOOD.x.shape[1])
    assert torch.equal(scale.cpu(), want_scale)
    assert torch.equal(codes.view(torch.uint8).cpu(), want_codes.view(torch.uint8))


def operations(
    backend: str, place: torch.device = PLACE
) -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """Each operation as a function of its floating-point operands alone, and such operands."""
    p = random_problem(5, (130, 70), 300, dtype=torch.float32, bias=True).to(place)
    packed = ops.pack_weight(p.weight, p.scale, p.grid, backend)
    assert p.bias is not None
    return {
        "block_linear": (lambda x, bias: ops.block_linear(x, packed, bias), (p.x, p.bias)),
        "block_linear w8a16": (lambda x, bias: ops.block_linear(x, packed, bias, Activation.W8A16), (p.x, p.bias)),
        "quantize_activation": (lambda x: ops.quantize_activation(x, backend=backend), (p.x,)),
        "dequantize_weight": (
            lambda scale: ops.dequantize_weight(p.weight, scale, p.grid, torch.float32, backend=backend),
            (p.scale,),
        ),
    }


OPERATIONS = list(operations("reference", torch.device("cpu")))


def same(got: Any, want: Any) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True)
    )


def total(f: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    def scalar(*operands: torch.Tensor) -> torch.Tensor:
        out = f(*operands)
        return (out if isinstance(out, torch.Tensor) else out[1]).sum()

    return scalar


WAYS_TO_ASK_FOR_A_GRADIENT: dict[str, Callable[[Callable[..., Any], torch.Tensor], Any]] = {
    "backward": lambda f, x: total(f)(x.clone().requires_grad_()).backward(),
    "func.grad": lambda f, x: torch.func.grad(total(f))(x),
    "func.vjp": lambda f, x: torch.func.vjp(f, x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "compiled": lambda f, x: torch.compile(f, backend="eager", fullgraph=True)(x.clone().requires_grad_()),
    "compiled func.grad": lambda f, x: torch.compile(torch.func.grad(total(f)), backend="eager", fullgraph=True)(x),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("way", WAYS_TO_ASK_FOR_A_GRADIENT)
def test_no_operation_is_silently_without_a_gradient(backend: str, operation: str, way: str) -> None:
    """All backends alike, for each operand. Where torch.compile traces, the error comes wrapped in one of torch's."""
    torch._dynamo.reset()
    f, operands = operations(backend)[operation]
    for position, operand in enumerate(operands):

        def of_one(t: torch.Tensor, position: int = position) -> Any:
            return f(*operands[:position], t, *operands[position + 1 :])

        wanted = Exception if "compiled" in way else BlockFp8Error
        with pytest.raises(wanted, match=r"block FP8 computes no gradients[\s\S]*torch.inference_mode\(\)"):
            WAYS_TO_ASK_FOR_A_GRADIENT[way](of_one, operand)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_tensors_that_require_them_are_taken(backend: str, operation: str, mode: Any) -> None:
    f, operands = operations(backend)[operation]
    with mode():
        got = f(*(t.clone().requires_grad_() for t in operands))
    assert same(got, f(*operands))


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("gradients", [True, False])
def test_compiles_whole(backend: str | None, operation: str, gradients: bool) -> None:
    """From nothing: the choice of a backend looks at files and environment, which is no part of a graph."""
    torch._dynamo.reset()
    select_backend.cache_clear()
    f, operands = operations(backend)[operation]  # type: ignore[arg-type]
    with torch.set_grad_enabled(gradients):
        assert same(torch.compile(f, backend="aot_eager", fullgraph=True)(*operands), f(*operands))
