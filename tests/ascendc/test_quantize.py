"""group_quantize against the specification, bit for bit."""

from __future__ import annotations

import pytest
import torch

from qwen3_fp8_ascend import reference

from .conftest import DTYPES, Emulator, random_activation


def assert_equals_specification(emulator: Emulator, x: torch.Tensor) -> None:
    codes, scale, _ = emulator.quantize(x)
    expected_codes, expected_scale = reference.quantize_activation(x)
    assert torch.equal(codes, expected_codes.view(torch.uint8))
    assert torch.equal(scale.isnan(), expected_scale.isnan())
    assert torch.equal(scale.nan_to_num(), expected_scale.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 128), (3, 2048), (2, 2049), (5, 576), (1, 1), (2, 4097), (7, 200)])
def test_codes_and_scales_are_those_of_the_specification(
    emulator: Emulator, m: int, k: int, dtype: torch.dtype
) -> None:
    assert_equals_specification(emulator, random_activation(m, k, dtype))


def test_every_midpoint_between_codes_rounds_to_even(emulator: Emulator) -> None:
    """With a 448 in every group the scale is 1 and the codes are those of the numbers themselves."""
    finite = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (finite[1:] + finite[:-1]) / 2
    points = torch.cat([finite, middle, middle.nextafter(middle * 2), middle.nextafter(middle * 0)])
    points = torch.cat([points, -points])
    rows = -(-len(points) // 127)
    x = torch.zeros(rows, 128)
    x[:, 0] = 448
    padded = torch.zeros(rows * 127)
    padded[: len(points)] = points
    x[:, 1:] = padded.view(rows, 127)
    _, scale, _ = emulator.quantize(x)
    assert torch.equal(scale, torch.ones_like(scale))
    assert_equals_specification(emulator, x)


def test_extremes(emulator: Emulator) -> None:
    """Zeros of both signs, numbers below the floor, the largest and smallest floats, infinities and NaN."""
    x = torch.zeros(9, 256)
    x[1] = -0.0
    x[2] = torch.linspace(-1e-11, 1e-11, 256)
    x[3] = torch.linspace(-1, 1, 256) * 3e38
    x[4] = torch.linspace(-1, 1, 256) * 1e-38
    x[5, 3], x[5, 200] = float("inf"), -float("inf")
    x[6, 5] = float("nan")
    x[7] = torch.linspace(-448, 448, 256)
    x[8] = torch.linspace(-1e-10, 1e-10, 256)
    assert_equals_specification(emulator, x)


def test_the_result_does_not_depend_on_the_number_of_cores(emulator: Emulator) -> None:
    x = random_activation(6, 3000, torch.bfloat16)
    one, many = emulator.quantize(x, cores=1), emulator.quantize(x, cores=20)
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])
