"""`validate` finds what is wrong and names it, and goes from start to file on a device that stands in for an NPU."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_fp8_ascend.cli import app
from qwen3_fp8_ascend.evaluate.results import runs_by_chip
from qwen3_fp8_ascend.evaluate.validate import experts
from qwen3_fp8_ascend.evaluate.validate import run as orchestration
from qwen3_fp8_ascend.terminal import run
from qwen3_fp8_ascend.testing.devices import Device
from qwen3_fp8_ascend.testing.timing import interleave
from tests.evaluate.validate.planted import StandIn
from tests.support.preloaded_python import TORCH, preloaded_python

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    """For the processes of steps, each of which would import torch."""
    with preloaded_python(TORCH, os.environ | {"OMP_NUM_THREADS": "1"}) as executable:
        yield str(executable)


def plant(monkeypatch: pytest.MonkeyPatch, python: str, what: str) -> None:
    monkeypatch.setattr(orchestration, "CHILD", [python, "-m", "tests.evaluate.validate.planted", what])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def validate(folder: Path, *arguments: str) -> dict[str, Any]:
    code = run(app, ["validate", "--device", "cpu", "--output", str(folder / "v.json"), *arguments])
    found: dict[str, Any] = json.loads((folder / "v.json").read_text())
    assert code == (0 if found["verdict"] == "passed" else 1)
    return found


def by_step(found: dict[str, Any]) -> dict[str, Any]:
    return {step["step"]: step for step in found["steps"]}


def words(step: dict[str, Any]) -> str:
    return " | ".join(f"{f['case']}: {'; '.join(f['faults'])}" for f in step["failures"])


@pytest.fixture(scope="module")
def faulty(python: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All planted backends in one run, each in the steps that are there to find its fault."""
    folder = tmp_path_factory.mktemp("faulty")
    with pytest.MonkeyPatch.context() as monkeypatch:
        real = orchestration._run

        def short(request: Any, kind: str, step: Any, seconds: float, *rest: Any) -> Any:
            return real(request, kind, step, 20 if step["step"] == "linear/planted_hang/w8a8" else seconds, *rest)

        monkeypatch.setattr(orchestration, "_run", short)
        monkeypatch.setattr(orchestration, "may_match", lambda step, pattern: step in FINDERS)
        plant(monkeypatch, python, "faults")
        found = validate(folder)
    return folder, found


FINDERS = {
    "linear/planted_ulp/w8a8",
    "linear/planted_scale/w8a8",
    "experts/planted_slot/w8a8",
    "experts/planted_silu/w8a8",
    "nonfinite/planted_nan/w8a8",
    "quantize/planted_nan",
    "determinism/planted_race/w8a8",
    "linear/planted_hang/w8a8",
    "linear/planted_kill/w8a8",
}


def test_every_planted_fault_is_found(faulty: Any) -> None:
    """That nothing else is: the stand-in below has no fault."""
    steps = by_step(faulty[1])
    assert set(steps) == FINDERS
    for name, step in steps.items():
        assert step["failed"] or step["outcome"] in ("timed out", "killed"), name


def test_one_unit_in_the_last_place(faulty: Any) -> None:
    steps = by_step(faulty[1])
    assert "1 of 200 elements are off by more than fp32 accumulation allows, the first at (0, 0)" in words(
        steps["linear/planted_ulp/w8a8"]
    )


def test_a_wrong_scale_row_at_a_shards_edge(faulty: Any) -> None:
    step = by_step(faulty[1])["linear/planted_scale/w8a8"]
    assert {failure["case"].split("/")[-2] for failure in step["failures"]} == {"n130+70"}
    assert "the first at (0, 130)" in words(step)


def test_an_expert_that_is_left_out(faulty: Any) -> None:
    step = by_step(faulty[1])["experts/planted_slot/w8a8"]
    assert {re.findall(r"/(m\d+)/", failure["case"])[0] for failure in step["failures"]} == {"m1", "m17"}
    assert "elements are no rounding of what the oracle allows, the first at (0, 0)" in words(step)


def test_silu_whatever_is_asked(faulty: Any) -> None:
    step = by_step(faulty[1])["experts/planted_silu/w8a8"]
    assert {failure["case"].split("/")[-1] for failure in step["failures"]} == set(experts.ACTIVATIONS)


def test_a_nan_that_is_swallowed(faulty: Any) -> None:
    steps = by_step(faulty[1])
    assert "expected nan, of 6 rows" in words(steps["nonfinite/planted_nan/w8a8"])
    said = words(steps["quantize/planted_nan"])
    assert "quantize/planted_nan/nonfinite/bfloat16-quiet-7FC0: code" in said and "expected 0x7f" in said


