"""The tutorial's commands, as they stand there, from the first to the last."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3_fp8_ascend.testing.server import failure_in, free_port, serving_environment, stop
from qwen3_fp8_ascend.verify import wait_until_up
from tests.support.documents import read

pytestmark = pytest.mark.server

ROOT = Path(__file__).parent.parent.parent


def test_the_tutorial_runs(smollm2: Path, tmp_path: Path) -> None:
    assert smollm2 == ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct-FP8"
    venv = ROOT / ".venv" / "bin"
    if Path(sys.executable).parent.resolve() != venv.resolve():
        pytest.skip("the tutorial is for the environment that `make venv` creates")
    port = free_port()
    environment = serving_environment(SERVE_PORT=str(port), HF_HUB_OFFLINE="1")
    blocks = [b for b in read(ROOT / "docs" / "tutorial.md").code() if b.label in ("run", "server", "dry run")]
    assert [b.label for b in blocks].count("server") == 1
    log = tmp_path / "server.log"
    server: subprocess.Popen[bytes] | None = None
    try:
        for block in blocks:
            line = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
            bash = ["bash", "-euo", "pipefail", "-c", line]
            if block.label == "server":
                with log.open("wb") as sink:
                    server = subprocess.Popen(
                        ["bash", "-c", f"exec {line}"],
                        stdout=sink,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        cwd=ROOT,
                        env=environment,
                        start_new_session=True,
                    )
                wait_until_up(f"http://127.0.0.1:{port}", 300)
                continue
            start = time.monotonic()
            done = subprocess.run(bash, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
            print(f"\n$ {line}({time.monotonic() - start:.1f} s)\n{done.stdout[-600:]}")
            if "doctor" in line:
                assert done.returncode in (0, 2)  # on a machine with problems it names them
                continue
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}\n{failure_in(log) if server else ''}"
        assert server is not None
        started = log.read_text(errors="replace")
        assert "Application startup complete" in started and "block FP8 on cpu: backend cpu (" in started
        # The script's process became vLLM's (`exec`), so that stopping the script stops the server.
        os.kill(server.pid, signal.SIGTERM)
        server.wait(60)
    finally:
        if server is not None:
            stop(server)
