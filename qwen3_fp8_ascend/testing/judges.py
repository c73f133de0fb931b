"""How far a result is from the specification, and how far it may be.

Where the bounds come from: block-scaled fp32 against an fp64 oracle lies near 1e-7, weights rounded
to bf16 near 2e-3, w8a16 taken for w8a8 near 3e-2. A gate of 1e-3 on rounded outputs would let all of them pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, E4M3_MAX, Activation, BlockGrid, BlockSize

FP32_REL_L2 = 1e-6
"""Largest relative L2 distance of an fp32 result from the fp64 oracle."""
BF16_EQUAL = 0.995
"""Smallest share of bf16 results that equal the bf16 rounding of the oracle."""
CALC_DIFF = 1e-5
"""Largest DeepGEMM `calc_diff` of a rounded result from the oracle."""

PREFILL_FP16 = 6e-4
"""Relative L2 that many rows on an NPU without FP8 may add to the rounding of their results (`backends/prefill.py`).

Three roundings to fp16's 11 bits: both operands and the product. One has a relative rms of 2^-11 sqrt(E[1/s^2] / 3) =
2.1e-4, for a significand s in [1, 2) that is log-uniform; errors of the terms of a sum are independent, so three make
3.6e-4. Rounding to bf16 what fp16 has rounded meets ties one time in eight, which adds 3 % to the square of its own
1.66e-3: 2.9e-4. Together 4.6e-4; seen are at most 4.9e-4. Operands in bf16 would add 1.9e-3.
"""
PREFILL_FP16_EQUAL = 0.85
"""Smallest share of those results in bf16 that equal the bf16 rounding of the oracle; seen are 0.86 to 0.90. Operands
in bf16 leave 0.54 to 0.70."""


SCALED_MM = 5e-3
"""Relative L2 that torch's block-scaled FP8 product may be off by (`backends/nvidia_scaled_mm.py`); seen on an H100 are
2.7e-3 to 3.9e-3, of which 1.7e-3 are the rounding to bf16."""
SCALED_MM_EQUAL = 0.35
"""Smallest share of its results that equal the bf16 rounding of the oracle; seen are 0.43 to 0.70."""
SCALED_MM_ELEMENT = 33 * 2.0**-13
"""Of the sum of magnitudes: what 32 products that are cut off 13 bits below the largest, and their sum, can lose."""


@dataclass(frozen=True)
class Problem:
    """A linear layer with block-FP8 weights and some activations."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None = None
    grid: BlockGrid = None  # type: ignore[assignment]
    """Without one: a single shard in blocks of 128 x 128."""

    def __post_init__(self) -> None:
        if self.grid is None:
            object.__setattr__(self, "grid", BlockGrid((self.weight.shape[0],), self.weight.shape[1]))

    def to(self, device: torch.device | str) -> Problem:
        """The same operands on a device, codes as the bytes that they are: not every device can copy FP8."""
        codes = self.weight.view(torch.uint8).to(device).view(torch.float8_e4m3fn)
        bias = None if self.bias is None else self.bias.to(device)
        return dataclasses.replace(self, x=self.x.to(device), weight=codes, scale=self.scale.to(device), bias=bias)

    def oracle(self, activation: Activation = Activation.W8A8) -> torch.Tensor:
        """The exact result in fp64, not rounded to the activation's dtype; the bias is added in fp64 too.

        Computed on the host, wherever the operands are: an NPU has no fp64 product.
        """
        if self.x.device.type != "cpu":
            return self.to("cpu").oracle(activation)
        bias = None if self.bias is None else self.bias.double()
        return reference.block_linear(
            self.x,
            self.weight,
            self.scale,
            bias,
            activation=activation,
            grid=self.grid,
            compute_dtype=torch.float64,
        )

    def magnitude(self, activation: Activation = Activation.W8A8) -> torch.Tensor:
        """The same sum over absolute values: what rounding errors are relative to, even where terms cancel."""
        if self.x.device.type != "cpu":
            return self.to("cpu").magnitude(activation)
        bias = None if self.bias is None else self.bias.abs()
        absolute = self.weight.view(torch.uint8).bitwise_and(0x7F).view(torch.float8_e4m3fn)
        return Problem(self.x.abs(), absolute, self.scale, bias, self.grid).oracle(activation)


