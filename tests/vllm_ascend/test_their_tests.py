"""vLLM-Ascend's own quantization tests, without and with this package registered: outcomes must be the same ones."""

import functools
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from .conftest import FIGURES

SOURCE = Path(os.environ["ASCEND_SOURCE"])
SUPPORT = Path(__file__).parents[1] / "support"


@functools.cache
def outcomes(registered: bool, tree: Path = SOURCE) -> dict[str, str]:
    """Outcome of each quantization test in a tree of vLLM-Ascend, by name; a minute, so each run is made once."""
    with tempfile.TemporaryDirectory() as folder:
        return _outcomes(registered, Path(folder) / "report.xml", tree)


def _outcomes(registered: bool, report: Path, tree: Path) -> dict[str, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "vllm_ascend_unit_tests", "-p", "no:cacheprovider"]
    environment = os.environ | {
        "PYTHONPATH": f"{SUPPORT}{os.pathsep}{os.environ['PYTHONPATH']}",
        "REGISTER_BLOCK_FP8": str(int(registered)),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [*command, f"--junitxml={report}", "tests/ut/quantization"],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def test_outcomes_are_those_without_this_package() -> None:
    without, with_ours = outcomes(False), outcomes(True)
    counts = (dict(sorted(Counter(found.values()).items())) for found in (without, with_ours))
    FIGURES.append("{}'s own quantization tests: without this package {}, with it {}".format(SOURCE.name, *counts))
    assert with_ours == without
    assert Counter(without.values())["passed"] > 200
    # By vLLM-Ascend's convention the tests of a folder `a2` need an A2; elsewhere one asks for an override that its
    # own 0.23.0 does not make.
    failed = {name for name, outcome in without.items() if outcome not in ("passed", "skipped")}
    assert all(".a2." in name or "test_override_quantization_method" in name for name in failed), failed
