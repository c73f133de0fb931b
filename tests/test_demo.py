"""What `make demo` writes into a log: one line a step. Bars and counters that redraw themselves are for terminals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVER = f"""#!{sys.executable}
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.support.answering_server import answering
for second in range(4):
    print("loading", second, flush=True)
    time.sleep(0.5)
print("block FP8 on cpu: backend cpu", flush=True)
with answering({{"": "one two three"}}, model="model", port=int(sys.argv[sys.argv.index("--port") + 1])):
    time.sleep(600)
"""
DEMO = """
import contextlib, sys
from pathlib import Path
import typer
scripts, scratch = sys.argv[1:]
sys.path.insert(0, scripts)
sys.executable = scratch + "/python"
import demo
demo.CACHE = Path(scratch)
with contextlib.suppress(typer.Exit):  # the answers are none
    demo.demo("some/model", timeout=60)
"""
BARS = """
import sys
sys.path.insert(0, sys.argv[1])
import prepare_demo_model
{quiet}
from tqdm.auto import tqdm
from transformers.utils import logging
for bar in (tqdm, logging.tqdm):
    for _ in bar(range(1000)):
        pass
"""


def run(code: str, *arguments: str | Path, **environment: str) -> str:
    """What a script writes into a pipe."""
    plain = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TQDM_DISABLE")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "scripts"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=plain | {"PYTHONPATH": str(ROOT)} | environment,
        timeout=300,
        check=False,
    )
    return done.stdout.decode()


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}], ids=["", "FORCE_COLOR"])
def test_the_demo_writes_one_line_a_step(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "vllm").write_text(SERVER)
    (tmp_path / "vllm").chmod(0o755)
    seen = run(DEMO, tmp_path, **environment)
    assert "ready after" in seen and "backend cpu" in seen and seen.count("[Test ") == 3, seen
    assert seen.count("starting vLLM") == 1 and seen.count("\n") < 20, seen
    assert "\r" not in seen and "\x1b[2K" not in seen and "\x1b[1A" not in seen  # colour is what FORCE_COLOR asks for
    assert environment or "\x1b" not in seen


def test_the_model_is_prepared_without_progress_bars() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert run(BARS.format(quiet="prepare_demo_model.quiet_bars()")) == ""
    assert "\r" in run(BARS.format(quiet=""))
