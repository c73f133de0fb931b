"""How a linear is cut into programs, by chip and number of tokens: a table, no tuning at anybody's first request.

Where the numbers come from: on an H100 a prototype was fastest, of the few shapes tried, at up to 16 tokens with 256 to
800 programs of 32 or 64 rows, 4 warps and 3 to 5 stages, and from 64 tokens on with the weight as first operand. The
rest follows from what the compiler says of registers and shared memory (tests/triton_kernels/test_nvidia_compiled.py).
`python -m benchmarks.nvidia_shapes` measures the neighbours of each line on the GPU that is there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import ceil_div

SPLIT_K_LIMIT = 8
MIN_BLOCKS_PER_SPLIT = 4
"""Fewer K blocks do not fill the stages of a program."""


@dataclass(frozen=True)
class Tile:
    """What a program computes.

    block_m, block_n: tokens and rows of the weight. block_n divides 128.
    warps, stages: of a program; stages are K blocks in flight, fewer where shared memory ends.
    w_first: the weight is the first operand of the product, and the tokens the short side of an MMA.
    programs: K is split until there are so many for each multiprocessor. Small tiles wait for memory, and several
        programs share a multiprocessor; a large one has it for itself.
    scales_early: the tokens' scales are asked for a K block before. Where that costs a multiprocessor one of its
        programs, for want of registers, it is slower.
    ahead: K blocks of the weight, at most, that L2 is asked for before the launch before has ended, where launches may
        be dependent; a power of two, or 0.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    w_first: bool
    programs: float
    scales_early: bool = True
    ahead: int = 8


@dataclass(frozen=True)
class Line:
    """The tile for so many tokens, and the one for weights of `WIDE` rows and more, if that is another."""

    tokens: int
    tile: Tile
    wide: Tile | None = None


WIDE = 16384

LINES = (
    Line(16, Tile(16, 64, warps=4, stages=6, w_first=False, programs=2.9)),
    Line(32, Tile(32, 64, warps=4, stages=4, w_first=True, programs=1.5)),
    Line(
        64,
        Tile(64, 128, warps=8, stages=3, w_first=True, programs=0.7, scales_early=False),
        wide=Tile(32, 128, warps=4, stages=3, w_first=False, programs=0.7, scales_early=False),
    ),
    Line(1 << 30, Tile(128, 64, warps=4, stages=3, w_first=True, programs=0.7, ahead=0)),
)
"""For Hopper. The first that holds all tokens."""

WITHOUT_WGMMA = (
    Line(16, Tile(16, 32, warps=4, stages=5, w_first=False, programs=1.5), wide=Tile(16, 64, 4, 4, False, 1.5)),
    Line(32, Tile(32, 64, warps=4, stages=4, w_first=True, programs=1.5)),
    Line(64, Tile(64, 64, warps=4, stages=4, w_first=True, programs=1.5)),
    Line(1 << 30, Tile(128, 64, warps=8, stages=3, w_first=True, programs=0.7)),
)
"""Where sums and both operands lie in registers. Not measured."""


@dataclass(frozen=True)
class Chip:
    """What shapes depend on.

    capability: compute capabilities, as ten times the major and the minor number.
    shared_kib: shared memory of a program.
    hardware: there is an instruction that converts e4m3.
    dependent: a launch may begin before the one before it has ended.
    lines: by number of tokens.
    """

    name: str
    capabilities: tuple[int, ...]
    shared_kib: int
    hardware: bool
    dependent: bool = False
    lines: tuple[Line, ...] = WITHOUT_WGMMA


CHIPS = (
    Chip("Ampere", (80,), 163, hardware=False),
    Chip("Ampere, small", (86, 87), 99, hardware=False),
    Chip("Ada", (89,), 99, hardware=True),
    Chip("Hopper", (90,), 227, hardware=True, dependent=True, lines=LINES),
    Chip("Blackwell", (100, 103), 227, hardware=True, dependent=True),
    Chip("Blackwell, small", (120, 121), 99, hardware=True, dependent=True),
)

INTERPRETER = Chip("interpreter", (), 1 << 20, hardware=False)


@dataclass(frozen=True)
class Cut:
    """How one linear is cut up."""

    tile: Tile
    split_k: int


def chip(capability: int) -> Chip:
    """The line of a compute capability.

    Raises:
        BlockFp8Error: there is none; the message names those that exist.
    """
    for line in CHIPS:
        if capability in line.capabilities:
            return line
    known = ", ".join(f"{c // 10}.{c % 10}" for line in CHIPS for c in line.capabilities)
    raise BlockFp8Error(
        "the kernels for NVIDIA GPUs have no configuration for this one",
        expected=f"compute capability {known}",
        got=f"{capability // 10}.{capability % 10}",
        fix="add it to triton_kernels/nvidia/shapes.py and run `pytest --device cuda tests/test_ops.py`",
    )


def stage_bytes(tile: Tile, itemsize: int) -> int:
    """Shared memory of a K block in flight: codes of the weight, activations of `itemsize` bytes."""
    return 128 * (tile.block_n + tile.block_m * itemsize)


def tile_for(tokens: int, n: int, here: Chip, itemsize: int) -> Tile:
    """The tile for so many tokens and rows of the weight; activations of 4 bytes, which take three products, get less
    of a program's registers."""
    line = next(line for line in here.lines if tokens <= line.tokens)
    if itemsize == 4 and line.tile.block_m * line.tile.block_n > 64 * 64:
        line = next(line for line in reversed(here.lines) if line.tile.block_m * line.tile.block_n <= 64 * 64)
    tile = line.wide if line.wide and n >= WIDE else line.tile
    return replace(tile, stages=max(1, min(tile.stages, (here.shared_kib << 10) // stage_bytes(tile, itemsize))))


def cut_for(m: int, n_tiles_of_128: int, n: int, k_blocks: int, here: Chip, cores: int, itemsize: int) -> Cut:
    """Tile and split of one linear.

    n_tiles_of_128: blocks of rows that have a scale of their own. cores: multiprocessors of the device.
    """
    tile = tile_for(m, n, here, itemsize)
    tiles = ceil_div(m, tile.block_m) * n_tiles_of_128 * (128 // tile.block_n)
    split = 1
    while (
        split < SPLIT_K_LIMIT
        and tiles * split < tile.programs * cores
        and ceil_div(k_blocks, split + 1) >= MIN_BLOCKS_PER_SPLIT
    ):
        split += 1
    split = ceil_div(k_blocks, ceil_div(k_blocks, split))
    return Cut(replace(tile, ahead=min(tile.ahead, blocks_ahead(ceil_div(k_blocks, split)))), split)


def blocks_ahead(stretch: int) -> int:
    """K blocks to fetch ahead of a stretch of so many: a power of two, up to a third of it. What is asked for and used
    at once is asked for twice."""
    return 1 << ((stretch // 3).bit_length() - 1) if stretch >= 3 else 0


def quantize_shape(groups: int) -> tuple[int, int]:
    """Groups and warps of a program that quantizes, for so many groups in all."""
    return (4, 2) if groups <= 1 << 13 else (8, 4)
