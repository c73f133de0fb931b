"""How a linear is cut into programs, by chip and number of tokens: a table, no tuning at anybody's first request.

Hopper's lines were measured on an H100 (`python -m benchmarks.nvidia_shapes`); the others follow from what the compiler
says of registers and shared memory (tests/triton_kernels/test_nvidia_compiled.py).
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
    programs: K is split, in equal stretches, into as many as leave at most so many programs for each multiprocessor:
        as many as find room on one at once.
    scales_early: the tokens' scales are asked for a K block before. Where that costs a multiprocessor one of its
        programs, for want of registers, it is slower.
    ahead: K blocks of the weight, at most, that L2 is asked for before the launch before has ended, where launches may
        be dependent; a power of two, or 0.
    registers: of a thread, at most; 0: what the compiler takes.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    w_first: bool
    programs: float
    scales_early: bool = True
    ahead: int = 8
    registers: int = 0


@dataclass(frozen=True)
class Line:
    """The tile for up to so many tokens, and the one for weights of `WIDE` rows and more if that is another."""

    tokens: int
    tile: Tile
    wide: Tile | None = None


WIDE = 16384
MANY = 1 << 62

LINES = (
    Line(
        16,
        Tile(16, 128, warps=8, stages=3, w_first=False, programs=2),
        wide=Tile(16, 64, warps=4, stages=6, w_first=False, programs=3),
    ),
    Line(32, Tile(32, 64, warps=4, stages=3, w_first=True, programs=4, ahead=2)),
    Line(
        64,
        Tile(64, 128, warps=8, stages=3, w_first=True, programs=1, ahead=2),
        wide=Tile(64, 64, warps=4, stages=3, w_first=True, programs=3, ahead=2, registers=168),
    ),
    Line(MANY, Tile(128, 64, warps=4, stages=3, w_first=True, programs=2, ahead=0)),
)
"""Hopper's, for activations as they are."""

QUANTIZED_LINES = (
    LINES[0],
    Line(32, Tile(32, 64, warps=4, stages=3, w_first=True, programs=2, scales_early=False, ahead=2)),
    Line(
        64,
        Tile(64, 128, warps=8, stages=3, w_first=True, programs=1, scales_early=False, ahead=2),
        wide=Tile(32, 128, warps=4, stages=3, w_first=False, programs=3, scales_early=False, ahead=0),
    ),
    LINES[3],
)
"""Hopper's, for quantized ones: scales of tokens take registers, too."""

WITHOUT_WGMMA = (
    Line(16, Tile(16, 64, warps=4, stages=4, w_first=False, programs=3)),
    Line(32, Tile(32, 64, warps=4, stages=3, w_first=True, programs=2, scales_early=False)),
    Line(64, Tile(64, 64, warps=4, stages=4, w_first=True, programs=2, scales_early=False)),
    Line(MANY, Tile(128, 64, warps=8, stages=3, w_first=True, programs=1, scales_early=False)),
)
"""Where sums and both operands lie in registers. Not measured."""


@dataclass(frozen=True)
class Chip:
    """What shapes depend on.

    capability: compute capabilities, as ten times the major and the minor number.
    shared_kib: shared memory of a program.
    hardware: there is an instruction that converts e4m3.
    dependent: a launch may begin before the one before it has ended.
    lines: by number of tokens; quantized_lines: for quantized activations, if they are others.
    """

    name: str
    capabilities: tuple[int, ...]
    shared_kib: int
    hardware: bool
    dependent: bool = False
    lines: tuple[Line, ...] = WITHOUT_WGMMA
    quantized_lines: tuple[Line, ...] = ()


CHIPS = (
    Chip("Ampere", (80,), 163, hardware=False),
    Chip("Ampere, small", (86, 87), 99, hardware=False),
    Chip("Ada", (89,), 99, hardware=True),
    Chip("Hopper", (90,), 227, hardware=True, dependent=True, lines=LINES, quantized_lines=QUANTIZED_LINES),
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


def tile_for(tokens: int, n: int, here: Chip, itemsize: int, quantized: bool) -> Tile:
    """The tile for so many tokens and rows of the weight; activations of 4 bytes, which take three products, get less
    of a program's registers."""
    lines = (quantized and here.quantized_lines) or here.lines
    line = next(line for line in lines if tokens <= line.tokens)
    tile = line.wide if line.wide and n >= WIDE else line.tile
    if itemsize == 4 and tile.block_m * tile.block_n > 64 * 64:
        tile = next(line.tile for line in reversed(lines) if line.tile.block_m * line.tile.block_n <= 64 * 64)
    return replace(tile, stages=max(1, min(tile.stages, (here.shared_kib << 10) // stage_bytes(tile, itemsize))))


def cut_for(
    m: int, n_tiles_of_128: int, n: int, k_blocks: int, here: Chip, cores: int, itemsize: int, quantized: bool
) -> Cut:
    """Tile and split of one linear.

    n_tiles_of_128: blocks of rows that have a scale of their own. cores: multiprocessors of the device. itemsize: bytes
    of an activation as it is multiplied.
    """
    tile = tile_for(m, n, here, itemsize, quantized)
    tiles = ceil_div(m, tile.block_m) * n_tiles_of_128 * (128 // tile.block_n)
    room = [
        split
        for split in range(1, SPLIT_K_LIMIT + 1)
        if split == 1 or (tiles * split <= tile.programs * cores and k_blocks >= split * MIN_BLOCKS_PER_SPLIT)
    ]
    equal = [split for split in room if k_blocks % split == 0]
    # A K of no such divisor has its last stretch shorter.
    split = equal[-1] if equal[-1] > 1 else ceil_div(k_blocks, ceil_div(k_blocks, room[-1]))
    return Cut(replace(tile, ahead=min(tile.ahead, blocks_ahead(ceil_div(k_blocks, split)))), split)


def blocks_ahead(stretch: int) -> int:
    """K blocks to fetch ahead of a stretch of so many: a power of two, up to a third of it. What is asked for and used
    at once is asked for twice."""
    return 1 << ((stretch // 3).bit_length() - 1) if stretch >= 3 else 0


def quantize_shape(groups: int) -> tuple[int, int]:
    """Groups and warps of a program that quantizes, for so many groups in all."""
    return (4, 2) if groups <= 1 << 13 else (8, 4)