def random_problem(
    m: int,
    widths: tuple[int, ...],
    k: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    block: BlockSize = DEFAULT_BLOCK,
    seed: int = 0,
) -> Problem:
    """Random codes (all finite ones occur), log-uniform scales, activations with outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    grid = BlockGrid(widths, k, block)
    codes = torch.randint(0, 256, (grid.n, k), generator=generator, dtype=torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, codes ^ 1, codes)
    scale = torch.exp2(torch.rand(grid.scale_shape, generator=generator) * 8 - 14)
    x = torch.randn(m, k, generator=generator)
    if k:
        x[:, torch.randint(k, (max(1, k // 100),), generator=generator)] *= 30
    return Problem(
        x.to(dtype),
        codes.view(torch.float8_e4m3fn),
        scale,
        torch.randn(grid.n, generator=generator).to(dtype) if bias else None,
        grid,
    )


def beside_powers_of_two(dtype: torch.dtype, block_k: int = DEFAULT_BLOCK.k) -> torch.Tensor:
    """Tokens of one group each, whose scale is a power of two, or that of the next larger or smaller number.

    Shapes: -> (tokens, block_k) `dtype`. fp16's subnormals are among them.
    """
    tops = (E4M3_MAX * torch.exp2(torch.arange(-24.0, 8))).to(dtype)  # all exact
    bits = tops.view(torch.int32 if dtype == torch.float32 else torch.int16)
    largest = torch.cat([tops, (bits + 1).view(dtype), (bits - 1).view(dtype)])
    x = torch.rand(len(largest), block_k, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = (x * largest.float()[:, None] * 0.99).to(dtype)
    x[:, 0] = largest
    return x


def rel_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in fp64; 0 for two zero tensors."""
    distance, size = (got.double() - want.double()).norm(), want.double().norm()
    return float(distance / size) if size else float(distance)


def calc_diff(got: torch.Tensor, want: torch.Tensor) -> float:
    """1 - 2<got, want> / (<got, got> + <want, want>) in fp64.

    Source: DeepGEMM ``deep_gemm.testing.calc_diff``.
    """
    a, b = got.double(), want.double()
    total = (a * a + b * b).sum()
    return float(1 - 2 * (a * b).sum() / total) if total else 0.0


@dataclass
class Judgement:
    """What is wrong with a result, in words, and how much of each bound it uses: (value, largest allowed) by name."""

    faults: list[str] = field(default_factory=list)
    measures: dict[str, tuple[float, float]] = field(default_factory=dict)

    def hold(self, measure: str, value: float, limit: float, fault: str) -> None:
        """Note a measure; it is a fault if it exceeds its limit or is no number."""
        self.measures[measure] = (float(value), limit)
        if not value <= limit:
            self.faults.append(fault)


def assert_exact(got: torch.Tensor, problem: Problem, activation: Activation = Activation.W8A8) -> None:
    """Raise AssertionError with what `judge_exact` finds wrong."""
    faults = judge_exact(got, problem, activation).faults
    assert not faults, "; ".join(faults)


