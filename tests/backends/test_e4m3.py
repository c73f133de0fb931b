"""e4m3 without FP8 instructions: bit for bit what the specification says."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends import e4m3
from qwen3_fp8_ascend.testing.strategies import activations

CODES = torch.arange(256, dtype=torch.uint8)
FINITE = (CODES & 0x7F) != 0x7F


def test_every_finite_code_decodes_as_ml_dtypes_says() -> None:
    want = torch.from_numpy(CODES.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    got = e4m3.decode(CODES)
    assert torch.equal(got[FINITE], want[FINITE])
    assert torch.equal(got[FINITE].signbit(), want[FINITE].signbit())


def test_encoding_turns_decoding_round() -> None:
    assert torch.equal(e4m3.encode(e4m3.decode(CODES[FINITE])), CODES[FINITE])
    assert e4m3.encode(torch.tensor([torch.nan, -torch.nan])).tolist() == [reference.NAN_CODE] * 2


@given(x=activations(), block_k=st.sampled_from([128, 64]))
def test_quantization_is_the_specification(x: torch.Tensor, block_k: int) -> None:
    rows = x.reshape(-1, x.shape[-1])
    values, scale = e4m3.quantize_values(rows, block_k)
    want_codes, want_scale = reference.quantize_activation(rows, block_k)
    assert torch.equal(scale.view(torch.int32), want_scale.view(torch.int32))
    codes = e4m3.encode(values).flatten(1)[:, : rows.shape[1]]
    assert torch.equal(codes, want_codes.view(torch.uint8))


@pytest.mark.parametrize("exponent", range(-10, 9))
def test_halves_go_to_the_even_code(exponent: int) -> None:
    """Every point half way between two codes of a binade, and its neighbours in fp32."""
    step = 2.0 ** max(exponent - 3, -9)
    points = torch.arange(2.0**exponent, min(2.0 ** (exponent + 1), 448.0), step / 2, dtype=torch.float64).float()
    points = torch.cat([points, torch.nextafter(points, torch.tensor(0.0)), torch.nextafter(points, torch.tensor(1e9))])
    points = torch.cat([points, -points]).clamp(-448, 448)
    got = e4m3.encode(e4m3._round_to_grid(points))
    assert torch.equal(got, points.to(torch.float8_e4m3fn).view(torch.uint8))
