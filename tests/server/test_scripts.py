"""The scripts of the verification report, from beginning to end: serve, verify, stop."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3_fp8_ascend.testing.server import failure_in, free_port, serving_environment, stop

pytestmark = pytest.mark.server

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The demo's model behind the serve script, and its address."""
    port = free_port()
    log = tmp_path_factory.mktemp("served") / "server.log"
    command = ["bash", SCRIPTS / "serve_qwen3-8b-fp8.sh", "--model", smollm2, "--port", str(port)]
    command += ["--max-model-len", "1024", "--kv-cache-gib", "1", "--python", sys.executable, "--", "--enforce-eager"]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=serving_environment(),
            start_new_session=True,
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    except BaseException:
        print(failure_in(log))
        raise
    finally:
        stop(process)


def verify(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = ["bash", str(SCRIPTS / "verify_qwen3-8b-fp8.sh"), "--python", sys.executable, "--url", url]
    return subprocess.run([*script, *arguments], capture_output=True, text=True, check=False, timeout=600)


def test_serve_then_verify(served: tuple[subprocess.Popen[bytes], str], tmp_path: Path) -> None:
    _, url = served
    output = tmp_path / "verify.json"
    done = verify(url, "--wait", "300", "--languages", "en", "--output", str(output))
    print(done.stdout, done.stderr)
    found = json.loads(output.read_text())
    assert found["server"]["model"] == "qwen3-8b-fp8" and found["server"]["root"] == "SmolLM2-135M-Instruct-FP8"
    verdicts = [answer["verdict"] for answer in found["answers"]]
    assert verdicts[0] == "passed" and verdicts[2] == "not applicable"
    assert done.returncode == (1 if "failed" in verdicts else 0)
    assert "SmolLM2-135M-Instruct-FP8 功能验证" in done.stdout


def test_what_the_model_cannot_do_fails(served: tuple[subprocess.Popen[bytes], str]) -> None:
    """SmolLM2 was not made for Chinese; asked to be judged on it, the script says that its answer is none."""
    _, url = served
    done = verify(url, "--wait", "300", "--form", "en")
    print(done.stdout)
    assert done.returncode == 1
    assert "❌ Chinese: " in done.stdout


def test_its_throughput_is_measured(served: tuple[subprocess.Popen[bytes], str], tmp_path: Path) -> None:
    _, url = served
    output = tmp_path / "throughput.json"
    load = ["--requests", "4", "--concurrency", "2", "--input-len", "16", "--output-len", "8", "--repeats", "1"]
    command = [sys.executable, "-m", "qwen3_fp8_ascend", "bench", "serving", "--server", f"CPU, FP8={url}"]
    done = subprocess.run([*command, *load, "--output", output], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    (row,) = json.loads(output.read_text())["rows"]
    # Two requests at a time, of eight tokens each: the figures have to agree with each other.
    assert row["output_tokens_per_second"] == pytest.approx(8 * row["requests_per_second"], rel=0.01)
    alone = row["ttft_ms"] + 7 * row["tpot_ms"]
    assert 0.3 < 2e3 / row["requests_per_second"] / alone < 3


def test_a_wrong_model_name_is_told(served: tuple[subprocess.Popen[bytes], str]) -> None:
    _, url = served
    done = verify(url, "--wait", "300", "--model", "Qwen3-8B-FP8")
    assert (done.returncode, done.stdout) == (2, "")
    assert "does not serve 'Qwen3-8B-FP8'" in done.stderr and "one of qwen3-8b-fp8" in done.stderr


def test_the_script_is_the_server(served: tuple[subprocess.Popen[bytes], str]) -> None:
    """Its process became vLLM's (`exec`), so that stopping the script stops the server."""
    process, url = served
    assert verify(url, "--wait", "300", "--languages", "en").returncode in (0, 1)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(60)
    done = verify(url, "--wait", "0")
    assert done.returncode == 2 and "no server is up there" in done.stderr
