"""Bits of the CPU backend's results: run to run, over numbers of threads, and whatever else is in the batch."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import PackedWeight, cpu
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.judges import random_problem
from tests.support.cpu_levels import (
    ACTIVATIONS,
    DTYPES,
    ISAS,
    instruction_set,
    lacking,
    needs_cpu_backend,
    same_bits,
    threads,
)

pytestmark = needs_cpu_backend

THREADS = (1, 2, 3, 4, 8)
RAGGED = (576, 192, 192)
ROWS_OF_A_PASS = 700
"""More rows than any kernel takes at once (`Kernels::max_rows`)."""


@functools.cache
def packed_weight(widths: tuple[int, ...], k: int) -> PackedWeight:
    problem = random_problem(1, widths, k, seed=k)
    return ops.pack_weight(problem.weight, problem.scale, problem.grid, "cpu")


def cancelling_problem(m: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, PackedWeight]:
    """Each product and its opposite, shuffled: what is left of a sum is its rounding, which shows any other order."""
    generator = torch.Generator().manual_seed(11)
    x, weights = [], []
    for _ in range(2):
        order = torch.randperm(128, generator=generator)
        codes = torch.randint(0, 256, (n, 64), generator=generator, dtype=torch.uint8)
        codes = torch.where((codes & 0x7F) == 0x7F, codes ^ 1, codes)
        half = torch.randn(m, 64, generator=generator) * 2 ** (torch.rand(m, 64, generator=generator) * 8)
        weights.append(torch.cat([codes, codes ^ 0x80], 1)[:, order])
        x.append(torch.cat([half, half], 1)[:, order])
    weight = torch.cat(weights, 1).view(torch.float8_e4m3fn)
    return torch.cat(x, 1).to(dtype), ops.pack_weight(weight, torch.ones(-(-n // 128), 2), backend="cpu")


def everything(x: torch.Tensor, activation: Activation) -> list[torch.Tensor]:
    """All that the backend computes, from x and a weight that is packed anew."""
    problem = random_problem(1, RAGGED, x.shape[1], seed=3)
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, "cpu")
    return [
        *packed.tensors,
        ops.block_linear(x, packed, None, activation),
        *ops.quantize_activation(x, backend="cpu"),
        ops.dequantize_weight(problem.weight, problem.scale, problem.grid, x.dtype, backend="cpu"),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_bits_depend_neither_on_the_run_nor_on_the_number_of_threads(
    isa: str, activation: Activation, dtype: torch.dtype
) -> None:
    """15 pairs of panels of 41 KiB, and rows of which 25 make a thread's least part: 8 threads get something to do."""
    x = random_problem(257, (1,), 1300, dtype=dtype, seed=1).x
    with instruction_set(isa):
        for m in (1, 3, 257):
            with threads(1):
                want = everything(x[:m], activation)
            for count in THREADS:
                with threads(count):
                    got = everything(x[:m], activation)
                assert all(map(same_bits, got, want)), f"m = {m}, {count} threads"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=10)
@given(
    dtype=st.sampled_from(DTYPES),
    m=st.integers(1, 80),
    widths=st.lists(st.integers(1, 700), min_size=1, max_size=3).map(tuple),
    k=st.integers(1, 1500),
    count=st.sampled_from(THREADS),
)
def test_bits_of_any_shape_are_those_of_one_thread(
    isa: str, activation: Activation, dtype: torch.dtype, m: int, widths: tuple[int, ...], k: int, count: int
) -> None:
    x = random_problem(m, (1,), k, dtype=dtype, seed=m).x
    packed = packed_weight(widths, k)
    with instruction_set(isa):
        with threads(1):
            want = ops.block_linear(x, packed, None, activation)
        with threads(count):
            assert same_bits(ops.block_linear(x, packed, None, activation), want)


