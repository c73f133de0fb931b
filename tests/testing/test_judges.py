"""The judges of linears notice what they are there to notice."""

import dataclasses

import pytest
import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.judges import Judgement, Problem, judge_exact, random_problem

HALVES = [torch.bfloat16, torch.float16]


def specified(problem: Problem) -> torch.Tensor:
    return reference.block_linear(problem.x, problem.weight, problem.scale, problem.bias, grid=problem.grid)


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 85), (torch.float16, 60)], ids=str)
def test_a_single_element_off_by_one_unit_in_the_last_place(dtype: torch.dtype, least: int) -> None:
    """Most are noticed, in 2000 that are otherwise right; the others lie near the middle of two numbers, as near as the
    bound of fp32 sums is wide. fp16's numbers are eight times as dense.
    """
    problem = random_problem(10, (130, 70), 300, dtype=dtype, bias=True)
    right = specified(problem)
    assert judge_exact(right, problem).faults == []
    found = 0
    for number in range(100):
        row, column = number % 10, number * 2
        wrong = right.clone()
        wrong.view(torch.int16)[row, column] += 1 if number % 2 else -1
        faults = judge_exact(wrong, problem).faults
        said = f"1 of 2000 elements are off by more than fp32 accumulation allows, the first at ({row}, {column})"
        found += any(said in fault for fault in faults)
    assert found >= least


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_results_that_are_cut_off_instead_of_rounded(dtype: torch.dtype) -> None:
    problem = random_problem(10, (200,), 300, dtype=dtype)
    exact = specified(dataclasses.replace(problem, x=problem.x.float()))
    rounded = exact.to(dtype)
    away = rounded.float().abs() > exact.abs()
    cut = torch.where(away, (rounded.view(torch.int16) - 1).view(dtype), rounded)
    faults = judge_exact(cut, problem).faults
    assert any("equal the rounded oracle" in fault for fault in faults)


def test_fp32() -> None:
    problem = random_problem(5, (130, 70), 1000, dtype=torch.float32)
    assert judge_exact(specified(problem), problem).faults == []
    assert judge_exact(problem.oracle().float(), problem).faults == []
    assert judge_exact(specified(problem) * (1 + 2e-6), problem).faults != []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_element_that_is_no_number(value: float) -> None:
    problem = random_problem(4, (40,), 130)
    wrong = specified(problem)
    wrong[2, 3] = value
    assert "the first at (2, 3)" in judge_exact(wrong, problem).faults[0]


def test_measures_say_how_much_of_a_limit_is_used() -> None:
    problem = random_problem(10, (200,), 300)
    measures = judge_exact(specified(problem), problem).measures
    assert set(measures) == {"element", "calc_diff", "unequal"}
    assert all(0 <= value <= limit for value, limit in measures.values())
    judgement = Judgement()
    judgement.hold("x", float("nan"), 1.0, "no number")
    assert judgement.faults == ["no number"]


def test_a_form_that_is_wrong() -> None:
    problem = random_problem(4, (40,), 130)
    assert judge_exact(specified(problem)[:3], problem).faults == [
        "the result is (3, 40) torch.bfloat16, expected (4, 40) torch.bfloat16"
    ]
    assert judge_exact(specified(problem).float(), problem).faults
    w8a16 = reference.block_linear(problem.x, problem.weight, problem.scale, activation=Activation.W8A16)
    assert judge_exact(w8a16, problem).faults


def test_a_problem_on_a_device_keeps_its_codes() -> None:
    problem = random_problem(3, (40,), 130, bias=True)
    there = problem.to("cpu")
    assert torch.equal(there.weight.view(torch.uint8), problem.weight.view(torch.uint8))
    assert there.grid == problem.grid and torch.equal(there.oracle(), problem.oracle())
