"""The specification against judges that nobody here wrote."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.format import Activation, BlockGrid
from qwen3_fp8_ascend.testing.judges import calc_diff, random_problem, rel_l2
from qwen3_fp8_ascend.testing.strategies import activations

ALL_CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def test_codes_decode_as_in_ml_dtypes() -> None:
    ours = reference.dequantize_weight(ALL_CODES.view(1, 256), torch.ones(1, 2), dtype=torch.float32)[0]
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(ours.numpy(), theirs)
    assert ours.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]


@given(activations())
def test_activation_codes_as_in_ml_dtypes(x: torch.Tensor) -> None:
    codes, scale = reference.quantize_activation(x)
    wide = scale.repeat_interleave(128, dim=1)[:, : x.shape[1]]
    scaled = (x.float() / wide).clamp(-448, 448).numpy()
    np.testing.assert_array_equal(
        codes.view(torch.uint8).numpy(), scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )


def powers_of_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = reference.quantize_activation(x, activation=Activation.W8A8_UE8M0)
    return codes.view(torch.uint8), scale


def test_every_rounding_boundary_as_in_ml_dtypes() -> None:
    values = np.unique(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    values = values[np.isfinite(values)]
    middles = [(a + b) / 2 for a, b in pairwise(values.tolist())]
    near = np.array([np.nextafter(np.float32(v), np.float32(d)) for v in middles for d in (-np.inf, np.inf)])
    points = np.concatenate([values, np.array(middles, np.float32), near]).astype(np.float32)
    # One group a point, with 448 in it, so that the scale is exactly 1.
    x = torch.zeros(len(points), 128)
    x[:, 0], x[:, 1] = 448.0, torch.from_numpy(points)
    codes, scale = reference.quantize_activation(x)
    assert (scale == 1).all()
    assert all(map(torch.equal, (codes.view(torch.uint8), scale), powers_of_two(x)))
    want = points.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(codes[:, 1].view(torch.uint8).numpy(), want)


def test_activation_quantization_as_in_vllm() -> None:
    vllm_quant = pytest.importorskip("vllm.model_executor.layers.quantization.input_quant_fp8")
    shape = pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils").GroupShape(1, 128)
    from vllm.config import VllmConfig, set_current_vllm_config

    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    x = (x * torch.exp2(torch.arange(64.0) - 52)[:, None]).bfloat16()  # from 2^-52 to 2^11
    with set_current_vllm_config(VllmConfig()):
        codes, scale = vllm_quant.QuantFP8(static=False, group_shape=shape).forward_native(x)
    ours, our_scale = reference.quantize_activation(x)
    largest = x.float().unflatten(1, (-1, 128)).abs().amax(-1)
    same = largest >= 1 / 512  # its floor; ours is 1e-10
    assert 0 < same.sum() < same.numel() and torch.equal(our_scale[same], scale[same])
    assert torch.equal(*(c.view(torch.uint8).unflatten(1, (-1, 128))[same] for c in (ours, codes)))
    assert (scale[~same] == torch.tensor(1 / 512) / 448).all()


def test_e8m0_scales_as_in_ml_dtypes() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    ours = reference.scales_as_fp32(codes.view(torch.float8_e8m0fnu))
    theirs = codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(ours.numpy(), theirs)
    assert ours[0] == 2.0**-127 and ours[-1].isnan()


def test_scales_are_rounded_up_to_powers_of_two_exactly() -> None:
    """Every normal exponent: the power itself, its neighbours, the middle, and what logarithms get wrong."""
    powers = torch.exp2(torch.arange(-126.0, 127))
    for factor in (1.0, 1 + 2.0**-23, 1.5, 2 - 2.0**-23):
        up = reference.round_up_to_power_of_two(powers * factor)
        assert torch.equal(up, powers if factor == 1 else powers * 2)
    special = torch.tensor([torch.inf, torch.nan])
    assert torch.equal(reference.round_up_to_power_of_two(special).isnan(), special.isnan())
    assert reference.round_up_to_power_of_two(special)[0] == torch.inf


def test_activation_quantization_with_powers_of_two_as_in_vllm() -> None:
    vllm_quant = pytest.importorskip("vllm.model_executor.layers.quantization.input_quant_fp8")
    shape = pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils").GroupShape(1, 128)
    from vllm.config import VllmConfig, set_current_vllm_config

    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    x = (x * torch.exp2(torch.arange(64.0) - 52)[:, None]).bfloat16()
    with set_current_vllm_config(VllmConfig()):
        codes, scale = vllm_quant.QuantFP8(static=False, group_shape=shape, use_ue8m0=True).forward_native(x)
    ours, our_scale = reference.quantize_activation(x, activation=Activation.W8A8_UE8M0)
    same = x.float().unflatten(1, (-1, 128)).abs().amax(-1) >= 1 / 512  # its floor; ours is 1e-10
    assert 0 < same.sum() < same.numel() and torch.equal(our_scale[same], scale[same])
    assert torch.equal(*(c.view(torch.uint8).unflatten(1, (-1, 128))[same] for c in (ours, codes)))
    assert not torch.equal(our_scale[same], reference.quantize_activation(x)[1][same])


def test_special_activations() -> None:
    x = torch.zeros(4, 256)
    x[1, 3] = float("nan")
    x[2, 5], x[2, 6] = float("inf"), -2.0
    x[3, 200] = -1e-30
    codes, scale = reference.quantize_activation(x)
    raw = codes.view(torch.uint8)
    assert scale[0, 0] == torch.tensor(1e-10) / 448 and raw[0].eq(0).all()
    assert scale[1, 0].isnan() and raw[1, :128].eq(0x7F).all() and raw[1, 128:].eq(0).all()
    assert scale[2, 0].isinf() and raw[2, 5] == 0x7F and raw[2, 6] == 0x80 and raw[2, 7] == 0
    assert scale[3, 1] == torch.tensor(1e-10) / 448 and raw[3, 200] == 0x80


@given(
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_dequantization_as_in_compressed_tensors(n: int, k: int, seed: int, dtype: torch.dtype) -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer")
    problem = random_problem(0, (n,), k, seed=seed)
    tensors = {"layer.weight": problem.weight, "layer.weight_scale_inv": problem.scale}
    theirs = converters.FP8BlockDequantizer(targets=["re:.*"], dtype=dtype).process(tensors)["layer.weight"]
    assert torch.equal(reference.dequantize_weight(problem.weight, problem.scale, dtype=dtype), theirs)


def test_dequantization_as_in_transformers() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    problem = random_problem(0, (384,), 256)
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(problem.weight, problem.scale, torch.bfloat16)
    assert torch.equal(reference.dequantize_weight(problem.weight, problem.scale), theirs)


def test_linear_as_naive_fp64_sums() -> None:
    """The fp64 oracle itself, against element-wise dequantized operands and numpy's own matmul."""
    problem = random_problem(5, (200, 70), 300, dtype=torch.float32)
    codes, x_scale = reference.quantize_activation(problem.x)
    x = codes.double().numpy() * np.repeat(x_scale.double().numpy(), 128, axis=1)[:, :300]
    grid = BlockGrid((200, 70), 300)
    rows = np.concatenate([np.repeat([0, 1], [128, 72]), np.repeat([2], 70)])
    w_scale = problem.scale.double().numpy()[rows].repeat(128, axis=1)[:, :300]
    want = x @ (problem.weight.double().numpy() * w_scale).T
    assert grid.scale_shape == tuple(problem.scale.shape)
    assert rel_l2(problem.oracle(), torch.from_numpy(want)) < 1e-14
    assert (
        rel_l2(reference.block_linear(problem.x, problem.weight, problem.scale, grid=grid), torch.from_numpy(want))
        < 1e-6
    )


def test_the_judges_tell_w8a8_from_w8a16_and_from_bf16_weights() -> None:
    problem = random_problem(32, (256,), 4096)
    want = problem.oracle()
    w8a8 = reference.block_linear(problem.x, problem.weight, problem.scale)
    w8a16 = reference.block_linear(problem.x, problem.weight, problem.scale, activation=Activation.W8A16)
    assert calc_diff(w8a8, want) < 1e-5 < calc_diff(w8a16, want)
    rounded = problem.x.double() @ reference.dequantize_weight(problem.weight, problem.scale).double().T
    assert rel_l2(rounded, problem.oracle(Activation.W8A16)) > 1e-3