def _noise(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _filled(value: float) -> Callable[[tuple[int, int], torch.Generator], torch.Tensor]:
    return lambda shape, generator: torch.full(shape, value)


def _any_bits(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Any fp32 numbers, with NaN, infinities and subnormals among them."""
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).int().view(torch.float32)


OTHERS: dict[str, Callable[[tuple[int, int], torch.Generator], torch.Tensor]] = {
    "noise": _noise,
    "zero": _filled(0.0),
    "NaN": _filled(float("nan")),
    "infinite": _filled(-float("inf")),
    "huge": _filled(3e38),
    "tiny": _filled(1e-41),
    "any bits": _any_bits,
}
"""What the other rows of a batch may hold."""


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60)
@given(data=st.data())
def test_a_row_does_not_depend_on_its_batch(isa: str, activation: Activation, data: st.DataObject) -> None:
    """One row, in two batches of any size among rows of any kind."""
    dtype = data.draw(st.sampled_from(DTYPES))
    k = data.draw(st.sampled_from([4, 36, 129, 300, 576]))
    packed = packed_weight((96, 33), k)
    sizes = st.integers(1, 40) | st.integers(1, ROWS_OF_A_PASS)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    row = random_problem(1, (1,), k, dtype=dtype, seed=data.draw(st.integers(0, 99))).x[0]
    results = []
    with instruction_set(isa), threads(data.draw(st.sampled_from([1, 2]))):
        for m in (data.draw(sizes), data.draw(sizes)):
            x = OTHERS[data.draw(st.sampled_from(sorted(OTHERS)))]((m, k), generator).to(dtype)
            at = data.draw(st.integers(0, m - 1))
            x[at] = row
            results.append(ops.block_linear(x, packed, None, activation)[at])
    assert results[0].isfinite().all()
    assert same_bits(results[0], results[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_bits_are_the_same_in_batches_of_any_size(isa: str, activation: Activation, dtype: torch.dtype) -> None:
    """The same row first and last in batches of 1 row to more than a pass."""
    rows, packed = cancelling_problem(ROWS_OF_A_PASS, 200, dtype)
    ends = (85, 170, 172, 256, 258, 512, 516)  # of passes, where a row is one, two or three rows of bf16
    sizes = [*range(1, 27), 33, 37, 49, 61, 64, 65, 97, 128, 160, *(n + i for n in ends for i in range(3))]
    with instruction_set(isa):
        alone = ops.block_linear(rows[:1], packed, None, activation)[0]
        for m in sorted(sizes):
            # In a batch slightly longer than a pass, the last row is in a pass of few rows.
            x = torch.cat([rows[: m - 1], rows[:1]])
            y = ops.block_linear(x, packed, None, activation)
            assert same_bits(y[0], y[-1]), f"first and last row of {m}"
            assert same_bits(y[0], alone), f"alone and among {m}"


@pytest.mark.parametrize("isa", ISAS)
def test_bits_are_the_same_when_subnormal_numbers_are_taken_for_zero(isa: str) -> None:
    """A program may tell its processor so; kernels may decode e4m3's subnormals to fp32's."""
    x = random_problem(20, (1,), 300, dtype=torch.float32).x
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 8, (96, 300), generator=generator, dtype=torch.uint8)  # 2^-9 to 7 * 2^-9
    codes |= torch.randint(0, 2, codes.shape, generator=generator, dtype=torch.uint8) << 7
    packed = ops.pack_weight(codes.view(torch.float8_e4m3fn), torch.ones(1, 3), backend="cpu")

    def results() -> list[torch.Tensor]:
        return [ops.block_linear(x[:m], packed, None, activation) for m in (1, 2, 3, 20) for activation in ACTIVATIONS]

    with instruction_set(isa), threads(1):
        want = results()
        if not torch.set_flush_denormal(True):
            pytest.skip("torch cannot have this processor take subnormal numbers for zero")
        try:
            assert torch.tensor(1e-41) * 1.0 == 0.0
            got = results()
        finally:
            torch.set_flush_denormal(False)
    assert all(y.count_nonzero() > 0 for y in want)
    assert all(map(same_bits, got, want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=100)
@given(top=st.integers(-60, 126), gap=st.integers(0, 220), seed=st.integers(0, 2**31))
@example(top=60, gap=150, seed=0)
def test_numbers_far_apart_have_the_bits_of_a_batch(
    isa: str, dtype: torch.dtype, top: int, gap: int, seed: int
) -> None:
    """One and two rows alone and among five. The largest number meets a zero; the others are 2^gap times as small."""
    generator = torch.Generator().manual_seed(seed)
    exponents = top - gap - 30 * torch.rand(5, 128, generator=generator).double()
    exponents[:, 5] = top
    x = torch.exp2(exponents).to(dtype).nan_to_num(0.0, 0.0, 0.0)
    codes = torch.randint(0, 127, (64, 128), generator=generator, dtype=torch.uint8)
    codes[:, 5] = 0
    packed = ops.pack_weight(codes.view(torch.float8_e4m3fn), torch.ones(1, 1), backend="cpu")
    with instruction_set(isa):
        want = ops.block_linear(x, packed, None, Activation.W8A16)
        for m in (1, 2):
            assert same_bits(ops.block_linear(x[:m], packed, None, Activation.W8A16), want[:m]), f"{m} rows"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_registers_of_512_bits_give_the_bits_of_256(activation: Activation) -> None:
    """What has AVX-512 without bf16 instructions adds as AVX2 does, however many rows share a register."""
    for name in ("avx2", "avx512f"):
        if reason := lacking(name):
            pytest.skip(reason)
    rows, packed = cancelling_problem(130, 200, torch.float32)
    for m in (*range(1, 20), 40, 41, 130):
        results = []
        for name in ("avx2", "avx512f"):
            with instruction_set(name):
                results.append(ops.block_linear(rows[:m], packed, None, activation))
        assert same_bits(*results), f"{m} rows"
    with instruction_set("portable"):
        other = ops.block_linear(rows, packed, None, activation)
    assert not same_bits(other, results[0])


def test_levels_are_those_of_the_document() -> None:
    """docs/reliability_kernels.md says for each instruction set how many rows take registers."""
    document = (Path(__file__).parents[2] / "docs" / "reliability_kernels.md").read_text()
    rows = (
        document.partition("<!-- table: levels -->")[2].partition("<!-- end of table -->")[0].strip().splitlines()[2:]
    )
    table = {row[0]: row[1] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in rows)}
    assert set(table) == {isa for levels in cpu.ISAS_OF_ARCHITECTURE.values() for isa in levels}
    for isa in cpu.ISAS:
        limit = cpu.register_rows(isa)
        limits = re.findall(r"\bm <= (\d+)", table[isa])  # of a processor's cores
        assert str(limit) in limits if limit else table[isa] == "never", isa
    assert cpu.BACKEND.plan is not None
    plan = dict(cpu.BACKEND.plan())
    limit = cpu.register_rows(cpu.isa())
    assert list(plan) == ([f"m <= {limit}", f"m > {limit}"] if limit else ["any"])
