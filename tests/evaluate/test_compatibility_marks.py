"""What documents say has run on which chip comes from result files, and the first one from an NPU breaks nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen3_fp8_ascend.cli import app
from qwen3_fp8_ascend.evaluate import compatibility
from qwen3_fp8_ascend.evaluate.compatibility import Run, renew
from qwen3_fp8_ascend.evaluate.results import read_results
from qwen3_fp8_ascend.evaluate.validate import run as orchestration
from qwen3_fp8_ascend.terminal import run
from tests.evaluate.test_report import FACTS, NPU, comparison, precision, verification

ROOT = Path(__file__).parents[2]
A2 = Run("npu", "Ascend910B3", "ascendc", "2027-01-02")


def cell(key: str, *runs: Run, language: str = "en") -> str:
    """What stands between the marks."""
    text = renew(f"a <!-- {key} -->old<!-- end --> b", runs, language)
    assert text.startswith(f"a <!-- {key} -->") and text.endswith("<!-- end --> b")
    return text.removeprefix(f"a <!-- {key} -->").removesuffix("<!-- end --> b")


def test_a_cell() -> None:
    assert cell("ran: npu/Ascend910B/ascendc") == "not run"
    assert cell("ran?: npu/Ascend910B/ascendc") == ""
    assert cell("ran: npu/Ascend910B/ascendc", A2) == "run 2027-01-02"
    assert cell("ran?: npu/Ascend910B/ascendc", A2) == "run 2027-01-02; "
    assert cell("ran: npu/Ascend950,Ascend910B3/ascendc", A2) == "run 2027-01-02"
    for other in ("npu/Ascend910B/triton", "npu/Ascend950/ascendc", "gpu/*/ascendc", "npu/*/serve"):
        assert cell(f"ran: {other}", A2) == "not run"
    assert cell("ran: npu/*/ascendc", A2, language="zh") == "已运行 2027-01-02"
    bad = Run("npu", "Ascend910B3", "ascendc", "2027-03-04", good=False)
    assert cell("ran: npu/*/ascendc", A2, bad) == "run 2027-03-04, failed"
    later = Run("npu", "Ascend910B3", "ascendc", "2027-03-05")
    assert cell("ran: npu/*/ascendc", A2, bad, later) == "run 2027-03-05"


def test_a_processor_held_to_less_than_it_has() -> None:
    lower = Run("cpu", "avx2", "cpu", "2027-03-05", check="linear", lower=True)
    real = Run("cpu", "avx2", "cpu", "2027-01-01", check="linear")
    assert cell("ran: cpu/avx2/cpu", lower) == "run 2027-03-05, on a processor that has more"
    assert cell("ran: cpu/avx2/cpu", lower, real) == "run 2027-01-01"
    assert cell("ran: cpu/avx512/cpu", lower) == "not run"
    experts = Run("cpu", "avx512", "cpu", "2027-03-05", check="experts")
    assert cell("ran: cpu/avx512/cpu", experts) == "not run"
    other = Run("cpu", "avx512f", "cpu", "2027-03-06", check="linear")
    assert cell("ran: cpu/avx512/cpu", other) == "not run"
    assert cell("ran: cpu/avx2,avx512f/cpu", other, lower) == "run 2027-03-06"


def test_a_claim() -> None:
    def run(check: str, device: str = "avx2", good: bool = True, date: str = "2027-01-02") -> Run:
        return Run("cpu", device, "cpu", date, good, check)

    assert cell("held: quantize/cpu") == "not run"
    assert cell("held?: quantize/cpu") == ""
    assert cell("held: quantize/cpu", run("quantize"), run("quantize", "amx")) == "run: avx2, amx"
    assert cell("held?: quantize/cpu", run("quantize")) == "run: avx2; "
    assert cell("held: quantize/ascendc", run("quantize")) == "not run"
    assert cell("held: linear,prefill/cpu", run("linear")) == "not run"
    assert cell("held: linear,prefill/cpu", run("linear"), run("prefill")) == "run: avx2"
    wrong = run("prefill", good=False, date="2027-01-03")
    assert cell("held: linear,prefill/cpu", run("linear"), run("prefill"), wrong) == "run: avx2 (failed)"
    assert cell("held: quantize/cpu", run("quantize"), language="zh") == "已运行：avx2"


def step(name: str, outcome: str = "finished", failed: int = 0, **more: Any) -> dict[str, Any]:
    """A line of a result of `validate`."""
    return {
        "step": name,
        "uses": None,
        "outcome": outcome,
        "failed": failed,
        "cases": 9,
        "skipped": {},
        "values": {},
    } | more


def validated(kind: str, name: str, *steps: dict[str, Any]) -> list[Run]:
    """What a result with these steps shows."""
    device, provenance = {"kind": kind, "name": name}, {"date": "2027-01-02"}
    return compatibility.runs({"validate": [{"device": device, "provenance": provenance, "steps": list(steps)}]})


@pytest.mark.parametrize(
    ("name", "outcome", "failed", "good"),
    [
        ("determinism/ascendc/w8a8", "finished", 0, True),
        ("determinism/ascendc/w8a8", "finished", 2, False),
        ("quantize/ascendc", "finished", 1, False),
        ("experts/ascendc/w8a8", "killed", 0, False),
        ("graph/ascendc/w8a8", "out of time", 0, True),
        ("experts/triton/w8a8", "finished", 1, True),
    ],
)
def test_right_linears_do_not_hide_what_another_step_found(name: str, outcome: str, failed: int, good: bool) -> None:
    first, *_ = validated("npu", "Ascend910B3", step("linear/ascendc/w8a8"), step(name, outcome, failed))
    assert first == Run("npu", "Ascend910B3", "ascendc", "2027-01-02", good, "linear")


def test_a_cpu_is_known_by_its_instruction_set() -> None:
    found = validated(
        "cpu",
        "a processor",
        step("linear/cpu/w8a8", uses="amx"),
        step("linear/reference/w8a8"),
        step("model", values={"vllm": {"distance": 0.1}}),
        step("linear/cpu:avx2/w8a8", uses="avx2"),
        step("nonfinite/cpu:portable/w8a8", failed=1, uses="portable"),
    )
    assert found == [
        Run("cpu", "amx", "cpu", "2027-01-02", check="linear"),
        Run("cpu", "amx", "serve", "2027-01-02"),
        Run("cpu", "avx2", "cpu", "2027-01-02", check="linear", lower=True),
        Run("cpu", "portable", "cpu", "2027-01-02", False, "nonfinite", lower=True),
    ]


def test_what_was_only_skipped_was_not_run() -> None:
    assert validated("npu", "Ascend910B3", step("experts/triton/w8a8", skipped={"no kernels": 9})) == []


def test_a_kind_of_chip() -> None:
    assert cell("ran: npu") == "**Nothing has run on an NPU.**"
    assert cell("ran: npu", A2) == "Run on Ascend910B3."
    assert cell("ran: gpu", A2) == "**Nothing has run on a GPU.**"
    assert cell("ran: gpu", language="zh") == "**还没有任何部分在 GPU 上运行过。**"


def made_on_an_npu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results as the first person with an NPU might send them: one of `validate`, a comparison, three answers."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(orchestration, "CHILD", [sys.executable, "-m", "tests.evaluate.validate.actor"])
    for name, value in {
        "ACTED": str(folder.parent / "acted"),
        "PYTHONPATH": str(ROOT),
        "DEVICE_KIND": "npu",
        "DEVICE_NAME": "Ascend910B3",
        "STEPS": "linear/ascendc/w8a8 dies",
    }.items():
        monkeypatch.setenv(name, value)
    assert run(app, ["validate", "--device", "cpu", "--output", str(folder / "validation-910b3.json")]) == 1
    for page in folder.glob("*.md"):
        page.unlink()
    facts: dict[str, Any] = FACTS | {"npu": "Ascend910B3"}
    (folder / "verify-910b3.json").write_text(json.dumps(verification(provenance=facts)))
    (folder / "precision-910b3.json").write_text(json.dumps(precision(comparison("ascendc w8a8", NPU, False))))


def test_runs_of_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_on_an_npu(tmp_path / "results", monkeypatch)
    found = set(compatibility.runs(read_results([tmp_path / "results"])))
    assert found == {
        Run("npu", "Ascend910B3", "ascendc", "2026-01-02", check="linear"),
        Run("npu", "Ascend910B3", "ascendc", "2026-02-03"),
        Run("npu", "Ascend910B3", "serve", "2026-01-02"),
    }


def test_the_first_result_of_an_npu_breaks_no_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of the project: `report` puts it into every document, and the tests of documents pass."""
    copy = tmp_path / "copy"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("these sources are no git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    for library in (ROOT / "qwen3_fp8_ascend").glob("*.so"):
        shutil.copy(library, copy / "qwen3_fp8_ascend")
    made_on_an_npu(copy / "docs" / "results", monkeypatch)
    assert run(app, ["report", str(copy / "docs" / "results"), "--output", str(copy / "docs")]) == 0
    for name in ("README.md", "docs/compatibility.md"):
        text = (copy / name).read_text(encoding="utf-8")
        assert "Run on Ascend910B3." in text and "Nothing has run on an NPU" not in text
        assert re.search(r"run 2026-02-03; <!-- end -->emulated", text), name
    assert "已在 Ascend910B3 上运行" in (copy / "README.zh.md").read_text(encoding="utf-8")
    assert "## Ascend910B3" in (copy / "docs" / "validation.md").read_text(encoding="utf-8")
    tests = ["tests/test_documents.py", "tests/test_compatibility.py", "tests/evaluate/test_report.py"]
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-x", "-p", "no:cacheprovider", "-k", "not scripts_take"]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
