"""The CPU's layer of experts on every instruction set: exact, stage by stage, with bits that depend on nothing else."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import cpu
from qwen3_fp8_ascend.format import Activation, BlockSize
from qwen3_fp8_ascend.glu import SILU, Glu
from qwen3_fp8_ascend.testing.expert_strategies import GLUS, expert_problems
from qwen3_fp8_ascend.testing.experts import ExpertsProblem, Interval, assert_layer_exact, oracle, random_experts
from tests.backends.test_cpu_determinism import OTHERS
from tests.support.cpu_levels import ACTIVATIONS, DTYPES, ISAS, instruction_set, needs_cpu_backend, same_bits, threads

pytestmark = needs_cpu_backend

Packed = tuple[ops.PackedWeight, ops.PackedWeight]


def layer(p: ExpertsProblem, packed: Packed, activation: Activation) -> torch.Tensor:
    return ops.block_experts(p.x, *packed, p.topk_weights, p.topk_ids, activation, p.glu)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25)
@given(problem=expert_problems())
def test_layer_of_any_shape(isa: str, activation: Activation, problem: ExpertsProblem) -> None:
    with instruction_set(isa):
        assert_layer_exact(problem.layer("cpu", activation), problem, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_layer_of_many_tokens(isa: str, activation: Activation, dtype: torch.dtype) -> None:
    """Experts with no rows, one, a few, and more than any kernel takes at once (`Kernels::max_rows`)."""
    p = random_experts(620, 6, 3, 136, 200, dtype=dtype, seed=3)
    p.topk_ids[:, 0] = 1
    p.topk_ids[:, 1:] = -1
    p.topk_ids[:40, 1] = torch.arange(40) % 3 + 2
    p.topk_ids[7, 2] = 5
    with instruction_set(isa):
        assert_layer_exact(p.layer("cpu", activation), p, activation)


@functools.cache
def qwen3_30b_a3b(m: int) -> tuple[ExpertsProblem, Packed, Interval]:
    """Its hidden and intermediate sizes, with a few of its experts, and the oracle of its layer."""
    p = random_experts(m, 6, 6, 2048, 768, seed=m)
    return p, p.pack("cpu"), oracle(p)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [1, 20])
def test_layer_of_qwen3_30b_a3b(isa: str, m: int) -> None:
    p, packed, want = qwen3_30b_a3b(m)
    with instruction_set(isa):
        assert_layer_exact(layer(p, packed, Activation.W8A8), p, want=want)


def exp_as_the_kernels_do(x: torch.Tensor) -> torch.Tensor:
    """e^x by the steps of csrc/cpu/runs.h, each rounded to fp32."""
    f = torch.tensor
    bounded = torch.where(x > 89, f(89.0), x)
    bounded = torch.where(bounded < -80, f(-80.0), bounded)
    exponent = (bounded * f(1.44269504) + f(12582912.0)) - f(12582912.0)
    rest = (bounded - exponent * f(0.693359375)) - exponent * f(-2.12194440e-4)
    power = rest * f(1 / 5040) + f(1 / 720)
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        power = power * rest + f(coefficient)
    return torch.ldexp(power, exponent.nan_to_num().int() - 1) * 2


def silu_as_the_kernels_do(gate: torch.Tensor) -> torch.Tensor:
    return gate / (1 + exp_as_the_kernels_do(-gate))


def test_the_exponential_is_right_to_an_ulp() -> None:
    x = torch.cat([torch.linspace(-80, 88.72, 400_001), torch.randn(100_000), torch.linspace(-1e-3, 1e-3, 10_001)])
    want = x.double().exp()
    ulp = torch.exp2(want.log2().floor() - 23)
    assert float(((exp_as_the_kernels_do(x).double() - want).abs() / ulp).max()) <= 1.5


def identity_experts(dtype: torch.dtype) -> tuple[ExpertsProblem, Packed]:
    """One expert with a gate that is x, up projection 1 from a second column, and down that gives it back."""
    one = 0x38  # the code of 1
    w13 = torch.zeros(1, 2, 2, dtype=torch.uint8)
    w13[0, 0, 0] = w13[0, 1, 1] = one
    w2 = torch.zeros(1, 2, 1, dtype=torch.uint8)
    w2[0, 0, 0] = one
    ones = torch.ones(1, 2, 1), torch.ones(1, 1, 1)
    empty = torch.zeros(0, 1)
    p = ExpertsProblem(
        torch.zeros(0, 2, dtype=dtype),
        w13.view(torch.float8_e4m3fn),
        ones[0],
        w2.view(torch.float8_e4m3fn),
        ones[1],
        empty,
        empty.long(),
    )
    return p, p.pack("cpu")


@pytest.mark.parametrize("isa", ISAS)
def test_silu_has_the_same_bits_on_every_instruction_set(isa: str) -> None:
    """Seen through a layer that passes numbers on: every bf16 number that is finite, and fp32 numbers of all sizes."""
    generator = torch.Generator().manual_seed(0)
    bf16 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    numbers = {
        torch.bfloat16: bf16[bf16.isfinite()],
        torch.float32: torch.randn(5000, generator=generator)
        * torch.exp2(torch.rand(5000, generator=generator) * 9 - 2),
    }
    for dtype, gate in numbers.items():
        p, packed = identity_experts(dtype)
        x = torch.stack([gate, torch.ones_like(gate)], 1)
        if dtype == torch.bfloat16:
            x = x[gate.float().abs() < 2.0**100]  # a larger one would leave the 1 beside it too small to be kept
        with instruction_set(isa):
            out = layer(
                p.with_tokens(x, torch.ones(len(x), 1), torch.zeros(len(x), 1).long()), packed, Activation.W8A16
            )
        want = silu_as_the_kernels_do(x[:, 0].float()).to(dtype)
        kept = want.abs() >= torch.finfo(dtype).smallest_normal
        assert same_bits(out[kept, 0], want[kept])
        assert (out[~kept, 0].abs() <= torch.finfo(dtype).smallest_normal).all()


def product_as_the_kernels_do(gate: torch.Tensor, up: torch.Tensor, glu: Glu) -> torch.Tensor:
    if glu == SILU:
        return up * silu_as_the_kernels_do(gate)
    x = gate.clamp(max=glu.gate_limit)
    inner = x + glu.cubic * (x * x * x) if glu.cubic else x
    act = x / (1 + exp_as_the_kernels_do(-(glu.alpha * inner)))
    return act.clamp(max=glu.act_limit) * (up.clamp(-glu.up_limit, glu.up_limit) + glu.beta)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("glu", dict.fromkeys(GLUS), ids=str)
def test_the_product_alone_is_that_of_the_layer(isa: str, glu: Glu) -> None:
    """glu(gate, up) as an operator, for parts of layers: the same bits, and rows that lie within wider ones."""
    generator = torch.Generator().manual_seed(0)
    for dtype, columns in ((torch.bfloat16, 66), (torch.float16, 130), (torch.float32, 2)):
        wide = (torch.randn(700, columns + 40, generator=generator) * 8).to(dtype)
        h = wide[:, 20:-20]
        gate, up = h.float().chunk(2, 1)
        want = product_as_the_kernels_do(gate, up, glu).to(dtype)
        for count in (1, 3):
            with instruction_set(isa), threads(count):
                assert same_bits(cpu.glu_product(h, glu), want)
                assert cpu.glu_product(h[:0], glu).shape == (0, columns // 2)
    with pytest.raises(RuntimeError, match="as many columns of gate as of up, got 3"):
        cpu.glu_product(torch.zeros(2, 3), glu)


def by_parts(p: ExpertsProblem, packed: Packed, activation: Activation) -> torch.Tensor:
    """The layer from its parts, of which each is judged by itself: grouped linears, quantization, silu, sums."""
    (m, top_k), experts = p.topk_ids.shape, p.w2.shape[0]
    flat = torch.where(p.topk_ids < 0, experts, p.topk_ids).flatten()
    order = flat.sort(stable=True).indices
    ends = torch.bincount(flat, minlength=experts + 1)[:experts].cumsum(0)
    h = ops.grouped_linear(p.x[order // top_k], packed[0], ends, activation).float()
    gate, up = h.split(p.intermediate, dim=1)
    a = product_as_the_kernels_do(gate, up, p.glu).to(p.x.dtype)
    y = torch.empty(m * top_k, p.x.shape[1])
    y[order] = ops.grouped_linear(a.float(), packed[1], ends, activation)
    y = y.view(m, top_k, p.x.shape[1])
    out = torch.zeros(m, p.x.shape[1])
    for slot in range(top_k):
        product = p.topk_weights[:, slot, None] * y[:, slot]
        out = torch.where(p.topk_ids[:, slot, None] >= 0, out + product, out)
    return out.to(p.x.dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25)
@given(problem=expert_problems(dtype=torch.bfloat16))
def test_layer_is_its_parts_bit_for_bit(isa: str, activation: Activation, problem: ExpertsProblem) -> None:
    """The down projection's rows come as fp32, so that its results do: in W8A16 what is split off them is zero."""
    packed = problem.pack("cpu")
    with instruction_set(isa):
        assert same_bits(layer(problem, packed, activation), by_parts(problem, packed, activation))


