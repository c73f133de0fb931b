"""Packing and block_dequantize against the specification, and the cost of decoding."""

from __future__ import annotations

import pytest
import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import ascendc
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import BlockGrid
from qwen3_fp8_ascend.ops import dense

from .conftest import DTYPES, Emulator, random_weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_254_finite_codes_decode_exactly(emulator: Emulator, dtype: torch.dtype) -> None:
    """Every code in the low and in the high half of a lane, beside every other code's neighbourhood."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    assert len(codes) == 254
    weight = torch.stack([codes.roll(17 * row).repeat(2)[:256] for row in range(128)]).view(torch.float8_e4m3fn)
    tensors = ascendc.pack(weight, torch.ones(1, 2), BlockGrid((128,), 256))
    got, _ = emulator.dequantize(tensors, 128, 256, dtype)
    assert set(weight[:, :64].view(torch.uint8).unique().tolist()) == set(codes.tolist())
    assert torch.equal(got.float(), weight.float())
    assert torch.equal(got.float().signbit(), weight.float().signbit())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("widths", "k"), [((128,), 128), ((300,), 200), ((72, 130, 1), 576), ((64, 64, 64), 129), ((1,), 1)]
)
def test_values_are_those_of_the_specification(
    emulator: Emulator, widths: tuple[int, ...], k: int, dtype: torch.dtype
) -> None:
    weight = random_weight(widths, k)
    got, _ = emulator.dequantize(weight.tensors, weight.grid.n, k, dtype)
    expected = reference.dequantize_weight(weight.codes, weight.scale, weight.grid, dtype)
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(("widths", "k"), [((300,), 200), ((72, 130, 1), 576)])
def test_the_scratch_holds_the_normalised_weight_rounded_once_to_fp16(
    emulator: Emulator, widths: tuple[int, ...], k: int
) -> None:
    """The packed scales times the weight's power of two; scales over 20 octaves, so that much of it is subnormal."""
    weight = random_weight(widths, k, spread=10.0)
    codes, scales, spans = weight.tensors
    shrink = spans[0, 2:3].view(torch.float32)
    got, _ = emulator.dequantize((codes, scales * shrink, spans), weight.grid.n, k, torch.float16)
    exact = reference.dequantize_weight(weight.codes, weight.scale, weight.grid, torch.float32) * shrink
    assert exact.abs().max() < 1 and ((exact != 0) & (exact.abs() < 2.0**-14)).float().mean() > 0.1
    assert torch.equal(got.view(torch.int16), exact.half().view(torch.int16))


def test_decoding_takes_five_vector_instructions_for_256_weights(emulator: Emulator) -> None:
    """Counted in repeats of 256 bytes, the unit in which the prior art takes 20."""
    weight = random_weight((256,), 512)
    _, counters = emulator.dequantize(weight.tensors, 256, 512, torch.float16)
    repeats = counters["vector_repeats"]
    decode = sum(repeats[name] for name in ("ShiftLeft", "ShiftRight", "And"))
    assert decode * 256 / (256 * 512) == 5
    assert decode * 256 / (256 * 512) <= 6


def test_packed_weight_is_one_byte_a_weight_and_32_bytes_a_block() -> None:
    weight = random_weight((4096,), 1024)
    codes, scales, spans = weight.tensors
    assert codes.numel() * codes.element_size() == 4096 * 1024
    assert scales.numel() * scales.element_size() == 32 * 32 * 8
    assert spans.shape == (32, 8)


def test_pack_refuses_what_the_kernels_cannot_address() -> None:
    with pytest.raises(BlockFp8Error, match="too many columns"):
        ascendc.pack(torch.zeros(1, 65409).to(torch.float8_e4m3fn), torch.ones(1, 512), BlockGrid((1,), 65409))


def test_scales_that_overflow_with_the_decode_bias_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed scales carry 2^8, so the largest fp32 scales have no packed form."""
    monkeypatch.setattr(dense, "select_backend", lambda *_: ascendc.BACKEND)
    weight = torch.zeros(1, 1).to(torch.float8_e4m3fn)
    limit = torch.full((1, 1), torch.finfo(torch.float32).max / 256)
    assert torch.isfinite(ops.pack_weight(weight, limit).tensors[1]).all()
    with pytest.raises(BlockFp8Error, match=r"up to 1\.33e"):
        ops.pack_weight(weight, limit * 1.01)
