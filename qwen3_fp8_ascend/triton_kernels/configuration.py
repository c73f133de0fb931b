"""Static launch configuration, per architecture and shape class. No autotuning: a decision is a line in a table.

`@triton.autotune` needs a device when a kernel is defined, and measures inside the first request.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import ceil_div

INDEX_LIMIT = 2**31 - 1
"""Kernels compute element offsets in int32."""

SPLIT_K_LIMIT = 8
MIN_BLOCKS_PER_SPLIT = 4
"""A split of fewer K blocks costs more in partial sums than it gains in balance."""

ROW_TILES = (16, 32, 64)
"""Choices of BLOCK_M, beside a chip's `large_rows`. The cube's smallest tile has 16 rows."""

N_ALIGNMENT = 256
"""A packed weight's rows are padded to this, the widest BLOCK_N."""


@dataclass(frozen=True)
class Architecture:
    """What a launch needs to know about a chip.

    Sizes are chosen so that no kernel's memory plan takes more than three quarters of UB: the compiler that comes
    with a user's CANN is not the one that was tested.

    names: prefixes of the names under which the chip is known (`torch.npu.get_device_name`, `--target=`).
    keeps_subnormals: whether fp16 subnormals are known to survive arithmetic, which makes decoding cheaper;
        None where nobody has looked, and then the device is asked once (`backends/triton/launch.py`).
    large_rows: the largest BLOCK_M.
    bind_sub_block: whether the compiler may split a cube-and-vector kernel over both vector cores.
    wide_rows, wide_rows_subnormals: up to which BLOCK_M a tile is 256 weight rows wide instead of 128, without and
        with subnormals: the wider it is, the less the fixed cost of a vector instruction weighs, as far as UB goes.
    linear_options: compiler options for `block_linear_kernel`.
    """

    names: tuple[str, ...]
    keeps_subnormals: bool | None
    quantize_rows: int = 16
    value_rows: int = 16
    dequantize_rows: int = 32
    packed_rows: int = 32
    large_rows: int = 64
    bind_sub_block: bool = True
    wide_rows: int = 0
    wide_rows_subnormals: int = 0
    linear_options: tuple[tuple[str, int], ...] = ()


ASCEND_A2_A3 = Architecture(
    names=("Ascend910B", "Ascend910_93"),
    keeps_subnormals=None,
    wide_rows_subnormals=32,
)

ASCEND_950 = Architecture(
    names=("Ascend950", "Ascend910_95"),
    keeps_subnormals=None,
    bind_sub_block=False,  # ascendnpu-ir 1.1.0 crashes on any kernel whose cube operand comes from a vector core
)

NVIDIA = Architecture(
    names=("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:103", "cuda:120"),
    keeps_subnormals=True,  # PTX: fp16 arithmetic supports subnormals, and so does mma
    linear_options=(("num_warps", 8), ("num_stages", 3)),
)

INTERPRETER = Architecture(names=("interpreter",), keeps_subnormals=True)

ARCHITECTURES = (ASCEND_A2_A3, ASCEND_950, NVIDIA, INTERPRETER)


@dataclass(frozen=True)
class LinearShape:
    """How one (m, n, k) is cut up."""

    block_m: int
    block_n: int
    split_k: int
    m_padded: int


def architecture(name: str) -> Architecture:
    """The configuration of a chip.

    Raises:
        BlockFp8Error: there is none; the message names those that exist.
    """
    for candidate in ARCHITECTURES:
        if name.startswith(candidate.names) and (not name.startswith("cuda") or name in candidate.names):
            return candidate
    known = ", ".join(prefix for candidate in ARCHITECTURES for prefix in candidate.names)
    raise BlockFp8Error(
        "the Triton kernels have no configuration for this chip",
        expected=f"a name that begins with one of: {known}",
        got=repr(name),
        fix="choose another backend, or add the chip to triton_kernels/configuration.py and run its tests",
    )


def row_tile(m: int, chip: Architecture) -> int:
    """BLOCK_M for an activation of m rows."""
    return next((rows for rows in ROW_TILES if m <= rows <= chip.large_rows), chip.large_rows)


def column_tile(block_m: int, chip: Architecture, keeps_subnormals: bool) -> int:
    """BLOCK_N that goes with a BLOCK_M."""
    wide = chip.wide_rows_subnormals if keeps_subnormals else chip.wide_rows
    return 256 if block_m <= wide else 128


def linear_shape(
    m: int, n_padded: int, k_blocks: int, cores: int, chip: Architecture, keeps_subnormals: bool
) -> LinearShape:
    """Tiles and split of K for a linear of m rows.

    The split is the smallest that keeps the cores about busiest: 16 tiles on 20 cores leave a fifth of them idle,
    five stretches of K each leave none.
    """
    block_m = row_tile(m, chip)
    block_n = column_tile(block_m, chip, keeps_subnormals)
    m_tiles = ceil_div(m, block_m)
    tiles = m_tiles * (n_padded // block_n)

    def busy(split: int) -> float:
        return tiles * split / (ceil_div(tiles * split, cores) * cores)

    allowed = [s for s in range(1, SPLIT_K_LIMIT + 1) if s == 1 or ceil_div(k_blocks, s) >= MIN_BLOCKS_PER_SPLIT]
    best = max(busy(split) for split in allowed)
    # A twentieth of the time is about what another round of partial sums costs.
    split_k = next(split for split in allowed if busy(split) >= best - 0.05)
    return LinearShape(block_m, block_n, split_k, m_tiles * block_m)


def grouped_shape(m: int, groups: int, chip: Architecture, keeps_subnormals: bool) -> LinearShape:
    """Tiles for m rows that belong to groups, of which only the device knows the sizes.

    A tile has as many rows as a group has on average; larger groups take several passes. Rows are not moved to where a
    tile begins, so behind the last one there is room for what a tile reads beyond. K is not split: a row's sum is the
    same wherever the others go, and even one token's experts have tiles for all cores.
    """
    block_m = row_tile(ceil_div(m, groups), chip)
    padded = ceil_div(m + block_m - 1, chip.value_rows) * chip.value_rows
    return LinearShape(block_m, column_tile(block_m, chip, keeps_subnormals), 1, padded)


def check_index_range(what: str, elements: int) -> None:
    """Refuse a tensor whose offsets do not fit the kernels' int32.

    Raises:
        BlockFp8Error: with the size and the limit.
    """
    if elements > INDEX_LIMIT:
        raise BlockFp8Error(
            f"{what} is too large for the Triton kernels' 32-bit offsets",
            expected=f"at most {INDEX_LIMIT} elements",
            got=elements,
            fix="split the tensor, or choose another backend",
        )