@pytest.mark.parametrize("m", [1, 7, 60])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_the_number_of_threads(
    isa: str, activation: Activation, dtype: torch.dtype, m: int
) -> None:
    """Large enough for eight threads to get something to do, and most tokens on one expert."""
    p = random_experts(60, 5, 3, 520, 400, dtype=dtype, seed=1)
    p.topk_ids[20:, 0] = 3
    part, packed, results = p.with_tokens(p.x[:m], p.topk_weights[:m], p.topk_ids[:m]), p.pack("cpu"), []
    with instruction_set(isa):
        for count in (1, 2, 3, 8):
            with threads(count):
                results.append(layer(part, packed, activation))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_token_does_not_depend_on_its_batch(isa: str, activation: Activation, data: st.DataObject) -> None:
    """One token, in two batches of any size, among tokens of any kind that go anywhere."""
    dtype = data.draw(st.sampled_from(DTYPES))
    experts, hidden = 4, 96
    p = random_experts(1, experts, 1, hidden, 72, dtype=dtype, seed=data.draw(st.integers(0, 3)))
    packed = p.pack("cpu")
    expert, results = data.draw(st.integers(0, 3)), []
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    with instruction_set(isa), threads(data.draw(st.sampled_from([1, 2]))):
        for _ in range(2):
            m = data.draw(st.integers(1, 40))
            x = OTHERS[data.draw(st.sampled_from(sorted(OTHERS)))]((m, hidden), generator).to(dtype)
            ids = torch.randint(0, data.draw(st.integers(1, experts)), (m, 1), generator=generator)
            weights = torch.rand(m, 1, generator=generator)
            at = data.draw(st.integers(0, m - 1))
            x[at], ids[at], weights[at] = p.x[0], expert, 0.75
            results.append(layer(p.with_tokens(x, weights, ids), packed, activation)[at])
    assert results[0].isfinite().all() and same_bits(*results)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_bits_are_the_same_in_batches_of_any_size(isa: str, activation: Activation) -> None:
    """The same token first in batches of one to many, whose sums cancel; the others go wherever they like."""
    experts = 3
    p = random_experts(90, experts, 1, 256, 128, seed=2)
    # Each product and its opposite: what is left of a sum is its rounding, which shows any other order.
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    for start in (0, 128):
        p.x[:, start + order[64:]] = p.x[:, start + order[:64]]
        half = p.w13.view(torch.uint8)[:, :, start + order[:64]]
        p.w13.view(torch.uint8)[:, :, start + order[64:]] = half ^ 0x80
    p.w13_scale.mul_(2.0**20)
    packed = p.pack("cpu")
    alone = None
    with instruction_set(isa):
        for m in range(1, 91):
            y = layer(p.with_tokens(p.x[:m], p.topk_weights[:m], p.topk_ids[:m]), packed, activation)[0]
            alone = y if alone is None else alone
            assert same_bits(y, alone), f"alone and among {m}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_with_its_token(isa: str, activation: Activation, value: float) -> None:
    p = random_experts(9, 3, 2, 200, 130, dtype=torch.bfloat16, seed=6)
    clean = p.x.clone()
    p.x[4, 150] = value
    with instruction_set(isa):
        out = p.layer("cpu", activation)
        other = [i for i in range(9) if i != 4]
        same = p.with_tokens(clean, p.topk_weights, p.topk_ids).layer("cpu", activation)
        assert same_bits(out[other], same[other]) and out[other].isfinite().all()
    want = p.reference(activation)
    assert not want[4].isfinite().any()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(out[4]), kind(want[4])), kind.__name__


