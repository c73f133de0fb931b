"""The command line as a user runs it: exit codes, JSON, messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_fp8_ascend import __version__
from qwen3_fp8_ascend.testing.models import write_qwen3


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen3_fp8_ascend", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("models") / "qwen3")


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == __version__
    assert "quantize" in run("--help").stdout


def test_doctor_speaks_json() -> None:
    done = run("doctor", "--json")
    report = json.loads(done.stdout)
    assert {b["name"] for b in report["backends"]} >= {"cpu", "reference"}
    assert done.returncode == (2 if report["problems"] else 0)
    assert report["ascend"]["Ascend C kernels"].startswith(("built", "not built"))


def test_quantize_inspect_dequantize(bf16: Path, tmp_path: Path) -> None:
    fp8, back = tmp_path / "fp8", tmp_path / "back"
    quantized = run("quantize", bf16, fp8)
    assert (quantized.returncode, quantized.stdout) == (0, ""), quantized.stderr
    report = json.loads(run("inspect", fp8, "--json").stdout)
    assert not report["anomalies"]
    assert "block FP8" in run("inspect", fp8).stdout
    assert run("dequantize", fp8, back).returncode == 0
    assert (back / "model.safetensors").stat().st_size > (fp8 / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "no-such-folder"), "no-such-folder"),
        (("quantize", "no-such-folder", "out"), "no-such-folder"),
        (("verify", "http://127.0.0.1:1"), "no server is up there"),
    ],
)
def test_mistakes_end_in_a_message_and_exit_code_2(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error") and said in done.stderr
    assert "what to do" in done.stderr and done.stderr.count("\n") == 1


def test_an_existing_destination_is_not_touched(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    done = run("quantize", bf16, tmp_path)
    assert done.returncode == 2 and "exists" in done.stderr
    assert (tmp_path / "mine").read_text() == "precious"
