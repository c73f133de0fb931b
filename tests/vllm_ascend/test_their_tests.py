"""vLLM-Ascend's own quantization tests: this package, registered, leaves their outcomes as they are."""

import functools
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

from tests.support import vllm_ascend_forks

from .conftest import FIGURES

SOURCE = Path(os.environ["ASCEND_SOURCE"])
SUPPORT = Path(__file__).parents[1] / "support"


def outcomes(tree: Path) -> dict[str, str]:
    """Outcome of each quantization test in a tree of vLLM-Ascend without this package, by name."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(tree, Path(folder, "without"))


@functools.cache
def outcomes_with_and_without() -> tuple[dict[str, str], dict[str, str]]:
    """Outcomes in the release with this package, and without it of those that do not pass with it.

    Both in forks of one process, which has imported the release.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "with")
        without = _run(SOURCE, Path(folder, "without"), WITH_OUTCOMES=str(file))
        return json.loads(file.read_text()), without


def _run(tree: Path, file: Path, **variables: str) -> dict[str, str]:
    arguments = ["-q", "-p", "vllm_ascend_unit_tests", "-p", "no:cacheprovider", "tests/ut/quantization"]
    environment = os.environ | {
        "PYTHONPATH": f"{SUPPORT}{os.pathsep}{os.environ['PYTHONPATH']}",
        "OUTCOMES": str(file),
        "HF_HUB_OFFLINE": "1",
    }
    done = vllm_ascend_forks.run("pytest", *arguments, folder=tree, environment=environment | variables)
    assert file.exists(), done.stdout[-5000:]
    found: dict[str, str] = json.loads(file.read_text())
    return found


def test_outcomes_are_those_without_this_package() -> None:
    """What passes with it need not be run without it: that could only be better."""
    with_ours, without = outcomes_with_and_without()
    not_passed = {name: outcome for name, outcome in with_ours.items() if outcome != "passed"}
    counts = (dict(sorted(Counter(found.values()).items())) for found in (with_ours, without))
    FIGURES.append(
        "{}'s own quantization tests: with this package {}, without it what has not passed {}".format(
            SOURCE.name, *counts
        )
    )
    assert not_passed == without
    assert Counter(with_ours.values())["passed"] > 200
    # By vLLM-Ascend's convention the tests of a folder `a2` need an A2; elsewhere one asks for an override that its
    # own 0.23.0 does not make.
    failed = {name for name, outcome in without.items() if outcome not in ("passed", "skipped")}
    assert all("/a2/" in name or "test_override_quantization_method" in name for name in failed), failed
