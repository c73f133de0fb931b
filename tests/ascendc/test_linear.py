"""block_linear and block_gemv against the fp64 oracle of what they compute."""

from __future__ import annotations

import pytest
import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends import ascendc
from qwen3_fp8_ascend.format import Activation

from .conftest import (
    DTYPES,
    FLAG_COUNTING,
    Emulator,
    EmulatorFault,
    Weight,
    random_activation,
    random_weight,
    relative_error,
)

both_ways_of_counting_flags = pytest.mark.parametrize("emulator", FLAG_COUNTING, indirect=True)
"""For shapes, cores and chips, which decide what flags are set and waited for; the values of operands do not."""
REQUIRED = 5e-4  # of the issue, w8a8 before the output is rounded
EXACT = 1e-6  # what block-scaled fp32 reaches; the contract's figure for fp32 outputs

# Qwen3-8B's four linears, each side divided by 16 (n, k), qkv as three merged shards.
QWEN3_8B_SCALED = {"qkv": ((256, 64, 64), 256), "o": ((256,), 256), "gate_up": ((768, 768), 256), "down": ((256,), 768)}


def oracle_of(x: torch.Tensor, weight: Weight, activation: Activation = Activation.W8A8) -> torch.Tensor:
    return reference.block_linear(
        x, weight.codes, weight.scale, activation=activation, grid=weight.grid, compute_dtype=torch.float64
    )


@both_ways_of_counting_flags
@pytest.mark.parametrize("m", [2, 16])
@pytest.mark.parametrize("name", QWEN3_8B_SCALED)
def test_qwen3_8b_shapes_scaled_down(emulator: Emulator, name: str, m: int) -> None:
    widths, k = QWEN3_8B_SCALED[name]
    weight = random_weight(widths, k)
    x = random_activation(m, k, torch.float32)
    got, _ = emulator.linear("block_linear", x, weight.tensors, weight.grid.n, cores=5)
    error = relative_error(got, oracle_of(x, weight))
    assert error <= REQUIRED
    assert error <= EXACT


@both_ways_of_counting_flags
@pytest.mark.parametrize("cores", [1, 2, 20])
@pytest.mark.parametrize(
    ("m", "widths", "k"),
    [
        (1, (128,), 128),
        (3, (200, 72), 300),
        (17, (130,), 641),
        (33, (1, 127), 1),
        (64, (100,), 1000),
        (8, (64, 64), 129),
    ],
)
def test_ragged_shapes(emulator: Emulator, m: int, widths: tuple[int, ...], k: int, cores: int) -> None:
    weight = random_weight(widths, k, seed=m)
    x = random_activation(m, k, torch.float32)
    got, _ = emulator.linear("block_linear", x, weight.tensors, weight.grid.n, cores=cores)
    assert relative_error(got, oracle_of(x, weight)) <= EXACT


@pytest.mark.parametrize("cores", [1, 3, 20])
@pytest.mark.parametrize(("widths", "k"), [((128,), 128), ((200, 72), 300), ((384,), 641), ((1,), 1), ((256,), 4224)])
def test_gemv(emulator: Emulator, widths: tuple[int, ...], k: int, cores: int) -> None:
    weight = random_weight(widths, k)
    x = random_activation(1, k, torch.float32)
    got, _ = emulator.linear("block_gemv", x, weight.tensors, weight.grid.n, cores=cores)
    assert relative_error(got, oracle_of(x, weight)) <= EXACT


