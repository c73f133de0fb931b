"""Chips that share a configuration with one of the table in docs/triton.md: one variant of every kernel compiles."""

import itertools

import pytest

from qwen3_fp8_ascend.triton_kernels.configuration import architecture
from tests.support.triton_ascend.cases import compile_case, one_of_each
from tests.support.triton_ascend.compiler import IR_VERSIONS, KernelCase, is_950
from tests.support.triton_ascend.hivm_report import read_hivm

SIBLINGS = {
    "Ascend910B2": "Ascend910B1",
    "Ascend910_9391": "Ascend910_9392",
    "Ascend950DT_9582": "Ascend950PR_9589",
}
"""A chip, and the one of the table whose configuration and variants it has."""


COMPILATIONS = [
    pytest.param(chip, case, version, id=f"{chip}-{case.name}-{version}", marks=pytest.mark.long if long else [])
    for chip, of in SIBLINGS.items()
    for case, version in itertools.product(one_of_each(of), IR_VERSIONS)
    for long in [is_950(chip) and version != IR_VERSIONS[0] and not case.name.startswith("block_linear[")]
]
"""That the later compiler, which takes long for 950, knows the chip by name, one kernel shows."""


@pytest.mark.parametrize(("chip", "case", "ir_version"), COMPILATIONS)
def test_reaches_hivmc(chip: str, case: KernelCase, ir_version: str) -> None:
    assert architecture(chip) == architecture(SIBLINGS[chip])
    report = read_hivm(compile_case(case, chip, ir_version))
    assert report.cores, "no device code"
    assert not report.scalar_fallbacks