def judge_exact(got: torch.Tensor, problem: Problem, activation: Activation = Activation.W8A8) -> Judgement:
    """Judge a linear's result, on any device, by the fp64 oracle, to the limit of its dtype.

    fp32: relative L2 <= 1e-6. bf16/fp16: >= 99.5 % equal to the rounded oracle and calc_diff <= 1e-5 (only
    calc_diff when the sum cancels, since rounding then says nothing). Always: each element is what one rounding makes
    of a number within the error bound of an fp32 sum of k products in any order. So a single element that is off by
    one unit in the last place is a fault, unless the oracle is that near to the middle of two numbers.
    """
    want, magnitude = problem.oracle(activation), problem.magnitude(activation)
    judgement, got = Judgement(), got.cpu()
    if not _has_form(got, want, problem, judgement) or not want.numel():
        return judgement
    k = problem.weight.shape[1]
    tiny = torch.finfo(got.dtype).smallest_normal
    # Within a block a sum of at most 128 + 8 roundings per chain, then one per block, and the two scales.
    sums = magnitude * 2.0**-23 * (min(k, problem.grid.block.k) + k // problem.grid.block.k + 8) + tiny
    # What the sum must at least be off by, if one rounding made this element of it.
    beyond = ((got.double() - want).abs() - _half_unit(got)).clamp_min(0)
    # torch casts fp64 to 16 bits by way of fp32. Both roundings are monotone: so are the ends of the interval.
    outside = ~((got >= (want - sums).to(got.dtype)) & (got <= (want + sums).to(got.dtype)))
    judgement.measures["element"] = (float((beyond / sums).max()), 1.0)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        judgement.faults.append(
            f"{int(outside.sum())} of {got.numel()} elements are off by more than fp32 accumulation allows, the first "
            f"at ({row}, {column}): {float(got[row, column]):.9g}, expected {float(want[row, column]):.9g}"
        )
    # Relative measures say nothing where terms cancel or where the dtype runs out of exponents.
    typical = want.norm() / want.numel() ** 0.5
    if not (want.norm() > 1e-2 * magnitude.norm() and typical > 2**10 * tiny):
        return judgement
    if got.dtype == torch.float32:
        distance = rel_l2(got, want)
        judgement.hold("relative L2", distance, FP32_REL_L2, f"relative L2 {distance:.3e}, at most {FP32_REL_L2}")
        return judgement
    distance = calc_diff(got, want)
    judgement.hold("calc_diff", distance, CALC_DIFF, f"calc_diff {distance:.3e}, at most {CALC_DIFF}")
    if got.numel() >= 1000:
        _hold_equal(got, want, BF16_EQUAL, judgement)
    return judgement


def _half_unit(x: torch.Tensor) -> torch.Tensor:
    """Half the distance to the next number of the dtype, in fp64."""
    info = torch.finfo(x.dtype)
    exponent = torch.frexp(x.double().abs().clamp_min(info.smallest_normal))[1] - 1
    return torch.exp2(exponent.double()) * (info.eps / 2)


def _has_form(got: torch.Tensor, want: torch.Tensor, problem: Problem, judgement: Judgement) -> bool:
    if got.shape != want.shape or got.dtype != problem.x.dtype:
        expected = f"{tuple(want.shape)} {problem.x.dtype}"
        judgement.faults.append(f"the result is {tuple(got.shape)} {got.dtype}, expected {expected}")
    return not judgement.faults


def _hold_equal(got: torch.Tensor, want: torch.Tensor, least: float, judgement: Judgement) -> None:
    equal = float((got == want.to(got.dtype)).double().mean())
    judgement.hold("unequal", 1 - equal, 1 - least, f"only {equal:.4%} equal the rounded oracle")


def assert_bias_before_rounding(linear: Callable[[torch.Tensor | None], torch.Tensor], least: float = 0.9) -> None:
    """Judge where a linear adds its bias, by a bias that cancels the first token's own outputs.

    Added to the rounded sums it would leave zeros. Added to the fp32 sums, as the specification has it, it leaves what
    rounding took away: at most half a unit in the last place, and something in a share of at least `least` of the
    outputs. (A product that was rounded to fp16 before has three bits more than bf16, all zero in an eighth of them.)
    Shapes: `linear` is a layer and its activations: bias (n,) or None -> (m, n) bf16 or fp16.
    """
    rounded = linear(None)[0]
    left = linear(-rounded)[0].double().abs()
    assert rounded.dtype in (torch.bfloat16, torch.float16)
    size, info = rounded.double().abs(), torch.finfo(rounded.dtype)
    half_unit = info.eps / 2 * size.clamp_min(info.smallest_normal)
    order = 2.0**-16 * size.max()  # the two calls may add in different orders
    assert (left <= half_unit + order).all(), f"{(left - half_unit).max():.3e} more than rounding is left"
    visible = half_unit > 2**6 * info.smallest_normal * info.eps  # else what is left may itself round to zero
    assert visible.any(), "the outputs are too small to tell"
    share = (left[visible] != 0).double().mean()
    assert share > least, f"only {share:.1%} of the outputs keep what rounding took: the bias was added after it"


def assert_prefill(got: torch.Tensor, problem: Problem, activation: Activation = Activation.W8A8) -> None:
    """Raise AssertionError with what `judge_prefill` finds wrong."""
    faults = judge_prefill(got, problem, activation).faults
    assert not faults, "; ".join(faults)


def judge_prefill(got: torch.Tensor, problem: Problem, activation: Activation = Activation.W8A8) -> Judgement:
    """Judge a linear's result for many rows on an NPU without FP8 (`backends/prefill.py`) by the fp64 oracle.

    fp32: as `judge_exact`. bf16/fp16: relative L2 <= that of the oracle's own rounding and `PREFILL_FP16`, added as
    independent errors are; bf16: >= 85 % equal to the rounded oracle. Always: each element within the error bound of
    operands and product that are rounded to normalised fp16, subnormals included, and of fp32 sums in any order.
    """
    if got.dtype == torch.float32:
        return judge_exact(got, problem, activation)
    want, magnitude = problem.oracle(activation), problem.magnitude(activation)
    judgement, got = Judgement(), got.cpu()
    if not _has_form(got, want, problem, judgement) or not want.numel():
        return judgement
    k = problem.weight.shape[1]
    unit = 2.0**-11
    # What falls below fp16's normal numbers is off by up to 2^-25 of the powers of two, which are at most 1 / 0.4375 of
    # the largest magnitudes: once for each operand, at most 1, times the other one, and once for the product.
    # A scale that is rounded up to a power of two leaves up to half of the codes' range unused.
    room = 2 if activation is Activation.W8A8_UE8M0 else 1
    largest = problem.x.cpu().double().abs().amax(1, keepdim=True).clamp_min(1e-10) * room * 448
    largest *= float(reference.scales_as_fp32(problem.scale).max())
    lost = 2.0**-25 * (2 * k + 1) * largest / 0.4375**2
    bound = magnitude * ((1 + unit) ** 3 - 1 + 2.0**-23 * (k + 8)) + lost + torch.finfo(got.dtype).eps * want.abs()
    worst = float(((got.double() - want).abs() / (bound + torch.finfo(got.dtype).smallest_normal)).max())
    judgement.hold("element", worst, 1.0, f"an element is off by {worst:.3g} of what fp16 operands allow")
    if got.numel() < 1000 or want.norm() <= 1e-2 * magnitude.norm():
        return judgement  # too few to count, or terms that cancel
    allowed, error = math.hypot(rel_l2(want.to(got.dtype), want), PREFILL_FP16), rel_l2(got, want)
    judgement.hold("relative L2", error, allowed, f"relative L2 {error:.3e}, at most {allowed:.3e}")
    if got.dtype == torch.bfloat16:
        _hold_equal(got, want, PREFILL_FP16_EQUAL, judgement)
    return judgement


def judge_scaled_mm(got: torch.Tensor, problem: Problem, activation: Activation = Activation.W8A8) -> Judgement:
    """Judge a linear's result where torch's block-scaled FP8 product may have made it, by the fp64 oracle.

    That product gives bf16: other dtypes, W8A16 and a bias are computed exactly, and judged so. Else relative L2 <=
    `SCALED_MM`, >= 35 % equal to the rounded oracle, and each element within `SCALED_MM_ELEMENT` of its magnitudes.
    """
    if got.dtype != torch.bfloat16 or activation is Activation.W8A16 or problem.bias is not None:
        return judge_exact(got, problem, activation)
    want, magnitude = problem.oracle(activation), problem.magnitude(activation)
    judgement, got = Judgement(), got.cpu()
    if not _has_form(got, want, problem, judgement) or not want.numel():
        return judgement
    info = torch.finfo(got.dtype)
    bound = magnitude * SCALED_MM_ELEMENT + info.eps * want.abs() + info.smallest_normal
    worst = float(((got.double() - want).abs() / bound).max())
    judgement.hold("element", worst, 1.0, f"an element is off by {worst:.3g} of what sums of 14 bits allow")
    if got.numel() < 1000 or want.norm() <= 1e-1 * magnitude.norm():
        return judgement  # too few to count, or terms that cancel
    error = rel_l2(got, want)
    judgement.hold("relative L2", error, SCALED_MM, f"relative L2 {error:.3e}, at most {SCALED_MM}")
    _hold_equal(got, want, SCALED_MM_EQUAL, judgement)
    return judgement