@both_ways_of_counting_flags
@pytest.mark.parametrize("kernel", ["block_linear", "block_gemv"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_outputs_are_the_rounded_oracle(emulator: Emulator, kernel: str, dtype: torch.dtype) -> None:
    weight = random_weight((384,), 512, spread=1.0)
    m = 1 if kernel == "block_gemv" else 6
    x = (torch.randn(m, 512, generator=torch.Generator().manual_seed(3)) / 16).to(dtype)
    got, _ = emulator.linear(kernel, x, weight.tensors, 384)
    expected = oracle_of(x, weight).to(dtype)
    assert (got == expected).float().mean() >= 0.995
    assert relative_error(got, oracle_of(x, weight)) <= 3e-3  # the rounding of the output


@pytest.mark.parametrize("kernel", ["block_linear", "block_gemv"])
@pytest.mark.parametrize("bias_dtype", ["of x", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_is_added_in_fp32_before_the_only_rounding(
    emulator: Emulator, kernel: str, dtype: torch.dtype, bias_dtype: str
) -> None:
    weight = random_weight((130, 62), 256, spread=1.0)
    m = 1 if kernel == "block_gemv" else 5
    x = (torch.randn(m, 256, generator=torch.Generator().manual_seed(4)) / 16).to(dtype)
    bias = torch.randn(192, generator=torch.Generator().manual_seed(5)).to(
        dtype if bias_dtype == "of x" else torch.float32
    )
    # fp32 activations of the same values give the same sums, not yet rounded to dtype.
    sums, _ = emulator.linear(kernel, x.float(), weight.tensors, 192)
    got, _ = emulator.linear(kernel, x, weight.tensors, 192, bias=bias)
    expected = (sums + bias.float()).to(dtype)
    assert torch.equal(got, expected)
    if dtype != torch.float32:
        assert not torch.equal(sums.to(dtype) + bias.to(dtype), expected), "rounding twice must differ somewhere"


@pytest.mark.parametrize("kernel", ["block_linear", "block_gemv"])
def test_w8a16(emulator: Emulator, kernel: str) -> None:
    """bf16 activations are used as they are; fp32 ones are rounded to fp16 within their group."""
    weight = random_weight((200,), 300)
    m = 1 if kernel == "block_gemv" else 4
    x = random_activation(m, 300, torch.bfloat16)
    exact, _ = emulator.linear(kernel, x.float(), weight.tensors, 200, activation=ascendc.ACTIVATIONS[Activation.W8A16])
    assert relative_error(exact, oracle_of(x.float(), weight, Activation.W8A16)) <= EXACT
    fine = random_activation(m, 300, torch.float32)
    rounded, _ = emulator.linear(kernel, fine, weight.tensors, 200, activation=ascendc.ACTIVATIONS[Activation.W8A16])
    assert EXACT < relative_error(rounded, oracle_of(fine, weight, Activation.W8A16)) <= REQUIRED


def test_w8a8_and_w8a16_are_told_apart(emulator: Emulator) -> None:
    """The oracle of the one is far from the other: a test that accepted both would prove nothing."""
    weight = random_weight((128,), 512)
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(2))
    got, _ = emulator.linear("block_linear", x, weight.tensors, 128)
    assert relative_error(got, oracle_of(x, weight, Activation.W8A16)) > 1e-2


@both_ways_of_counting_flags
def test_a_row_does_not_depend_on_the_others(emulator: Emulator) -> None:
    weight = random_weight((256,), 640)
    x = random_activation(40, 640, torch.bfloat16)
    together, _ = emulator.linear("block_linear", x, weight.tensors, 256)
    for row in (0, 7, 39):
        alone, _ = emulator.linear("block_linear", x[row : row + 1], weight.tensors, 256)
        assert torch.equal(alone[0], together[row])


@both_ways_of_counting_flags
def test_nan_and_infinity_stay_in_their_row(emulator: Emulator) -> None:
    weight = random_weight((128,), 256)
    x = random_activation(3, 256, torch.float32)
    clean, _ = emulator.linear("block_linear", x, weight.tensors, 128)
    x[1, 5] = float("nan")
    got, _ = emulator.linear("block_linear", x, weight.tensors, 128)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("kernel", ["block_linear", "block_gemv"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(Activation))
def test_nan_and_infinity_are_those_of_the_specification(
    emulator: Emulator, activation: Activation, dtype: torch.dtype, kernel: str
) -> None:
    """Unquantized, an infinity takes the weight's sign and is NaN where the weight is zero; quantized, all is NaN."""
    weight = random_weight((130,), 300)
    weight.codes.view(torch.uint8)[::5, ::3] = 0
    x = (random_activation(6, 300, torch.float32) / 256).to(dtype)  # so that fp16 outputs are finite
    x[0, 3] = float("inf")
    x[1, 299] = -float("inf")
    x[2, 3], x[2, 4] = float("inf"), -float("inf")
    x[3, 3], x[3, 140] = float("inf"), float("inf")
    x[4, 3], x[4, 4] = float("inf"), float("nan")
    rows = x.split(1) if kernel == "block_gemv" else [x]
    parts = [
        emulator.linear(kernel, row, weight.tensors, 130, activation=ascendc.ACTIVATIONS[activation])[0] for row in rows
    ]
    got, oracle = torch.cat(parts), oracle_of(x, weight, activation).to(dtype)
    assert torch.equal(got.isnan(), oracle.isnan())
    assert torch.equal(got.isposinf(), oracle.isposinf())
    assert torch.equal(got.isneginf(), oracle.isneginf())
    assert got[5].isfinite().all()
    if activation == Activation.W8A16:
        for value in (oracle.isnan(), oracle.isposinf(), oracle.isneginf()):
            assert 0 < int(value[:4].sum()) < value[:4].numel(), "the weights must give all three"


@both_ways_of_counting_flags
@pytest.mark.parametrize("chip", ["910B1", "910B4", "910_9391"])
def test_other_chips_have_the_memories_that_the_kernels_need(emulator: Emulator, chip: str) -> None:
    weight = random_weight((256,), 1024)
    x = random_activation(64, 1024, torch.float32)
    got, _ = emulator.linear("block_linear", x, weight.tensors, 256, chip=chip)
    assert relative_error(got, oracle_of(x, weight)) <= EXACT


def test_an_unknown_chip_is_refused_by_name(emulator: Emulator) -> None:
    weight = random_weight((128,), 128)
    with pytest.raises(EmulatorFault, match=r"910B1, 910B3, 910B4 and 910_9391") as fault:
        emulator.linear("block_linear", torch.ones(1, 128), weight.tensors, 128, chip="950")
    assert fault.value.name == "unknown-chip"


def test_bytes_a_weight_on_every_path(emulator: Emulator) -> None:
    """One byte from HBM, two out to L2 and two back in, as the roofline assumes; GEMV needs the first alone."""
    n, k = 512, 1024
    weight = random_weight((n,), k)
    _, linear = emulator.linear("block_linear", random_activation(1, k, torch.bfloat16), weight.tensors, n)
    per_weight = {path: count / (n * k) for path, count in linear["bytes"].items()}
    assert per_weight["HBM->UB"] == pytest.approx(1.0, abs=0.005)
    assert per_weight["UB->L2"] == pytest.approx(2.0, rel=0.05)
    assert per_weight["L1->L0B"] == pytest.approx(2.0)
    assert 2.0 <= per_weight["L2->L1"] <= 2.3  # 16 rows of activations on top
    _, gemv = emulator.linear("block_gemv", random_activation(1, k, torch.bfloat16), weight.tensors, n)
    assert gemv["bytes"]["HBM->UB"] / (n * k) == pytest.approx(1.0, abs=0.005)
    assert gemv["bytes"]["UB->L2"] / (n * k) < 0.05
