"""The tutorial's commands as they stand there, and what the scripts of the verification report do on a real server."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen3_fp8_ascend.evaluate.answers import QUESTIONS, ask
from qwen3_fp8_ascend.evaluate.servers import wait_until_up
from qwen3_fp8_ascend.serving import failure_in, free_port, serving_environment, stop
from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3
from tests.support.documents import read
from tests.support.preloaded_python import MODELS, preloaded_python
from tests.support.processes import family, wait_until_ended
from tests.support.quiet_waits import quiet_environment

pytestmark = pytest.mark.server

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 840
"""Seconds, less than a test's own limit: the dearest block takes 100 on a machine that has nothing else to do."""
BLOCKS = [block for block in read(ROOT / "docs" / "tutorial.md").code() if block.language == "bash"]


@dataclass(frozen=True)
class Served:
    """The server that the tutorial's own command started."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    environment: dict[str, str]

    def shell(self, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a block of the tutorial against this server."""
        line = text.replace("http://127.0.0.1:8000", self.url)
        bash = ["bash", "-euo", "pipefail", "-c", line]
        start = time.monotonic()
        variables = self.environment | environment
        done = subprocess.run(
            bash, capture_output=True, text=True, check=False, cwd=ROOT, env=variables, timeout=PATIENCE
        )
        print(f"\n$ {line}({time.monotonic() - start:.1f} s)\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
        return done


def still_runs(process: subprocess.Popen[bytes], waited: float) -> None:
    if process.poll() is not None:
        raise ValueError(f"the server ended after {waited:.0f} s")


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Start the tutorial's server, on another port."""
    assert smollm2 == ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct-FP8"
    if Path(sys.executable).parent.resolve() != (ROOT / ".venv" / "bin").resolve():
        pytest.skip("the tutorial is for the environment that `make venv` creates")
    (command,) = [block.text for block in BLOCKS if block.label == "server"]
    port = free_port()
    folder = tmp_path_factory.mktemp("served")
    environment = serving_environment(SERVE_PORT=str(port), HF_HUB_OFFLINE="1")
    log = folder / "server.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment | quiet_environment(folder),
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_up(url, PATIENCE, functools.partial(still_runs, process))
        except ValueError:
            print(failure_in(log))
            raise
        yield Served(process, url, log, environment)
    finally:
        stop(process)


@pytest.mark.parametrize("number", [n for n, block in enumerate(BLOCKS) if block.label in ("run", "dry run")])
def test_the_tutorial_runs(served: Served, number: int) -> None:
    text = BLOCKS[number].text
    if "curl" in text and shutil.which("curl") is None:
        pytest.skip("no program curl: apt-get install curl")
    if "eval_precision" in text and "dry-run" not in text:
        shutil.rmtree(ROOT / ".cache" / "precision", ignore_errors=True)  # it keeps what exists
        with preloaded_python(MODELS) as python:
            done = served.shell(text, PYTHON=str(python))
    else:
        done = served.shell(text)
    if "doctor" in text:
        # It says what is ready, or names the problems of this machine.
        assert ("ready to serve block FP8" in done.stdout) == (done.returncode == 0), done.stdout
        assert done.returncode in (0, 2)
    else:
        assert done.returncode == 0
    if "inspect" in text:
        assert done.stdout.splitlines()[-1] == "no anomalies"
    if "/v1/completions" in text:
        assert json.loads(done.stdout)["choices"][0]["text"].strip()
    if "verify" in text:
        assert "SmolLM2-135M-Instruct-FP8 功能验证完成" in done.stdout and "(不适用)" in done.stdout
    if "eval_precision" in text and "dry-run" not in text:
        assert "|  | cpu w8a8 | original | server | noise floor |" in done.stdout
        (found,) = (ROOT / ".cache" / "precision").glob("precision-*.json")
        _, original, server = json.loads(found.read_text())["rows"]
        # The server computes in bfloat16: off by its noise floor, which is about what quantization costs here.
        assert 0 < server["kl_mean"] < 2 * original["kl_mean"]
    if "bench serving" in text:
        (row,) = json.loads((ROOT / ".cache" / "throughput.json").read_text())["rows"]
        # Two requests at a time, of eight tokens each: the figures have to agree with each other.
        assert row["output_tokens_per_second"] == pytest.approx(8 * row["requests_per_second"], rel=0.01)
        alone = row["ttft_ms"] + 7 * row["tpot_ms"]
        assert 0.3 < 2e3 / row["requests_per_second"] / alone < 3


def test_its_log_says_what_the_tutorial_says(served: Served) -> None:
    log = served.log.read_text(errors="replace")
    assert "Failed to load plugin" not in log
    assert "Application startup complete" in log and "block FP8 on cpu: backend cpu (" in log


def test_what_the_model_cannot_do_fails(served: Served, tmp_path: Path) -> None:
    """SmolLM2 was not made for Chinese; asked to be judged on it, the script says that its answer is none.

    Its file says who answered.
    """
    output = tmp_path / "verify.json"
    done = served.shell(f"scripts/verify_qwen3-8b-fp8.sh --url http://127.0.0.1:8000 --form en --output {output}")
    assert done.returncode == 1
    assert "❌ Chinese: " in done.stdout and "✅ Answer: " in done.stdout
    found = json.loads(output.read_text())
    assert found["server"]["model"] == "qwen3-8b-fp8" and found["server"]["root"] == "SmolLM2-135M-Instruct-FP8"
    assert [answer["verdict"] for answer in found["answers"]] == ["passed", "passed", "failed"]


def test_a_wrong_model_name_is_told(served: Served) -> None:
    done = served.shell("scripts/verify_qwen3-8b-fp8.sh --url http://127.0.0.1:8000 --model Qwen3-8B-FP8")
    assert (done.returncode, done.stdout) == (2, "")
    assert "does not serve 'Qwen3-8B-FP8'" in done.stderr and "one of qwen3-8b-fp8" in done.stderr


def test_stopping_the_script_stops_the_server(served: Served) -> None:
    """Its process became vLLM's (`exec`), which ends with all that it started."""
    processes = family(served.process.pid)
    os.kill(served.process.pid, signal.SIGTERM)
    assert served.process.wait(60) == 0
    assert len(processes) > 2 and wait_until_ended(processes, 5) == []
    done = served.shell("scripts/verify_qwen3-8b-fp8.sh --url http://127.0.0.1:8000 --wait 0")
    assert done.returncode == 2 and "no server is up there" in done.stderr


@pytest.mark.long
def test_two_ranks_through_the_script(tmp_path: Path) -> None:
    """`--tensor-parallel-size 2` on a CPU: each rank gets cores of its own, and the server answers."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two ranks need two cores")
    model = write_block_fp8_qwen3(tmp_path / "qwen3", num_key_value_heads=4)
    port = free_port()
    command = ["bash", "scripts/serve_qwen3-8b-fp8.sh", "--model", model, "--port", str(port), "--max-model-len", "512"]
    command += [
        "--tensor-parallel-size",
        "2",
        "--kv-cache-gib",
        "1",
        "--python",
        sys.executable,
        "--",
        "--enforce-eager",
    ]
    log = tmp_path / "server.log"
    environment = serving_environment()
    del environment["VLLM_CPU_OMP_THREADS_BIND"]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
    try:
        wait_until_up(f"http://127.0.0.1:{port}", 400, functools.partial(still_runs, process))
        answer = ask(f"http://127.0.0.1:{port}", "qwen3-8b-fp8", QUESTIONS[0])
    except ValueError:
        print(failure_in(log))
        raise
    finally:
        stop(process)
    assert answer.tokens >= 4
    bindings = re.search(r"VLLM_CPU_OMP_THREADS_BIND=\S*'?([\d,]+)\|([\d,]+)", log.read_text(errors="replace"))
    assert bindings and not set(bindings[1].split(",")) & set(bindings[2].split(","))
    assert "tensor_parallel_size=2" in log.read_text(errors="replace")
