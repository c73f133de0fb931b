"""The grouped linear as the compilers lowered it, executed on x86; defects planted in its source are found."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from qwen3_fp8_ascend.triton_kernels import block_grouped_linear
from qwen3_fp8_ascend.triton_kernels.block_grouped_linear import block_grouped_linear_specification
from tests.support.triton_ascend import cases
from tests.support.triton_ascend.compiler import IR_VERSIONS, compile_to_hivm, lower_to_linalg
from tests.support.triton_ascend.execution import CHIP, CORES, FORMS, executable, grouped_operands, relative
from tests.support.triton_ascend.hivm_executor import HivmKernel
from tests.support.triton_ascend.hivm_intrinsics import OutOfBounds

GROUPS = {
    "uneven and empty": (3, 0, 17, 0, 0, 1, 9),
    "all on one": (0, 0, 70, 0),
    "one row each": (1,) * 8,
    "none": (0, 0),
}


TILES = ((16, True), (16, False), (32, True), (64, True))
TILES_AND_GROUPS = [
    pytest.param(*tile, counts, id=f"{name}-{tile[0]}-{tile[1]}", marks=[] if short else pytest.mark.long)
    for tile, (name, counts) in itertools.product(TILES, GROUPS.items())
    for short in [tile == TILES[0] or name in ("uneven and empty", "all on one")]
]
"""(BLOCK_M, with subnormals, rows a group): all groups with one tile, with the others those that fill more than one."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("block_m", "subnormals", "counts"), TILES_AND_GROUPS)
def test_grouped_linear(counts, block_m, subnormals, form):
    n, k_blocks, owned = 256, 2, sum(counts)
    m = owned + 2  # two rows are nobody's
    m_padded = -(-(m + block_m - 1) // 16) * 16
    operands = grouped_operands(len(counts), m_padded, n, k_blocks)
    ends, out = torch.tensor(counts).cumsum(0), torch.full((m, n), 7.0)
    kernel = executable(cases.grouped_linear_case(block_m, subnormals, CORES), form)
    kernel((CORES,), *operands, ends, out, m, m_padded, n, k_blocks, len(counts))
    expected = block_grouped_linear_specification(*operands, ends)[:m]
    assert (out[:owned].double() - expected[:owned]).norm() <= 1e-6 * expected[:owned].norm()
    assert (out[owned:] == 7.0).all(), "rows that are nobody's were written"


@pytest.mark.parametrize("form", FORMS)
def test_tiles_go_round_the_cores(form):
    """Of all groups without a seam: launched on some of the cores alone, every so many of them are missing."""
    counts, n, k_blocks, m, m_padded = (5, 0, 20, 3), 512, 2, 28, 48
    operands, ends = grouped_operands(len(counts), m_padded, n, k_blocks), torch.tensor(counts).cumsum(0)
    kernel = executable(cases.grouped_linear_case(16, False, CORES), form)
    for launched in range(1, CORES + 1):
        out = torch.full((m, n), 7.0)
        kernel((launched,), *operands, ends, out, m, m_padded, n, k_blocks, len(counts))
        tiles = [out[rows, column : column + 128] for rows in PASSES for column in range(0, n, 128)]
        assert [bool((tile != 7.0).all()) for tile in tiles] == [i % CORES < launched for i in range(len(tiles))]


PASSES = (slice(0, 5), slice(5, 21), slice(21, 25), slice(25, 28))
"""Rows that are multiplied together where groups have 5, 0, 20 and 3, at most 16 at a time."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ends", [(9, 2, 30, 4), (-5, 3, 3, 90), (2**31 + 1, 2**40, 7, -(2**35))])
def test_a_list_that_is_none_leaves_no_operand(ends, form):
    """Decreasing, negative, beyond the last row, beyond 32 bits: what is read and written is still the operands'."""
    n, k_blocks, m, m_padded = 256, 2, 20, 48
    operands = grouped_operands(4, m_padded, n, k_blocks)
    guarded = torch.full((m + 64, n), 7.0)
    kernel = executable(cases.grouped_linear_case(16, True, CORES), form)
    kernel((CORES,), *operands, torch.tensor(ends), guarded[:m], m, m_padded, n, k_blocks, 4)
    assert (guarded[m:] == 7.0).all()


def planted(old, new, folder):
    """The case of the grouped kernel whose source has one thing changed."""
    source = Path(block_grouped_linear.__file__).read_text()
    assert not old or old in source, f"the kernel no longer has {old!r}"
    file = folder / "defective.py"
    file.write_text(source.replace(old, new) if old else source)
    spec = importlib.util.spec_from_file_location("defective", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    case = cases.grouped_linear_case(16, True, CORES)
    return dataclasses.replace(case, name=f"{old} -> {new}", function=module.block_grouped_linear_kernel)


def beyond_32_bits(kernel):
    """The error of a layer of 4.3 GB of lanes; memory that nothing touches is never there: two experts are real."""
    n, k_blocks = 2048, 16
    groups = (1 << 31) // (n * k_blocks * 64) + 2
    values, a_scale, two_lanes, two_scales = grouped_operands(2, 32, n, k_blocks)
    lanes = torch.empty(groups, *two_lanes.shape[1:], dtype=torch.int16)
    w_scale = torch.empty(groups, k_blocks, n)
    lanes[0], lanes[-1], w_scale[0], w_scale[-1] = *two_lanes, *two_scales
    assert lanes[-1].storage_offset() > 2**31
    ends, out = torch.full((groups,), 3), torch.zeros(7, n)
    ends[-1] = 7
    kernel((CORES,), values, a_scale, lanes, w_scale, ends, out, 7, 32, n, k_blocks, groups)
    expected = block_grouped_linear_specification(values, a_scale, two_lanes, two_scales, torch.tensor((3, 7)))
    return relative(out, expected[:7])


@pytest.mark.parametrize("form", FORMS)
def test_grouped_weights_beyond_32_bits(form):
    assert beyond_32_bits(executable(cases.grouped_linear_case(16, True, CORES), form)) <= 1e-6


def test_offsets_of_32_bits_would_be_found(tmp_path):
    case = planted("tl.cast(group, tl.int64)", "group", tmp_path)
    with pytest.raises(OutOfBounds):
        beyond_32_bits(HivmKernel(compile_to_hivm(lower_to_linalg(case, CHIP), CHIP, IR_VERSIONS[-1])))


DEFECTS = {
    "nothing": ("", ""),
    "the scales of another expert": (
        "tl.cast(group, tl.int64) * (k_blocks * n)",
        "tl.cast(group // 2, tl.int64) * (k_blocks * n)",
    ),
    "the weight of another expert": ("tl.cast(group, tl.int64) * ((k", "tl.cast(group // 2, tl.int64) * ((k"),
    "an end one row early": ("mask=m_row[:, None] < end", "mask=m_row[:, None] < end - 1"),
    "an end one row late": ("first), m)", "first) + 1, m)"),
    "the last rows that fill no tile are lost": ("tl.cdiv(end - first, BLOCK_M)", "((end - first) // BLOCK_M)"),
    "rows beyond the expert's end are written": (", mask=m_row[:, None] < end", ""),
    "a tile that no core takes": ("(core + CORES - passed % CORES) % CORES", "core + passed % CORES"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_planted_in_the_grouped_kernel_are_found(defect, tmp_path):
    """In its source, compiled like the kernel."""
    case = planted(*DEFECTS[defect], tmp_path)
    counts, n, k_blocks = (5, 1, 20, 0, 3), 256, 2
    m, m_padded = sum(counts) + 2, 64
    operands = grouped_operands(len(counts), m_padded, n, k_blocks)
    ends, out = torch.tensor(counts).cumsum(0), torch.zeros(m_padded, n)
    kernel = HivmKernel(compile_to_hivm(lower_to_linalg(case, CHIP), CHIP, IR_VERSIONS[-1]))
    kernel((CORES,), *operands, ends, out, m, m_padded, n, k_blocks, len(counts))
    distance = relative(out, block_grouped_linear_specification(*operands, ends))
    assert distance <= 1e-6 if defect == "nothing" else distance > 1e-3
