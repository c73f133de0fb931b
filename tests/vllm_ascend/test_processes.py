"""`vllm serve --quantization ascend` beside vLLM-Ascend, as far as a machine without CANN lets it come."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_fp8_ascend.serving import free_port
from tests.support import forked_server, vllm_ascend_forks

from .conftest import BLOCK_FP8, write_config

ROOT = Path(__file__).parents[2]
COMMANDS = [
    pytest.param(forked_server.MODULE, id="forks"),
    pytest.param(forked_server.MAIN, id="interpreters", marks=pytest.mark.long),
]
"""Engine and ranks are forks of a first process that has imported what they need and loaded no plugin, or a user's."""

WITNESS = """
import atexit, json, multiprocessing, multiprocessing.util, os, sys, time

NAME = multiprocessing.current_process().name
WORKERS = {"VllmWorker-0", "VllmWorker-1"}


def say():
    from vllm.model_executor.layers.quantization import get_quantization_config

    config = get_quantization_config("ascend")
    seen = {
        "process": NAME,
        "ascend": f"{config.__module__}.{config.__name__}",
        # A process that is ended while it loads its plugins may not have come to ours.
        "asked us": "qwen3_fp8_ascend.vllm_plugin.ascend" in sys.modules,
    }
    with open(os.environ["WITNESS"], "a") as file:
        file.write(json.dumps(seen) + "\\n")


def said():
    with open(os.environ["WITNESS"]) as file:
        return {json.loads(line)["process"] for line in file if line.endswith("\\n")}


class Acl:
    # A worker that finds no CANN fails, and the other one is ended wherever it is: so each waits here for the other.
    def find_spec(self, name, path, target=None):
        if name == "acl":
            sys.meta_path.remove(self)
            say()
            last = time.monotonic() + 300
            while not WORKERS <= said() and time.monotonic() < last:
                time.sleep(0.1)


def register():
    if NAME in WORKERS:
        sys.meta_path.insert(0, Acl())
    elif multiprocessing.parent_process() is None:
        atexit.register(say)
    else:
        multiprocessing.util.Finalize(None, say, exitpriority=100)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_process_of_vllm_serve_has_it(command: str, tmp_path: Path) -> None:
    """Two ranks, up to where the workers ask for CANN, when a plugin of the test's says what `ascend` is."""
    info = tmp_path / "witness-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: witness\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nwitness = witness:register\n")
    (tmp_path / "witness.py").write_text(WITNESS)
    folder = write_config(tmp_path / "model", quantization_config=BLOCK_FP8)
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}",
        "WITNESS": str(tmp_path / "seen"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    arguments = ["--quantization", "ascend", "--load-format", "dummy", "--skip-tokenizer-init"]
    arguments += ["--max-model-len", "128", "--tensor-parallel-size", "2", "--host", "127.0.0.1"]
    arguments += ["--port", str(free_port())]
    if command == forked_server.MODULE:
        done = vllm_ascend_forks.run(command, "serve", str(folder), *arguments, folder=ROOT, environment=environment)
    else:
        line = [sys.executable, "-m", command, "serve", str(folder), *arguments]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    log = done.stdout + done.stderr
    assert done.returncode != 0 and "No module named 'acl'" in log, log[-5000:]
    assert "quantization=ascend" in log, "the engine core did not say so"
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    asked = [line for line in seen if line["asked us"]]
    assert {"MainProcess", "EngineCore", "VllmWorker-0", "VllmWorker-1"} <= {line["process"] for line in asked}, seen
    assert {line["ascend"] for line in asked} == {"qwen3_fp8_ascend.vllm_plugin.ascend.AscendConfig"}, seen
