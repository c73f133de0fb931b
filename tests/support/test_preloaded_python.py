"""Who starts a Python with its imports done sees a process as always."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.preloaded_python import preloaded_python
from tests.support.processes import wait_until_ended

SCRIPT = """
import json, os, signal, sys
from subprocess import Popen

what, *arguments = sys.argv[1:]
if what == "tells":
    print(os.getcwd(), os.environ["GIVEN"], sys.stdin.read(), sys.orig_argv[1:], flush=True)
    print("also this", file=sys.stderr)
    os.write(int(arguments[0]), b"passed on")
    sys.exit(3)
if what == "dies":
    os.kill(os.getpid(), signal.SIGSEGV)
if what == "waits":
    print(os.getpid(), Popen(["sleep", "600"]).pid, flush=True)
    signal.pause()
"""


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    with preloaded_python(["json"]) as executable:
        yield executable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the module `script` is."""
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def test_its_surroundings_are_those_of_who_starts_it(python: Path, folder: Path) -> None:
    reading, writing = os.pipe()
    line = [python, "-m", "script", "tells", str(writing)]
    environment = os.environ | {"GIVEN": "yes"}
    done = subprocess.run(
        line, input="in", capture_output=True, text=True, cwd=folder, env=environment, pass_fds=[writing]
    )
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "passed on"
    words = ["-m", "script", "tells", str(writing)]
    assert (done.returncode, done.stdout) == (3, f"{folder} yes in {words}\n")
    assert done.stderr == "also this\n"


def test_it_ends_as_the_run_does(python: Path, folder: Path) -> None:
    assert subprocess.run([python, "-m", "script", "dies"], cwd=folder).returncode == -signal.SIGSEGV
    failed, wanted = (
        subprocess.run([which, "-m", "json.tool", "absent.json"], capture_output=True, text=True, cwd=folder)
        for which in (python, sys.executable)
    )
    assert failed.returncode == wanted.returncode != 0 and "absent.json" in failed.stderr


def test_one_that_is_killed_takes_the_run_along(python: Path, folder: Path) -> None:
    process = subprocess.Popen([python, "-m", "script", "waits"], stdout=subprocess.PIPE, text=True, cwd=folder)
    assert process.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(processes) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    assert wait_until_ended(processes, 300) == []


def test_what_is_no_module_is_run_by_python_itself(python: Path) -> None:
    assert subprocess.run([python, "-c", "print(1 + 1)"], capture_output=True, text=True).stdout == "2\n"
