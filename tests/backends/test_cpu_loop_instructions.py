"""The inner loops of AArch64, AVX2 and AVX-512: nothing is spilled; docs/cpu.md's counts are those of g++ 12.

Cross-compiled and disassembled; nothing is run. A count is no time: speed on AArch64 was not measured.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import loop_instructions
from tests.support.loop_instructions import KERNELS, Kernel, decoding_loop, tile_loop

DOCUMENT = Path(__file__).parents[2] / "docs" / "cpu.md"

AT_MOST = {
    "avx2": (0.65, 0.25),
    "avx2, Intel's cores": (0.75, 0.25),
    "avx512f": (0.4, 0.11),
    "avx512": (0.25, 0.055),
    "neon": (1.0, 0.45),
    "neon_bf16": (0.82, 0.13),
}
"""Instructions for a weight with one row, and for a product with many; a compiler may do a little worse than g++ 12."""


def kernel_of(level: str) -> Kernel:
    kernel = KERNELS[level]
    if reason := loop_instructions.missing(kernel):
        pytest.skip(reason)
    return kernel


def needs_gcc_12(kernel: Kernel) -> None:
    version = subprocess.run([kernel.compiler, "-dumpversion"], capture_output=True, text=True, check=True).stdout
    if version.partition(".")[0].strip() != "12":
        pytest.skip(f"the counts are those of g++ 12, and {kernel.compiler} is {version.strip()}")


@pytest.mark.parametrize("level", KERNELS)
def test_sums_and_weights_stay_in_registers(level: str) -> None:
    kernel = kernel_of(level)
    per_weight, per_product = AT_MOST[level]
    row, tile = decoding_loop(kernel), tile_loop(kernel)
    assert row.stack == 0 and row.per_weight <= per_weight, "\n".join(row.instructions)
    assert tile.stack == 0 and tile.per_product <= per_product, "\n".join(tile.instructions)


@pytest.mark.parametrize("level", KERNELS)
def test_each_line_of_codes_is_asked_for_ahead(level: str) -> None:
    """g++ drops what only prefetches, if it is not inlined always; the results are the same, and slower."""
    row = decoding_loop(kernel_of(level))
    assert 64 * row.asked >= row.weights, "\n".join(row.instructions)


@pytest.mark.parametrize("level", ["neon", "neon_bf16"])
def test_spilled_registers_are_seen(level: str) -> None:
    """What setup.py's -fno-schedule-insns is there for."""
    kernel = kernel_of(level)
    needs_gcc_12(kernel)
    assert decoding_loop(kernel, "-fschedule-insns").stack > 0


def test_the_document_holds_these_counts() -> None:
    for level in KERNELS:
        needs_gcc_12(kernel_of(level))
    text = DOCUMENT.read_text().partition("<!-- table: loop instructions -->\n")[2]
    assert text.partition("\n<!-- end of table -->")[0] == loop_instructions.table()
