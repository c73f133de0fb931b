"""The static configuration; needs no Triton."""

import itertools

import pytest

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.triton_kernels.configuration import (
    ARCHITECTURES,
    ASCEND_950,
    ASCEND_A2_A3,
    INDEX_LIMIT,
    N_ALIGNMENT,
    NVIDIA,
    architecture,
    check_index_range,
    linear_shape,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Ascend910B1", ASCEND_A2_A3),
        ("Ascend910B3", ASCEND_A2_A3),
        ("Ascend910B4", ASCEND_A2_A3),
        ("Ascend910_9392", ASCEND_A2_A3),
        ("Ascend950PR_9589", ASCEND_950),
        ("Ascend910_9589", ASCEND_950),
        ("cuda:90", NVIDIA),
    ],
)
def test_chip_names(name, expected):
    assert architecture(name) is expected


@pytest.mark.parametrize("name", ["Ascend310P3", "Ascend910A", "cuda:70", "cuda:900", ""])
def test_unknown_chip_names_the_known_ones(name):
    with pytest.raises(BlockFp8Error) as caught:
        architecture(name)
    for prefix in (prefix for chip in ARCHITECTURES for prefix in chip.names):
        assert prefix in str(caught.value)


def test_index_range():
    check_index_range("x", INDEX_LIMIT)
    with pytest.raises(BlockFp8Error, match="32-bit"):
        check_index_range("x", INDEX_LIMIT + 1)


LINEARS = tuple(itertools.product((1, 16, 17, 32, 33, 512, 1000), (256, 4096, 6144, 24576), (2, 32, 96)))
"""(m, n, blocks of K)."""


@pytest.mark.parametrize("chip", ARCHITECTURES)
@pytest.mark.parametrize("subnormals", [False, True])
def test_shapes_are_whole_tiles_and_every_split_has_work(chip, subnormals):
    for m, n, k_blocks in LINEARS:
        cut, linear = linear_shape(m, n, k_blocks, 20, chip, subnormals), f"m={m}, n={n}, {k_blocks} blocks of K"
        assert cut.m_padded >= m and cut.m_padded % cut.block_m == 0 and cut.m_padded % chip.value_rows == 0, linear
        assert n % cut.block_n == 0 and N_ALIGNMENT % cut.block_n == 0, linear
        assert (cut.split_k - 1) * -(-k_blocks // cut.split_k) < k_blocks, linear


def test_split_fills_idle_cores():
    cut = linear_shape(1, 4096, 32, 20, ASCEND_A2_A3, True)  # 16 tiles on 20 cores
    tiles = 4096 // cut.block_n * cut.split_k
    assert tiles / (-(-tiles // 20) * 20) >= 0.9
