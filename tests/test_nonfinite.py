"""NaN of any payload and infinities, in every implementation that runs on a CPU.

The same cases run on the device kernels where those are executed (tests/triton_kernels/test_interpreter.py,
tests/triton_ascend/test_execute_quantize.py) and on the scratch of many rows (tests/backends/test_prefill.py).
"""

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing import nonfinite
from qwen3_fp8_ascend.testing.judges import random_problem
from tests.support.cpu_levels import ISAS, instruction_set

WEIGHT = random_problem(0, (130, 62), 300)


@cache
def packed(backend: str) -> ops.PackedWeight:
    return ops.pack_weight(WEIGHT.weight, WEIGHT.scale, WEIGHT.grid, backend)


@pytest.fixture(params=["reference", *ISAS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The specification, and the CPU backend on each instruction set that this machine has."""
    if request.param == "reference":
        yield "reference"
        return
    with instruction_set(request.param):
        yield "cpu"


@pytest.mark.parametrize("activation", [Activation.W8A8, Activation.W8A8_UE8M0])
@pytest.mark.parametrize("case", nonfinite.NON_FINITE, ids=str)
def test_quantization(backend: str, case: nonfinite.NonFinite, activation: Activation) -> None:
    x = nonfinite.activation(case)
    got = ops.quantize_activation(x, activation=activation, backend=backend)
    assert nonfinite.wrong_quantization(x, *got, activation) == []


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("case", nonfinite.NON_FINITE, ids=str)
def test_linear(backend: str, case: nonfinite.NonFinite, activation: Activation) -> None:
    """A poisoned row says so in every output, and the others do not notice: in registers and in tiles of many rows."""
    x = nonfinite.activation(case)
    oracle = reference.block_linear(
        x, WEIGHT.weight, WEIGHT.scale, activation=activation, grid=WEIGHT.grid, compute_dtype=torch.float64
    )
    poisoned = list(nonfinite.POISONED_ROWS)
    untouched = torch.tensor([row not in poisoned for row in range(40)])
    many = torch.cat([x, x[:1].expand(34, -1)])
    for rows in (many[:6], many):
        out = ops.block_linear(rows, packed(backend), activation=activation)
        assert nonfinite.wrong_linear(case, out[:6], oracle) == []
        clean = rows.clone()
        clean[poisoned] = 0
        kept = untouched[: len(rows)]
        assert torch.equal(out[kept], ops.block_linear(clean, packed(backend), activation=activation)[kept])


def test_the_cases_are_what_they_say() -> None:
    for case in nonfinite.NON_FINITE:
        assert case.value().isfinite().item() is False
        assert case.is_nan != case.value().isinf().item()
        assert case.value().signbit().item() == case.name.startswith("negative")
    assert {case.dtype for case in nonfinite.NANS} == {case.dtype for case in nonfinite.INFINITIES} == {*nonfinite.BITS}
    assert len(set(map(str, nonfinite.NON_FINITE))) == len(nonfinite.NON_FINITE) == 58


def test_a_code_or_a_scale_that_is_not_nan_is_noticed() -> None:
    """The judges themselves: what Triton's kernel once made of 0x7FFFFFFF, and a scale of 1."""
    case = next(case for case in nonfinite.NANS if case.pattern == 0x7FFFFFFF)
    x = nonfinite.activation(case)
    codes, scale = reference.quantize_activation(x)
    broken = codes.view(torch.uint8).clone()
    broken[1, 130] = 0x08
    assert len(nonfinite.wrong_quantization(x, broken, scale)) == 2
    one = scale.clone()
    one[1, 1] = 1.0
    assert len(nonfinite.wrong_quantization(x, codes, one)) == 2
    oracle = reference.block_linear(x, WEIGHT.weight, WEIGHT.scale, grid=WEIGHT.grid, compute_dtype=torch.float64)
    assert nonfinite.wrong_linear(case, oracle.nan_to_num(), oracle) != []
