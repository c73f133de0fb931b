"""group_quantize against the specification, bit for bit."""

from __future__ import annotations

import pytest
import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends import ascendc
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.judges import beside_powers_of_two

from .conftest import DTYPES, Emulator, random_activation


def assert_equals_specification(emulator: Emulator, x: torch.Tensor) -> None:
    """With any scales, and with those that are powers of two."""
    for activation in (Activation.W8A8, Activation.W8A8_UE8M0):
        codes, scale, _ = emulator.quantize(x, activation=ascendc.ACTIVATIONS[activation])
        expected_codes, expected_scale = reference.quantize_activation(x, activation=activation)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_at_the_edges_of_powers_of_two(emulator: Emulator, dtype: torch.dtype) -> None:
    assert_equals_specification(emulator, beside_powers_of_two(dtype))


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


NAN_BITS = {
    torch.float16: (torch.int16, (0x7E00, 0x7E01, 0x7FFF, 0x7C01, 0xFE00, 0xFFFF, 0xFC01)),
    torch.bfloat16: (torch.int16, (0x7FC0, 0x7FC1, 0x7FFF, 0x7F81, 0xFFC0, 0xFFFF, 0xFF81)),
    torch.float32: (torch.int32, (0x7FC00000, 0x7FC10000, 0x7FFFFFFF, 0x7F800001, 0xFFC00000, 0xFFFFFFFF, 0xFF800001)),
}
"""Quiet and signalling NaNs of both signs, with the fewest and the most payload bits."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_of_any_pattern_makes_its_group_nan_and_no_other(emulator: Emulator, dtype: torch.dtype) -> None:
    integer, patterns = NAN_BITS[dtype]
    sign = 1 << (8 * dtype.itemsize - 1)
    x = random_activation(2 * len(patterns), 300, dtype)
    finite_codes, finite_scale, _ = emulator.quantize(x)
    for row, pattern in enumerate(patterns):
        bits = pattern - 2 * sign if pattern & sign else pattern
        x.view(integer)[row, 131 + 17 * row] = bits  # in the second group of three
        x.view(integer)[row + len(patterns), 299] = bits  # in the ragged one, beside an infinity
        x[row + len(patterns), 256] = float("inf")
    assert_equals_specification(emulator, x)
    codes, scale, _ = emulator.quantize(x)
    hit = torch.zeros(x.shape[0], 3, dtype=torch.bool)
    hit[: len(patterns), 1] = hit[len(patterns) :, 2] = True
    assert torch.equal(scale.isnan(), hit)
    element = hit.repeat_interleave(128, dim=1)[:, :300]
    assert (codes[element] == reference.NAN_CODE).all()
    assert torch.equal(codes[~element], finite_codes[~element])
    assert torch.equal(scale[~hit], finite_scale[~hit])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_are_as_in_the_specification(emulator: Emulator, dtype: torch.dtype) -> None:
    x = random_activation(4, 300, dtype)
    x[0, 0] = float("inf")
    x[1, 130] = -float("inf")
    x[2, 256], x[2, 299] = float("inf"), -float("inf")
    x[3] = float("inf")
    assert_equals_specification(emulator, x)


def test_the_result_does_not_depend_on_the_number_of_cores(emulator: Emulator) -> None:
    x = random_activation(6, 3000, torch.bfloat16)
    one, many = emulator.quantize(x, cores=1), emulator.quantize(x, cores=20)
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])
