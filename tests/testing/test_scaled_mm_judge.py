"""The bound for torch's block-scaled FP8 product: what passes, and what must not."""

import dataclasses

import pytest
import torch

from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.judges import judge_scaled_mm, random_problem

PROBLEM = random_problem(80, (256,), 640)


def test_the_rounded_oracle_passes_and_errors_of_sums_of_14_bits_do() -> None:
    want, magnitude = PROBLEM.oracle(), PROBLEM.magnitude()
    noise = magnitude * (torch.rand(want.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    for error in (0.0, 2e-3):
        judgement = judge_scaled_mm((want + noise * (error * want.norm() / noise.norm())).bfloat16(), PROBLEM)
        assert judgement.faults == [] and "relative L2" in judgement.measures


def one_element(out: torch.Tensor) -> None:
    out[3, 5] = PROBLEM.oracle()[3, 5] + PROBLEM.magnitude()[3, 5] * 0.01


def one_token(out: torch.Tensor) -> None:
    out[7] = out[8]


def all_too_large(out: torch.Tensor) -> None:
    out.mul_(1.01)


def a_nan(out: torch.Tensor) -> None:
    out[0, 0] = float("nan")


@pytest.mark.parametrize("fault", [one_element, one_token, all_too_large, a_nan])
def test_planted_faults_are_found(fault) -> None:  # type: ignore[no-untyped-def]
    out = PROBLEM.oracle().bfloat16()
    fault(out)
    assert judge_scaled_mm(out, PROBLEM).faults


def test_activations_that_were_not_quantized_are_found() -> None:
    assert judge_scaled_mm(PROBLEM.oracle(Activation.W8A16).bfloat16(), PROBLEM).faults


def test_what_torch_does_not_take_is_judged_exactly() -> None:
    """Off by a unit in the last place: nothing there, a fault where the exact kernels compute."""
    biased = dataclasses.replace(PROBLEM, bias=torch.randn(256).bfloat16())
    half = dataclasses.replace(PROBLEM, x=PROBLEM.x.half())
    for problem, activation in ((biased, Activation.W8A8), (PROBLEM, Activation.W8A16), (half, Activation.W8A8)):
        out = problem.oracle(activation).to(problem.x.dtype)
        assert judge_scaled_mm(out, problem, activation).faults == []
        assert judge_scaled_mm(torch.nextafter(out, out + 1), problem, activation).faults
