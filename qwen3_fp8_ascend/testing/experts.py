"""Layers of experts as problems, an oracle in fp64, and how far a result may be from it.

A layer rounds between its two linears (`reference.block_experts`). Whoever adds in another order may land on the other
side of such a rounding, and of that of a code, a few times in a million; each is a jump that no bound on sums allows.
So the oracle carries intervals through the stages: an element has room for exactly those jumps that are within reach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.format import AMAX_FLOOR, DEFAULT_BLOCK, E4M3_MAX, Activation, BlockGrid, BlockSize
from qwen3_fp8_ascend.glu import SILU, Glu
from qwen3_fp8_ascend.testing.judges import BF16_EQUAL, CALC_DIFF, FP32_REL_L2, Judgement, calc_diff

FP32_LAYER_REL_L2 = 3 * FP32_REL_L2
"""Largest relative L2 distance of an fp32 layer from the oracle, beside jumps: gate, up and down are a linear each."""

COUNTED = 20_000
"""From so many elements on they are judged together: one jump moves a token, and few tokens are moved far by one."""

SILU_SLOPE = 1.1
"""The steepest that silu gets (1.0998, at 2.4); x / (1 + exp(-alpha x)), which is silu(alpha x) / alpha, likewise."""

CUBIC_SLOPE = 1.7
"""At most that of x * sigmoid(z), z = alpha (x + c x^3): sigmoid(z) <= 1, x z' <= 3 z, and z sigmoid'(z) <= 0.2240."""


@dataclass(frozen=True)
class ExpertsProblem:
    """A layer of experts, tokens, and where they go.

    Shapes: x (m, hidden), w13 (E, 2 * intermediate, hidden), w2 (E, hidden, intermediate), scales as the grids have
        them, topk_weights and topk_ids (m, top_k).
    """

    x: torch.Tensor
    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    block: BlockSize = DEFAULT_BLOCK
    glu: Glu = SILU

    @property
    def intermediate(self) -> int:
        return self.w2.shape[2]

    @property
    def w13_grid(self) -> BlockGrid:
        return BlockGrid((self.intermediate, self.intermediate), self.x.shape[1], self.block)

    @property
    def w2_grid(self) -> BlockGrid:
        return BlockGrid((self.x.shape[1],), self.intermediate, self.block)

    def to(self, place: torch.device | str) -> ExpertsProblem:
        """The same problem elsewhere."""
        moved: dict[str, Any] = {
            n: value.to(place) for n, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def with_tokens(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> ExpertsProblem:
        """The same experts for other tokens."""
        return replace(self, x=x, topk_weights=topk_weights, topk_ids=topk_ids)

    def pack(self, backend: str | None = None, **options: Any) -> tuple[ops.PackedWeight, ops.PackedWeight]:
        """w13 and w2 as `ops.block_experts` takes them."""
        return (
            ops.pack_experts(self.w13, self.w13_scale, self.w13_grid, backend, **options),
            ops.pack_experts(self.w2, self.w2_scale, self.w2_grid, backend, **options),
        )

    def layer(self, backend: str | None = None, activation: Activation = Activation.W8A8) -> torch.Tensor:
        """What a backend gives."""
        return ops.block_experts(self.x, *self.pack(backend), self.topk_weights, self.topk_ids, activation, self.glu)

    def reference(
        self, activation: Activation = Activation.W8A8, compute_dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """What the specification gives."""
        return reference.block_experts(
            self.x,
            self.w13,
            self.w13_scale,
            self.w2,
            self.w2_scale,
            self.topk_weights,
            self.topk_ids,
            activation=activation,
            glu=self.glu,
            block=self.block,
            compute_dtype=compute_dtype,
        )


def random_codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Any finite e4m3 codes."""
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.where((codes & 0x7F) == 0x7F, codes ^ 1, codes).view(torch.float8_e4m3fn)


