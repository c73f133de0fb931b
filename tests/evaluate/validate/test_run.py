"""The orchestration of `validate`: time limits, processes that die, interruptions, disks, versions. No torch."""

import getpass
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwen3_fp8_ascend.cli import app
from qwen3_fp8_ascend.evaluate.results import read_results
from qwen3_fp8_ascend.evaluate.validate import run as orchestration
from qwen3_fp8_ascend.evaluate.validate.names import matches, may_match
from qwen3_fp8_ascend.terminal import run

ACTOR = [sys.executable, "-m", "tests.evaluate.validate.actor"]
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def acted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The steps that were started, a line each."""
    monkeypatch.setattr(orchestration, "CHILD", ACTOR)
    monkeypatch.setenv("ACTED", str(tmp_path / "acted"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "acted"


def validate(folder: Path, *arguments: str) -> int:
    return run(app, ["validate", "--device", "cpu", "--output", str(folder / "v.json"), *arguments])


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "v.json").read_text())
    return found


def steps(folder: Path) -> dict[str, Any]:
    return {step["step"]: step for step in result(folder)["steps"]}


def started(acted: Path) -> list[str]:
    return [line for line in acted.read_text().split() if line != "None"]


def test_a_good_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STEPS", "good also_good")
    assert validate(tmp_path) == 0
    assert result(tmp_path)["verdict"] == "passed"
    assert [s["cases"] for s in result(tmp_path)["steps"]] == [3, 3]
    worst = steps(tmp_path)["good"]["worst"]["element"]
    assert worst == {"value": 0.3, "limit": 1.0, "share": 0.3, "case": "good/case2"}
    assert {path.name for path in tmp_path.iterdir()} == {"v.json", "v.md", "v.zh.md", "acted"}
    assert "Some CPU: passed" in capsys.readouterr().out
    assert read_results([tmp_path / "v.json"])["validate"]


def test_a_wrong_case_is_named_with_the_command_that_repeats_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(tmp_path, "--seed", "7") == 1
    (failure,) = steps(tmp_path)["wrong"]["failures"]
    assert failure == {
        "case": "wrong/case1",
        "faults": ["it is wrong"],
        "repeat": "qwen3-fp8-ascend validate --device cpu --only wrong/case1 --seed 7",
    }
    said = capsys.readouterr().out
    assert "wrong/case1: it is wrong" in said and failure["repeat"] in said
    for page in ("v.md", "v.zh.md"):
        assert f"`{failure['repeat']}`" in (tmp_path / page).read_text()


@pytest.mark.parametrize(
    ("step", "outcome", "said"),
    [
        ("hangs", "timed out", "after 4 s"),
        ("dies", "killed", "by signal 11, SIGSEGV"),
        ("eats", "killed", "SIGKILL (the system ends processes so when memory runs out)"),
        ("exits", "failed", "exit code 1: the driver said no"),
    ],
)
def test_a_process_that_does_not_end_well_costs_its_step_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, outcome: str, said: str
) -> None:
    monkeypatch.setenv("STEPS", f"good {step} also_good")
    start = time.monotonic()
    assert validate(tmp_path) == 1
    assert time.monotonic() - start < 120
    found = steps(tmp_path)
    assert (found[step]["outcome"], found[step]["at"]) == (outcome, f"{step}/case1")
    assert said in found[step]["detail"]
    assert found[step]["repeat"].endswith(f"--only {step}/case1")
    assert found[step]["cases"] == 1, "what it had finished is kept"
    assert found["also_good"]["outcome"] == "finished" and found["also_good"]["cases"] == 3
    assert f"`{step}/case1`" in (tmp_path / "v.md").read_text()


def test_children_of_a_process_that_hangs_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "has_a_child")
    assert validate(tmp_path) == 1
    status = Path(f"/proc/{int((tmp_path / 'child').read_text())}/status")
    deadline = time.monotonic() + 120
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_what_is_published_names_no_folder_host_user_or_address(tmp_path: Path) -> None:
    assert validate(tmp_path) == 1
    for name in ("v.json", "v.md", "v.zh.md"):
        text = (tmp_path / name).read_text()
        for private in (socket.gethostname(), "/home", "somebody/", "/usr/local", "10.1.2.3", str(tmp_path), "~/"):
            assert private not in text, (name, private)
        assert "kernel.cpp on HOST at ADDRESS: see x" in text
        if getpass.getuser() != "root":
            assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text)


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("linear/cpu/w8a8/m1/n130+70", "linear/cpu/w8a8/m1/n130+70"),
        ("0 / 0 is 3/4", "0 / 0 is 3/4"),
        ("9.1.0 in /usr/local/Ascend/cann-9.1.0", "9.1.0 in cann-9.1.0"),
        ("--output=/data/x y.json", "--output=x y.json"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("torch 2.13.0+cpu, 8.5.0", "torch 2.13.0+cpu, 8.5.0"),
        ("at 192.168.0.17:22", "at ADDRESS:22"),
        ("'/a/b'", "'b'"),
    ],
)
def test_scrubbing(text: str, scrubbed: str) -> None:
    assert orchestration.scrub({"k": [text]}) == {"k": [scrubbed]}


@pytest.mark.parametrize("host", ["node-17", "node-17.cluster.example"])
def test_a_host_s_name_goes_with_its_domain_and_dns_is_never_asked(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(*_: object) -> str:
        raise AssertionError("where DNS does not answer, this takes seconds each time")

    for name in ("getfqdn", "gethostbyaddr", "gethostbyname", "getaddrinfo"):
        monkeypatch.setattr(socket, name, asks)
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    text = "on node-17, node-17.cluster.example and node-17.other:8000; node-170, my-node-17 and node-17b are others"
    scrubbed = "on HOST, HOST and HOST:8000; node-170, my-node-17 and node-17b are others"
    assert orchestration.scrub(text) == scrubbed


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path, acted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-C and by SIGKILL, in the middle of a step, which is begun anew; the result is that of one run."""
    monkeypatch.setenv("STEPS", "good waits also_good")
    command = [sys.executable, "-c", COMMAND, "validate", "--device", "cpu", "--output", str(tmp_path / "v.json")]
    for number, sign in enumerate((signal.SIGINT, signal.SIGKILL)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        deadline = time.monotonic() + 300
        while started(acted).count("waits") <= number if acted.exists() else True:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(sign)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == (130 if sign == signal.SIGINT else -9)
        assert ("the same command goes on" in said) == (sign == signal.SIGINT)
        assert not (tmp_path / "v.json").exists()
    with (tmp_path / "v.json.journal").open("a") as journal:
        journal.write('{"step": "waits", "torn')
    assert validate(tmp_path) == 0
    assert started(acted) == ["good", "waits", "waits", "waits", "also_good"]
    assert [step["step"] for step in result(tmp_path)["steps"]] == ["good", "waits", "also_good"]
    assert not (tmp_path / "v.json.journal").exists()


COMMAND = """
import sys
from qwen3_fp8_ascend.cli import app
from qwen3_fp8_ascend.evaluate.validate import run as orchestration
from qwen3_fp8_ascend.terminal import run
orchestration.CHILD = [sys.executable, "-m", "tests.evaluate.validate.actor"]
sys.exit(run(app))
"""


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"version": 0}, "version 0"),
        ({"device": "Ascend910B3"}, "device Ascend910B3"),
        ({"seed": 5}, "seed 5"),
        ({"commit": "other"}, "commit other"),
    ],
)
def test_another_runs_journal_is_refused_and_kept(
    tmp_path: Path, header: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = tmp_path / "v.json.journal"
    ours = {"kind": "validate", "version": 1, "device": "Some CPU", "seed": 0, "commit": "abc1234"}
    journal.write_text(json.dumps(ours | header) + "\n" + json.dumps({"step": "good"}) + "\n")
    before = journal.read_bytes()
    assert validate(tmp_path) == 2
    error = capsys.readouterr().err
    assert said in error and "what to do: " in error and "--output" in error
    assert journal.read_bytes() == before


def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v.json.journal").write_text("my diary\n")
    assert validate(tmp_path) == 2
    assert "a journal of `validate`" in capsys.readouterr().err
    assert (tmp_path / "v.json.journal").read_text() == "my diary\n"


def test_an_earlier_result_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v.json").write_text("precious")
    assert validate(tmp_path) == 2
    assert "there is a result already" in capsys.readouterr().err
    assert (tmp_path / "v.json").read_text() == "precious"
    assert validate(tmp_path, "--overwrite") == 1
    assert result(tmp_path)["kind"] == "validate"


def test_a_full_disk_loses_nothing(tmp_path: Path, acted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for it; with room again the run goes on behind the last whole line."""
    monkeypatch.setenv("STEPS", "good also_good")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))

    command = [sys.executable, "-c", COMMAND, "validate", "--device", "cpu", "--output", str(tmp_path / "v.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=limited, check=False)
    assert done.returncode == 2
    assert "the result cannot be written" in done.stderr and "free some space" in done.stderr
    assert not (tmp_path / "v.json").exists() and (tmp_path / "v.json.journal").exists()
    assert validate(tmp_path) == 0
    assert started(acted) == ["good", "also_good", "also_good"]


def test_when_time_is_over_the_rest_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "hangs good")
    request = orchestration.Request(device="cpu", minutes=4 / 60)
    found, notes = orchestration.validate(request, tmp_path / "journal", lambda text: None)
    assert [step["outcome"] for step in found["steps"]] == ["out of time", "out of time"]
    assert found["verdict"] == "incomplete" and not found["steps"][1]["cases"]
    assert notes is not None and not notes.finished, "what did not end is run when it goes on"


def test_jobs_run_beside_each_other_but_for_those_that_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "meets_one meets_two times_one times_two good also_good")
    assert validate(tmp_path, "--jobs", "2") == 0, result(tmp_path)["steps"]
    found = result(tmp_path)
    names = ["meets_one", "meets_two", "times_one", "times_two", "good", "also_good"]
    assert [step["step"] for step in found["steps"]] == names
    assert found["command"] == "qwen3-fp8-ascend validate --device cpu --jobs 2"


def test_steps_that_should_meet_do_not_without_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "times_one meets_one")
    monkeypatch.setenv("MEETING", "1")
    assert validate(tmp_path) == 1
    assert steps(tmp_path)["meets_one"]["failures"][0]["faults"] == ["beside []"]


def test_an_interruption_ends_all_jobs(tmp_path: Path, acted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "good has_a_child hangs also_good")
    command = [sys.executable, "-c", COMMAND, "validate", "--device", "cpu", "--output", str(tmp_path / "v.json")]
    process = subprocess.Popen([*command, "--jobs", "3"], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 300
    while not {"has_a_child", "hangs", "also_good"} <= set(started(acted) if acted.exists() else []):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "the same command goes on" in said
    monkeypatch.setenv("STEPS", "good also_good")
    assert validate(tmp_path) == 0
    assert started(acted).count("good") == 1, "what was finished is not run again"


def test_no_such_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["validate", "--device", "npu", "--output", str(tmp_path / "v.json")]) == 2
    assert "there is no such device" in capsys.readouterr().err
    assert run(app, ["validate", "--device", "tpu", "--output", str(tmp_path / "v.json")]) == 2
    assert "unknown value" in capsys.readouterr().err
    assert not (tmp_path / "v.json").exists() and not (tmp_path / "v.json.journal").exists()


def test_only_runs_what_is_named_and_writes_no_file(
    tmp_path: Path, acted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(app, ["validate", "--device", "cpu", "--only", "wrong/case1"]) == 1
    assert started(acted) == ["wrong"]
    assert "wrong/case1: it is wrong" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [acted]
    assert run(app, ["validate", "--device", "cpu", "--only", "nonsense"]) == 2
    assert "there is no such case" in capsys.readouterr().err


def test_a_measure_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "nan")
    assert validate(tmp_path) == 1
    assert steps(tmp_path)["nan"]["worst"]["element"] | {"share": 0} == {
        "value": None,
        "limit": 1.0,
        "share": 0,
        "case": "nan/case1",
    }
    assert "element NaN" in (tmp_path / "v.md").read_text()


def test_names() -> None:
    case = "linear/cpu/w8a8/bfloat16/m1/n1/k1"
    for pattern in ("*", "linear", "linear/cpu", "linear/*/w8a8", "*/cpu/*", case, "linear/cpu/w8a8/bfloat16/m1/*"):
        assert may_match("linear/cpu/w8a8", pattern) and matches(case, pattern), pattern
    for pattern in ("quantize", "linear/cpu/w8a16", "linear/reference/*"):
        assert not may_match("linear/cpu/w8a8", pattern) and not matches(case, pattern), pattern
    assert may_match("linear/cpu/w8a8", "linear/cpu/w8a8/bfloat16/m2/n1/k1")
    assert not matches(case, "linear/cpu/w8a8/bfloat16/m2/n1/k1")


def test_without_pages(tmp_path: Path) -> None:
    assert validate(tmp_path, "--no-pages") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"v.json", "acted"}


def test_json_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(tmp_path, "--json") == 1
    assert json.loads(capsys.readouterr().out) == result(tmp_path)
    assert os.path.getsize(tmp_path / "v.json") < 20_000