def test_a_race_that_shows_once_in_fifty(faulty: Any) -> None:
    said = words(by_step(faulty[1])["determinism/planted_race/w8a8"])
    assert "4 of 200 repetitions have other bits than the first: 49, 99, 149, 199" in said


def test_a_kernel_that_never_returns_and_one_that_kills_its_process(faulty: Any) -> None:
    steps = by_step(faulty[1])
    for name, outcome in (("hang", "timed out"), ("kill", "killed")):
        step = steps[f"linear/planted_{name}/w8a8"]
        assert step["outcome"] == outcome
        assert "/m17/" in step["at"] and step["repeat"].endswith(step["at"])
    assert "SIGSEGV" in steps["linear/planted_kill/w8a8"]["detail"]


def test_pages_name_every_fault(faulty: Any) -> None:
    folder, found = faulty
    for page in ("v.md", "v.zh.md"):
        text = (folder / page).read_text()
        for step in found["steps"]:
            assert all(f"`{failure['repeat']}`" in text for failure in step["failures"])
            assert step["outcome"] == "finished" or f"`{step['at']}`" in text


def test_the_command_that_is_printed_repeats_the_case(
    faulty: Any, python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = by_step(faulty[1])["linear/planted_scale/w8a8"]
    failure = step["failures"][-1]
    plant(monkeypatch, python, "faults")
    assert run(app, failure["repeat"].split()[1:]) == 1
    assert f"{failure['case']}: {'; '.join(failure['faults'])}" in capsys.readouterr().out


def test_from_start_to_file_on_a_stand_in_for_an_npu(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, python, "npu")
    found = validate(tmp_path)
    steps = by_step(found)
    arithmetic = {"linear", "prefill", "experts", "nonfinite", "determinism", "graph", "compile"}
    expected = {f"{name}/triton/w8a8" for name in arithmetic} | {"quantize/triton", "dequantize/triton"}
    assert set(steps) == expected | {"probes", "times", "model"}
    assert found["verdict"] == "passed", [(s["step"], s["outcome"], s["detail"], words(s)) for s in found["steps"]]
    assert found["device"] == {"kind": "npu", "name": "Ascend910B3"}
    assert runs_by_chip(found)["npu"] == [found["provenance"]["date"]]
    assert {reason for step in found["steps"] for reason in step["skipped"]} == {
        "on an NPU vLLM-Ascend compiles with a backend of its own",
        "vllm is not installed",
    }
    assert steps["graph/triton/w8a8"]["cases"] == 5 and steps["determinism/triton/w8a8"]["cases"] == 12
    lines = [line for layer in steps["times"]["values"].values() for line in layer["lines"]]
    assert {line["clock"] for line in lines} == {"graph"}
    assert {line["contender"] for line in lines} == {
        "triton w8a8",
        "copy",
        "torch bf16",
        "dequantize, torch bf16",
    }
    together = [line for line in lines if line["layer"] == "together"]
    assert {line["m"] for line in together} == {1, 16} and all(line["over_bf16"] > 0 for line in together)
    ours = [line for line in lines if line["contender"] == "triton w8a8" and line not in together]
    assert len(ours) == 4 and all(line["predicted_over_bf16"] > 0 and line["over_bf16"] > 0 for line in ours)
    assert "codes" in str(steps["probes"]["values"]) or steps["probes"]["values"]["finite_codes"]
    page = (tmp_path / "v.md").read_text()
    assert "## Ascend910B3" in page and "| predicted |" in page


def test_a_contender_that_cannot_be_captured_is_timed_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Device, call: Any) -> Any:
        raise RuntimeError("it waits for the device")

    device = Device("npu", "x", torch.device("cpu"), StandIn)
    timed = {"sum": lambda number: torch.ones(4).sum() + number}
    assert interleave(timed, seconds=0, device=device)["sum"].clock == "graph"
    monkeypatch.setattr(Device, "capture", refuse)
    timing = interleave(timed, seconds=0, device=device, least=5)["sum"]
    assert timing.clock == "events" and len(timing.seconds) == 5 and (timing.seconds > 0).all()
    assert interleave(timed, seconds=0)["sum"].clock == "host"


def test_the_stand_ins_graph_replays_with_other_operands() -> None:
    """Else the step that captures graphs would prove nothing there."""
    device = Device("npu", "x", torch.device("cpu"), StandIn)
    held = torch.ones(3)
    replay, out = device.capture(lambda: (held * 2 + 1).sum())
    held.fill_(5)
    assert float(out) == 9
    replay()
    assert float(out) == 33