def random_experts(
    m: int,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    block: BlockSize = DEFAULT_BLOCK,
    seed: int = 0,
) -> ExpertsProblem:
    """A layer whose gates are neither all open nor all closed, and tokens that go anywhere, to one expert twice too."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = BlockGrid((intermediate, intermediate), hidden, block)
    down = BlockGrid((hidden,), intermediate, block)

    def scales(grid: BlockGrid) -> torch.Tensor:
        # Codes have a rms of 118: sums over k of products with numbers around 1 are then around 1.
        typical = 1 / (118 * max(1, grid.k) ** 0.5)
        return typical * torch.exp2(torch.rand((experts, *grid.scale_shape), generator=generator) * 2 - 1)

    return ExpertsProblem(
        torch.randn(m, hidden, generator=generator).to(dtype),
        random_codes((experts, gate_up.n, hidden), generator),
        scales(gate_up),
        random_codes((experts, hidden, intermediate), generator),
        scales(down),
        torch.rand(m, top_k, generator=generator),
        torch.randint(0, experts, (m, top_k), generator=generator),
        block,
    )


@dataclass(frozen=True)
class Interval:
    """Numbers in fp64, and how far off what was computed may be."""

    value: torch.Tensor
    error: torch.Tensor

    def rounded(self, dtype: torch.dtype) -> Interval:
        """To the nearest number of a dtype, wherever in the interval it started."""
        low, value, high = (
            v.to(dtype).double() for v in (self.value - self.error, self.value, self.value + self.error)
        )
        return Interval(value, torch.maximum(high - value, value - low))


def _exact_weight(codes: torch.Tensor, scale: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    scales = reference.row_scales(scale, grid).double().repeat_interleave(grid.block.k, dim=1)[:, : grid.k]
    return codes.double() * scales


def _quantized(a: Interval, block_k: int, activation: Activation) -> Interval:
    """What the codes of numbers stand for: any codes that any numbers of the intervals may get."""
    out = Interval(torch.empty_like(a.value), torch.empty_like(a.value))
    for start in range(0, a.value.shape[1], block_k):
        group = slice(start, start + block_k)
        value, error = a.value[:, group], a.error[:, group]
        sizes = (value.abs() - error, value.abs(), value.abs() + error)
        small, scale, large = (s.amax(1, keepdim=True).float().clamp_min(AMAX_FLOOR) / E4M3_MAX for s in sizes)
        if activation is Activation.W8A8_UE8M0:
            small, scale, large = (reference.round_up_to_power_of_two(s) for s in (small, scale, large))

        def codes(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return (numbers.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).double()

        middle = codes(value, scale) * scale.double()
        ends = [codes(value + sign * error, s) * s.double() for sign in (-1, 1) for s in (small, scale, large)]
        out.value[:, group] = middle
        out.error[:, group] = torch.stack([(end - middle).abs() for end in ends]).amax(0)
    return out


def _linear(x: Interval, weight: torch.Tensor, block_k: int) -> Interval:
    """Products with a weight, and fp32 sums of them in any order (the bound of `judges.assert_exact`)."""
    k = weight.shape[1]
    magnitude = x.value.abs() @ weight.abs().T
    sums = magnitude * 2.0**-23 * (min(k, block_k) + k // block_k + 8)
    return Interval(x.value @ weight.T, x.error @ weight.abs().T + sums)


def _product(gate: Interval, up: Interval, glu: Glu) -> Interval:
    """What glu makes of them. No bound moves numbers apart."""
    inner = torch.where(gate.value > glu.gate_limit, glu.gate_limit, gate.value)
    exponent = glu.alpha * (inner + glu.cubic * inner**3)
    act = inner / (1 + torch.exp(-exponent))
    act_error = (CUBIC_SLOPE if glu.cubic else SILU_SLOPE) * gate.error
    if glu.alpha != 1 or glu.cubic:  # the exponent is rounded four times at most: as much is lost of the exponential
        act_error = act_error + 2.0**-22 * exponent.abs() * act.abs()
    act = torch.where(act > glu.act_limit, glu.act_limit, act)
    factor = torch.minimum(up.value.abs(), torch.tensor(glu.up_limit).double()) * up.value.sign() + glu.beta
    product = act * factor
    error = act_error * (factor.abs() + up.error) + act.abs() * up.error + 2.0**-21 * product.abs() + 2.0**-149
    return Interval(product, error)


def oracle(problem: ExpertsProblem, activation: Activation = Activation.W8A8) -> Interval:
    """The layer in fp64 with the roundings that the specification has, before the last one.

    Shapes: -> (m, hidden).
    """
    dtype, block_k, half = problem.x.dtype, problem.block.k, problem.intermediate

    def operand(x: Interval) -> Interval:
        return x if activation is Activation.W8A16 else _quantized(x, block_k, activation)

    x = operand(Interval(problem.x.double(), torch.zeros(problem.x.shape, dtype=torch.float64)))
    value = torch.zeros(problem.x.shape, dtype=torch.float64)
    error, magnitude = torch.zeros_like(value), torch.zeros_like(value)
    for expert in range(problem.w13.shape[0]):
        tokens, slots = (problem.topk_ids == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        w13 = _exact_weight(problem.w13[expert], problem.w13_scale[expert], problem.w13_grid)
        w2 = _exact_weight(problem.w2[expert], problem.w2_scale[expert], problem.w2_grid)
        h = _linear(Interval(x.value[tokens], x.error[tokens]), w13, block_k).rounded(dtype)
        gate, up = (Interval(h.value[:, part], h.error[:, part]) for part in (slice(half), slice(half, None)))
        y = _linear(operand(_product(gate, up, problem.glu).rounded(dtype)), w2, block_k)
        weight = problem.topk_weights[tokens, slots].double()[:, None]
        value.index_add_(0, tokens, weight * y.value)
        error.index_add_(0, tokens, weight.abs() * y.error)
        magnitude.index_add_(0, tokens, weight.abs() * y.value.abs())
    return Interval(value, error + magnitude * 2.0**-23 * (problem.topk_ids.shape[1] + 2))


def assert_layer_exact(
    got: torch.Tensor,
    problem: ExpertsProblem,
    activation: Activation = Activation.W8A8,
    want: Interval | None = None,
) -> None:
    """Raise AssertionError with what `judge_layer` finds wrong."""
    faults = judge_layer(got, problem, activation, want).faults
    assert not faults, "; ".join(faults)


def judge_layer(
    got: torch.Tensor,
    problem: ExpertsProblem,
    activation: Activation = Activation.W8A8,
    want: Interval | None = None,
) -> Judgement:
    """Judge a layer of experts, from any device, by the fp64 oracle; `want` is the oracle's, if known.

    Always: each element is the rounding of some number of the oracle's interval. fp32: relative L2 <= 3e-6; in W8A8
    there may be jumps beside it that the interval has room for. bf16/fp16, `COUNTED` elements or more:
    calc_diff <= 1e-5; bf16: >= 99.5 % equal the rounded oracle (fp16 is eight times as fine, the jumps are as large).
    """
    want = oracle(problem, activation) if want is None else want
    judgement, got = Judgement(), got.cpu()
    if got.shape != want.value.shape or got.dtype != problem.x.dtype:
        expected = f"{tuple(want.value.shape)} {problem.x.dtype}"
        judgement.faults.append(f"the result is {tuple(got.shape)} {got.dtype}, expected {expected}")
    if judgement.faults or not got.numel():
        return judgement
    info = torch.finfo(got.dtype)
    room = want.error + torch.finfo(torch.float32).smallest_normal
    low, high = (want.value - room).to(got.dtype), (want.value + room).to(got.dtype)
    outside = ~((got >= low) & (got <= high))
    first = ""
    if outside.any():
        at = tuple(outside.nonzero()[0].tolist())
        first = f", the first at {at}: {float(got[at]):.9g}, expected {float(low[at]):.9g} to {float(high[at]):.9g}"
    fault = f"{int(outside.sum())} of {got.numel()} elements are no rounding of what the oracle allows{first}"
    judgement.hold("elements outside", int(outside.sum()), 0.0, fault)
    size = float(want.value.norm())
    if size / got.numel() ** 0.5 <= 2**10 * info.smallest_normal:
        return judgement  # relative measures say nothing where the dtype runs out of exponents
    if got.dtype == torch.float32:
        distance = float((got.double() - want.value).norm()) / size
        jumps = float(want.error.norm()) / size if activation is not Activation.W8A16 else 0.0
        judgement.hold("relative L2", distance, FP32_LAYER_REL_L2 + jumps, f"relative L2 {distance:.3e}")
        return judgement
    if got.numel() < COUNTED:
        return judgement
    distance = calc_diff(got, want.value)
    judgement.hold("calc_diff", distance, CALC_DIFF, f"calc_diff {distance:.3e}, at most {CALC_DIFF}")
    if got.dtype == torch.bfloat16:
        equal = float((got == want.value.to(got.dtype)).double().mean())
        judgement.hold("unequal", 1 - equal, 1 - BF16_EQUAL, f"only {equal:.4%} equal the rounded oracle")
    return judgement
