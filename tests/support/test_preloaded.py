"""Runs that are forks of one process are as separate as processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support import costs, preloaded

Ask = Callable[..., tuple[int, str]]
LIGHT = ("json",)
LEAVES = """
import os, sys, json
json.left = os.environ["LEFT"] = "a trace"
print("said", *sys.argv[1:], flush=True)
sys.exit(3)
"""
LOOKS = """
import atexit, json, os, sys
assert __name__ == "__main__" and os.getsid(0) == os.getpid() and sys.stdin.read() == ""
atexit.register(print, "at the end")
print(hasattr(json, "left"), "LEFT" in os.environ, os.environ["GIVEN"])
"""
HANGS = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
WORKS = """
import time
while time.process_time() < 0.5: pass
"""


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Run a script as a module; returns its exit status and what it wrote."""

    def run(script: str, *arguments: str, timeout: float = 120, **environment: str) -> tuple[int, str]:
        file, log = tmp_path / "script.py", tmp_path / "log"
        file.write_text(script)
        given = dict(os.environ) | environment
        template = preloaded.shared(LIGHT)
        status = template.run(__name__, str(file), *arguments, environment=given, log=log, timeout=timeout)
        return status, log.read_text()

    return run


def test_a_run_leaves_nothing_for_the_next_one(ask: Ask) -> None:
    assert ask(LEAVES, "one", "two") == (3, "said one two\n")
    assert ask(LOOKS, GIVEN="yes") == (0, "False False yes\nat the end\n")


def test_an_exception_is_a_status_and_a_traceback(ask: Ask) -> None:
    status, said = ask("raise OSError('no')")
    assert status == 1 and said.rstrip().endswith("OSError: no")


def test_a_run_that_hangs_is_killed_with_its_children(ask: Ask, tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        ask(HANGS, timeout=8)
    pids = [int(pid) for pid in (tmp_path / "log").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 300
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ask(LOOKS, GIVEN="again")[0] == 0


def test_several_may_run_at_a_time(ask: Ask, tmp_path: Path) -> None:
    """As servers do while other runs come and go."""
    script, environment = tmp_path / "waits.py", dict(os.environ)
    script.write_text("import signal, sys; print('ready', flush=True); signal.pause()")
    logs = [tmp_path / "first", tmp_path / "second"]
    first, second = (
        preloaded.shared(LIGHT).start(__name__, str(script), environment=environment, log=log) for log in logs
    )
    assert ask(LOOKS, GIVEN="between")[0] == 0
    deadline = time.monotonic() + 300
    while not all(log.is_file() and "ready" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert first.poll() is None and second.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.01)
    second.kill()
    assert second.wait(300) == second.poll() == -signal.SIGKILL
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait() == first.returncode == -signal.SIGTERM


def test_what_it_takes_of_processors_is_counted(ask: Ask) -> None:
    before = costs.processor_seconds()
    assert ask(WORKS)[0] == 0
    assert 0.4 < costs.processor_seconds() - before < 5


if __name__ == "__main__":  # the module that is run
    exec(Path(sys.argv.pop(1)).read_text())