@pytest.mark.parametrize("isa", ISAS)
def test_a_weight_that_is_nan_or_infinite_is_used_as_it_is(isa: str) -> None:
    p = random_experts(3, 3, 2, 64, 64, seed=6)
    p.topk_weights[1] = torch.tensor([float("nan"), 0.5])
    p.topk_weights[2] = torch.tensor([float("inf"), 0.5])
    with instruction_set(isa):
        out = p.layer("cpu")
    assert out[0].isfinite().all() and out[1].isnan().all() and not out[2].isfinite().any()


@pytest.mark.parametrize("isa", ISAS)
def test_nan_codes_poison_their_own_expert_alone(isa: str) -> None:
    """Refused at loading; a kernel that meets one must not hide it (vLLM's CPU operator takes it for 480)."""
    p = random_experts(12, 3, 1, 96, 64, block=BlockSize(64, 64), seed=8)
    p.topk_ids[:, 0] = torch.arange(12) % 3
    p.w13.view(torch.uint8)[1, 5, 7] = 0x7F
    packed = p.pack("cpu", check_values=False)
    with instruction_set(isa):
        for activation in ACTIVATIONS:
            out = layer(p, packed, activation)
            poisoned = p.topk_ids[:, 0] == 1
            assert out[poisoned].isnan().all() and out[~poisoned].isfinite().all()
