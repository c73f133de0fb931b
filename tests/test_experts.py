"""Layers of experts: every backend against the oracle, what the operations refuse, and what others compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import available_backends, grouped, load_backend, select_backend
from qwen3_fp8_ascend.backends.registry import LOADED, Backend
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid
from qwen3_fp8_ascend.testing.expert_strategies import expert_problems
from qwen3_fp8_ascend.testing.experts import ExpertsProblem, assert_layer_exact, oracle, random_experts
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact

BACKENDS = [
    pytest.param(s.name, marks=pytest.mark.skipif(not s.usable, reason=f"{s.name}: {s.reason}"))
    for s in available_backends()
    if "cpu" in s.device_types and load_backend(s.name).pack_experts is not None
]


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes a backend's own layer away: what is left is the composition over its grouped linear."""

    def take_away(backend: str) -> None:
        monkeypatch.setitem(LOADED, backend, dataclasses.replace(load_backend(backend), block_experts=None))

    return take_away


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", Activation)
@settings(max_examples=40)
@given(problem=expert_problems())
def test_layer(backend: str, activation: Activation, problem: ExpertsProblem) -> None:
    assert_layer_exact(problem.layer(backend, activation), problem, activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", Activation)
@settings(max_examples=15)
@given(problem=expert_problems())
def test_layer_made_of_grouped_linears(backend: str, activation: Activation, problem: ExpertsProblem) -> None:
    w13, w2 = problem.pack(backend)
    if not problem.x.shape[0]:
        return  # answered by ops
    grouped_linear = load_backend(backend).grouped_linear
    assert grouped_linear is not None
    operands = problem.x.contiguous(), w13, w2, problem.topk_weights, problem.topk_ids, activation, problem.glu
    assert_layer_exact(grouped.block_experts(grouped_linear, *operands), problem, activation)


@pytest.mark.parametrize("activation", Activation)
@settings(max_examples=20)
@given(problem=expert_problems())
def test_the_specification_in_fp64_is_the_oracle(activation: Activation, problem: ExpertsProblem) -> None:
    """Written twice: by experts in the specification, by intervals in the judge."""
    want = oracle(problem, activation)
    tiny = 1e-300
    assert ((problem.reference(activation, torch.float64) - want.value).abs() <= want.error + tiny).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("counts", [(3, 0, 5, 1), (0, 0, 0, 0), (0, 40, 0, 0), (1, 1, 1, 1)])
def test_grouped_linear(backend: str, activation: Activation, counts: tuple[int, ...]) -> None:
    """Each expert's rows are its linear's; some rows behind belong to nobody."""
    p = random_experts(sum(counts) + 2, len(counts), 1, 200, 150, seed=sum(counts))
    w13, _ = p.pack(backend)
    ends = torch.tensor(counts).cumsum(0)
    y = ops.grouped_linear(p.x, w13, ends, activation)
    assert y.shape == (len(p.x), 300)
    for expert, (count, end) in enumerate(zip(counts, ends.tolist(), strict=True)):
        rows = slice(end - count, end)
        alone = Problem(p.x[rows], p.w13[expert], p.w13_scale[expert], None, p.w13_grid)
        assert_exact(y[rows], alone, activation)


def one_in_each_row(codes: torch.Tensor) -> torch.Tensor:
    """(experts, n, k) e4m3 codes, of which row i keeps the one in column i % k."""
    n, k = codes.shape[1:]
    kept = torch.arange(k) == torch.arange(n)[:, None] % k
    return codes.view(torch.uint8).where(kept, 0).view(codes.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own", [True, False])
def test_slots_are_added_in_their_order(backend: str, own: bool, composed: Callable[[str], None]) -> None:
    """One expert three times, with weights of 2^40, 1 and -2^40: what the middle one adds is lost, the last one not.

    Each weight row has one number: a product with more of them may have other bits in another row of a batch.
    """
    if not own:
        composed(backend)
    p = random_experts(1, 2, 3, 64, 96, dtype=torch.float32)
    p = dataclasses.replace(p, w13=one_in_each_row(p.w13), w2=one_in_each_row(p.w2))
    large = 2.0**40
    weights = torch.tensor([[large, 1.0, -large], [large, -large, 1.0], [0.0, 0.0, 1.0]])
    lost, kept, once = p.with_tokens(p.x.expand(3, 64), weights, torch.ones(3, 3, dtype=torch.long)).layer(backend)
    assert not lost.any() and once.any() and torch.equal(kept, once)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own", [True, False])
def test_nobody_adds_nothing_and_duplicates_add_up(backend: str, own: bool, composed: Callable[[str], None]) -> None:
    if not own:
        composed(backend)
    p = random_experts(4, 3, 2, 96, 64, dtype=torch.float32)
    ids = torch.tensor([[-1, -1], [2, -1], [-1, 2], [2, 2]])
    x = p.x[:1].expand(4, 96)
    nan = float("nan")
    weights = torch.tensor([[nan, nan], [0.5, nan], [float("inf"), 0.5], [0.25, 0.25]])
    out = p.with_tokens(x, weights, ids).layer(backend)
    assert not out[0].any() and out[1].any()
    assert torch.equal(out[1], out[2]) and torch.equal(out[1], out[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_routing_of_any_dtype_and_scales_in_bf16(backend: str) -> None:
    p = random_experts(5, 4, 2, 130, 70)
    p = dataclasses.replace(p, w13_scale=p.w13_scale.bfloat16(), w2_scale=p.w2_scale.bfloat16())
    weights = p.topk_weights.bfloat16()
    want = p.with_tokens(p.x, weights.float(), p.topk_ids.int()).layer(backend)
    assert torch.equal(want, p.with_tokens(p.x, weights, p.topk_ids.long()).layer(backend))
    strided = torch.empty(130, 5, dtype=p.x.dtype).t().copy_(p.x)
    ids = torch.stack([p.topk_ids, p.topk_ids], 2)[:, :, 0]
    assert torch.equal(want, p.with_tokens(strided, weights, ids).layer(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own", [True, False])
def test_nothing_to_do(backend: str, own: bool, composed: Callable[[str], None]) -> None:
    if not own:
        composed(backend)
    p = random_experts(3, 2, 2, 64, 32)
    w13, w2 = p.pack(backend)
    none = ops.block_experts(p.x[:0], w13, w2, p.topk_weights[:0], p.topk_ids[:0])
    assert none.shape == (0, 64)
    assert not ops.block_experts(p.x, w13, w2, p.topk_weights[:, :0], p.topk_ids[:, :0]).any()
    assert ops.grouped_linear(p.x[:0], w13, torch.zeros(2, dtype=torch.long)).shape == (0, 64)
    flat = random_experts(3, 2, 2, 64, 0)
    assert not flat.layer(backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_byte_a_weight_and_one_expert_at_a_time(backend: str) -> None:
    """A generator's weights are asked for one by one, and those of one expert are as those of a tensor."""
    p = random_experts(3, 4, 2, 256, 192)
    w13, _ = p.pack(backend)
    assert p.w13.numel() <= w13.nbytes <= 1.02 * p.w13.numel() + 32 * 4 * p.w13_scale.numel()
    given = []

    def one_by_one() -> Any:
        for expert in range(4):
            given.append(expert)
            yield p.w13[expert].clone()

    again = ops.pack_experts(one_by_one(), p.w13_scale, p.w13_grid, backend)
    assert given == [0, 1, 2, 3] and again.groups == 4
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(w13.tensors, again.tensors, strict=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_of_one_expert_is_a_linear_too(backend: str) -> None:
    p = random_experts(6, 1, 1, 100, 60)
    w13, _ = p.pack(backend)
    assert w13.groups == 1
    ends = torch.tensor([6])
    assert torch.equal(ops.block_linear(p.x, w13), ops.grouped_linear(p.x, w13, ends))
    assert_layer_exact(p.layer(backend), p)


GOOD = random_experts(3, 4, 2, 130, 70)


def _pack(**changes: Any) -> ops.PackedWeight:
    arguments: dict[str, Any] = {"weights": GOOD.w13, "scales": GOOD.w13_scale, "grid": GOOD.w13_grid}
    return ops.pack_experts(**(arguments | {"backend": "reference"} | changes))


def _with_nan(expert: int, row: int) -> torch.Tensor:
    weights = GOOD.w13.clone()
    weights.view(torch.uint8)[expert, row, 5] = 0xFF
    return weights


def _with_scale(value: float) -> torch.Tensor:
    scales = GOOD.w13_scale.clone()
    scales[2, 1, 0] = value
    return scales


NAMES = ("gate_proj", "up_proj")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": GOOD.w13[0]}, r"three dimensions[\s\S]*\(E, n, k\)"),
        ({"weights": GOOD.w13.float()}, "not block FP8"),
        ({"weights": GOOD.w13[:3]}, r"fewer weights than scales[\s\S]*expected: 4[\s\S]*got: 3"),
        ({"weights": iter(())}, "fewer weights than scales"),
        ({"weights": torch.cat([GOOD.w13, GOOD.w13])}, "more weights than scales"),
        ({"weights": [*GOOD.w13[:3], GOOD.w13[3, :, :-1]]}, "not the weight's"),
        ({"weights": _with_nan(2, 3), "names": NAMES}, r"experts.2.gate_proj.weight[\s\S]*1 NaN"),
        ({"weights": _with_nan(3, 139), "names": NAMES}, r"experts.3.up_proj.weight[\s\S]*1 NaN"),
        ({"scales": _with_scale(float("nan")), "names": NAMES}, r"experts.2.up_proj.weight_scale_inv[\s\S]*nan"),
        ({"scales": _with_scale(-1.0)}, "finite and non-negative"),
        ({"scales": GOOD.w13_scale[0]}, "three dimensions"),
        ({"scales": GOOD.w13_scale[:0]}, "at least one expert"),
        ({"scales": GOOD.w13_scale[:, :1]}, r"expected: \(2, 2\)"),
        ({"scales": GOOD.w13_scale.half()}, "scale dtype"),
        ({"grid": BlockGrid((70, 71), 130)}, "not the weight's"),
        ({"names": ("gate_proj",)}, "each shard has one name"),
        ({"activation": "static"}, "activation"),
        ({"backend": "nonsense"}, "unknown backend"),
    ],
)
def test_refused_weights(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BlockFp8Error, match=said):
        _pack(**changes)


def test_values_may_go_unchecked() -> None:
    assert _pack(weights=_with_nan(2, 3), scales=_with_scale(-1.0), check_values=False).groups == 4


def test_a_backend_without_experts_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = load_backend("cpu")
    without = dataclasses.replace(cpu, pack_experts=None, grouped_linear=None, block_experts=None)
    monkeypatch.setitem(LOADED, "cpu", without)
    select_backend.cache_clear()
    try:
        with pytest.raises(
            BlockFp8Error, match=r"'cpu' cannot be used here for experts[\s\S]*has no kernels for experts"
        ):
            _pack(backend="cpu")
        with pytest.raises(
            BlockFp8Error, match=r"no backend can run block-FP8 experts on cpu[\s\S]*no kernels for experts"
        ):
            _pack(backend=None)
    finally:
        monkeypatch.undo()
        select_backend.cache_clear()


def test_every_backend_says_what_it_has_for_experts() -> None:
    for status in available_backends():
        backend: Backend = load_backend(status.name)
        has = backend.grouped_linear is not None or backend.block_experts is not None
        assert has == (backend.pack_experts is not None), status.name


def _layer(backend: str = "reference", **changes: Any) -> torch.Tensor:
    w13, w2 = GOOD.pack(backend)
    operands = {"w13": w13, "w2": w2, "x": GOOD.x, "topk_weights": GOOD.topk_weights, "topk_ids": GOOD.topk_ids}
    return ops.block_experts(**(operands | {k: v(operands) if callable(v) else v for k, v in changes.items()}))


REFUSED_OPERANDS: list[tuple[dict[str, Any], str]] = [
    ({"x": GOOD.x[:, 1:]}, r"does not fit the experts[\s\S]*\(m, 130\)"),
    ({"x": GOOD.x[0]}, "does not fit the experts"),
    ({"x": GOOD.x.int()}, "activation dtype"),
    ({"x": GOOD.x.to("meta")}, "different devices"),
    ({"topk_ids": GOOD.topk_ids[:2]}, r"topk_ids has another shape[\s\S]*\(3, top_k\)"),
    ({"topk_ids": GOOD.topk_ids[:, 0]}, "topk_ids has another shape"),
    ({"topk_ids": GOOD.topk_ids.float()}, r"topk_ids has another dtype[\s\S]*int32, int64"),
    ({"topk_ids": GOOD.topk_ids.to("meta")}, "topk_ids is on another device"),
    ({"topk_weights": GOOD.topk_weights[:, :1]}, r"topk_weights has another shape[\s\S]*\(3, 2\)"),
    ({"topk_weights": GOOD.topk_ids}, "topk_weights has another dtype"),
    ({"topk_weights": GOOD.topk_weights.to_sparse()}, "topk_weights is sparse"),
    ({"w13": lambda o: o["w2"]}, "does not fit the experts"),
    ({"w2": lambda o: dataclasses.replace(o["w2"], groups=3)}, "differ in their experts"),
    ({"w2": lambda o: dataclasses.replace(o["w2"], backend="cpu")}, "differ in their backend"),
    ({"w2": lambda o: dataclasses.replace(o["w2"], grid=BlockGrid((131,), 70))}, "down projection does not fit"),
    ({"w13": lambda o: dataclasses.replace(o["w13"], grid=BlockGrid((140,), 130))}, "two shards of 70 rows"),
    ({"topk_ids": GOOD.topk_ids + 4}, r"an expert that there is not[\s\S]*from 0 to 3"),
    ({"topk_ids": GOOD.topk_ids - 6}, "an expert that there is not"),
    ({"activation": "static"}, "activation"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED_OPERANDS)
def test_refused_operands(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BlockFp8Error, match=said):
        _layer(**changes)


TAKEN_OPERANDS: list[dict[str, Any]] = [
    {},
    {"x": torch.stack([GOOD.x, GOOD.x], 2)[:, :, 0]},
    {"x": GOOD.x.float(), "activation": "w8a16"},
    {"x": GOOD.x[:0], "topk_weights": GOOD.topk_weights[:0], "topk_ids": GOOD.topk_ids[:0]},
    {"topk_weights": GOOD.topk_weights[:, :0], "topk_ids": GOOD.topk_ids[:, :0]},
    {"topk_weights": GOOD.topk_weights.bfloat16(), "topk_ids": GOOD.topk_ids.long()},
    {"topk_ids": torch.stack([GOOD.topk_ids, GOOD.topk_ids], 2)[:, :, 0]},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", [*TAKEN_OPERANDS, *(changes for changes, _ in REFUSED_OPERANDS)])
def test_without_gradients_the_same_is_computed_and_refused(backend: str, changes: dict[str, Any]) -> None:
    """A backend that checks its operands itself is asked before `ops` looks at them."""

    def outcome() -> torch.Tensor | str:
        try:
            return _layer(backend, **changes)
        except (BlockFp8Error, RuntimeError) as error:
            return f"{type(error).__name__}: {error}".partition("Exception raised from")[0]

    want = outcome()
    with torch.no_grad():
        got = outcome()
    if isinstance(got, torch.Tensor) and isinstance(want, torch.Tensor):
        assert got.shape == want.shape and torch.equal(got, want)
    else:
        assert got == want


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if "cpu" in backend.values])
@pytest.mark.parametrize("changes", [TAKEN_OPERANDS[i] for i in (0, 2, 3, 4)])
def test_a_backend_that_checks_its_operands_is_asked_at_once(
    backend: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = _layer(backend, **changes)
    monkeypatch.delattr("qwen3_fp8_ascend.ops.experts._checked_experts")
    with torch.no_grad():
        assert torch.equal(_layer(backend, **changes), want)
        with pytest.raises(NameError, match="_checked_experts"):
            _layer(backend, topk_weights=GOOD.topk_weights.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("ends", "error"),
    [
        (torch.tensor([0, 2, 1, 3]), (BlockFp8Error, RuntimeError)),
        (torch.tensor([0, 1, 2, 4]), (BlockFp8Error, RuntimeError)),
        (torch.tensor([-1, 1, 2, 3]), (BlockFp8Error, RuntimeError)),
        (torch.tensor([0, 1, 3]), BlockFp8Error),
        (torch.tensor([0, 1, 2, 3]).int(), BlockFp8Error),
    ],
)
def test_refused_ends(backend: str, ends: torch.Tensor, error: Any) -> None:
    w13, _ = GOOD.pack(backend)
    with pytest.raises(error, match="end"):
        ops.grouped_linear(GOOD.x, w13, ends)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("id_", [4, -2, 2**31 - 1, -(2**31)])
def test_ids_out_of_range_are_never_used(backend: str, id_: int) -> None:
    for dtype in (torch.int32, torch.int64):
        ids = GOOD.topk_ids.to(dtype, copy=True)
        ids[2, 1] = id_
        with pytest.raises((BlockFp8Error, RuntimeError), match=str(id_)):
            GOOD.with_tokens(GOOD.x, GOOD.topk_weights, ids).layer(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient(backend: str) -> None:
    w13, w2 = GOOD.pack(backend)
    x = GOOD.x.float().requires_grad_()
    weights = GOOD.topk_weights.clone().requires_grad_()
    calls = (
        lambda: ops.block_experts(x, w13, w2, GOOD.topk_weights, GOOD.topk_ids),
        lambda: ops.block_experts(x.detach(), w13, w2, weights, GOOD.topk_ids),
        lambda: ops.grouped_linear(x, w13, torch.tensor([1, 1, 2, 3])),
    )
    for call in calls:
        with pytest.raises(BlockFp8Error, match="computes no gradients"):
            call()
        with torch.inference_mode():
            call()


@pytest.mark.parametrize("own", [True, False])
def test_compiles_whole_and_the_cpu_layer_is_one_operator(own: bool, composed: Callable[[str], None]) -> None:
    if reason := load_backend("cpu").unusable():
        pytest.skip(reason)
    if not own:
        composed("cpu")
    torch._dynamo.reset()
    w13, w2 = GOOD.pack("cpu")
    seen: list[list[str]] = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        seen.append([str(node.target) for node in graph.graph.nodes if "qwen3_fp8_ascend" in str(node.target)])
        return graph

    def layer(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return ops.block_experts(x, w13, w2, weights, ids)

    with torch.no_grad():
        got = torch.compile(layer, backend=look, fullgraph=True)(GOOD.x, GOOD.topk_weights, GOOD.topk_ids)
        assert torch.equal(got, layer(GOOD.x, GOOD.topk_weights, GOOD.topk_ids))
        aot = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(aot(GOOD.x, GOOD.topk_weights, GOOD.topk_ids), got)
    [operators] = seen
    assert len(operators) == (1 if own else 3) and all("cpu_" in name for name in operators), operators
