"""Chips that share a configuration with one of the table in docs/triton.md: one variant of every kernel compiles."""

import pytest

from qwen3_fp8_ascend.triton_kernels.configuration import architecture
from tests.support.triton_ascend.cases import one_of_each
from tests.support.triton_ascend.compiler import IR_VERSIONS, KernelCase, compile_to_hivm, lower_to_linalg
from tests.support.triton_ascend.hivm_report import read_hivm

SIBLINGS = {
    "Ascend910B2": "Ascend910B1",
    "Ascend910_9391": "Ascend910_9392",
    "Ascend950DT_9582": "Ascend950PR_9589",
}
"""A chip, and the one of the table whose configuration and variants it has."""


@pytest.mark.parametrize("ir_version", IR_VERSIONS)
@pytest.mark.parametrize(
    ("chip", "case"),
    [pytest.param(chip, case, id=f"{chip}-{case.name}") for chip, of in SIBLINGS.items() for case in one_of_each(of)],
)
def test_reaches_hivmc(chip: str, case: KernelCase, ir_version: str) -> None:
    assert architecture(chip) == architecture(SIBLINGS[chip])
    linalg = lower_to_linalg(case, chip)
    report = read_hivm(compile_to_hivm(linalg, chip, ir_version, bind_sub_block=architecture(chip).bind_sub_block))
    assert report.cores, "no device code"
    assert not report.scalar_fallbacks
