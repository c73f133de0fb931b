"""Launches that begin before the one before them has ended (compute capability 9.0 and later).

A launch costs a microsecond or two in which memory stands still: programs end one by one, the next ones start and wait
for their first bytes. A dependent launch (CUDA's programmatic dependent launch) puts its programs where there is room
while the one before still runs. Until that has ended they may touch nothing that any launch writes. The weight may be
asked for: L2 has what is written later, too.

Every program waits for the launch before and only then lets the next one begin. So whatever begins beside one of these
launches, ours or anybody's, finds all that came before it complete. Only the quantization that a linear begins with
lets the next launch begin at once, since that is the linear's own.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_PIECE = tl.constexpr(4)
"""K blocks of a row that are asked for at once, at most."""


@triton.jit
def wait_for_the_launch_before():
    """Nothing that another launch writes may be read before, and nothing written. Lets the next launch begin."""
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def wait_before_a_launch_of_ours():
    """The same, but the next launch, which must wait likewise, may begin at once."""
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def fetch_ahead(codes_ptr, row, block, k_blocks, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr):
    """Ask L2 for AHEAD K blocks, from `block` on, of the BLOCK_N rows of the weight that begin with `row`.

    Shapes: codes (rows, 128 k_blocks) uint8. AHEAD: a power of two, at most k_blocks.
    """
    PIECE: tl.constexpr = AHEAD if AHEAD < _PIECE else _PIECE
    PIECES: tl.constexpr = AHEAD // PIECE
    index = tl.arange(0, BLOCK_N * PIECES)
    start = tl.minimum(block + index % PIECES * PIECE, k_blocks - PIECE)  # none beyond the end of its row
    at = codes_ptr + (row + index // PIECES).to(tl.int64) * (k_blocks * 128) + start * 128
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [at.to(tl.int64), tl.full((BLOCK_N * PIECES,), PIECE * 128, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
