"""A Python for scripts and commands that has packages imported: each `PYTHON -m MODULE ...` is a fork of one process.

What most commands do takes less than importing torch or transformers does. Whoever starts this Python sees a
process as always: working folder, environment, open files, exit status and death by a signal are those of the run, and
one that is killed takes the run along. Our own modules are imported by each run. What is judged of how a command starts
asks `sys.executable`.

`python -m tests.support.preloaded_python SOCKET MODULES...` is the process; it ends when its stdin does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.support.preloaded import ROOT, import_for_forks, run_to_the_end

TORCH = ("rich.logging", "rich.table", "typer.main", "pydantic.main", "pydantic.json_schema", "safetensors.torch")
"""What our commands import, torch included."""
MODELS = (
    *TORCH,
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "matplotlib.pyplot",
)
"""What `eval-precision` imports."""
MOST_BYTES, MOST_FILES = 1 << 17, 64
"""Of a request: its text, and the open files that it passes on."""


@contextlib.contextmanager
def preloaded_python(modules: Sequence[str], environment: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """An executable, for the length of a `with` block. What libraries read when they are loaded is in `environment`."""
    with tempfile.TemporaryDirectory() as name:
        address, executable = Path(name) / "socket", Path(name) / "python"
        words = [sys.executable, "-IS", str(ROOT / "tests" / "support" / "preloaded_client.py"), str(address)]
        executable.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        executable.chmod(0o755)
        with subprocess.Popen(
            [sys.executable, "-m", __name__, str(address), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**environment, "OPENBLAS_NUM_THREADS": "1"},  # else NumPy and SciPy start threads when imported
            start_new_session=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.read(1), "the process with the imports has ended, see above"
            yield executable


def main(address: str, *modules: str) -> None:
    ready = os.dup(1)
    os.dup2(2, 1)  # whatever the imports print
    import_for_forks(modules)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: what they hold would be held for ever in a fork"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        os.write(ready, b"!")
        os.close(ready)
        requested = _request_in_a_fork(listener)
    if requested is not None:
        _become(*requested)


@dataclass(frozen=True)
class Run:
    """A fork, the descriptor that says that it has ended, and who has asked for it."""

    pid: int
    ending: int
    client: socket.socket


def _request_in_a_fork(listener: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Serve requests until stdin ends (None); in a fork, return the one that it is for, and its files."""
    runs: list[Run] = []
    while True:
        ready = _ready(listener, runs)
        if 0 in ready:
            for run in runs:
                _kill(run.pid)
                os.waitpid(run.pid, 0)
            return None
        for run in list(runs):
            if run.ending in ready:
                runs.remove(run)
                status = os.waitstatus_to_exitcode(os.waitpid(run.pid, 0)[1])
                os.close(run.ending)
                with run.client, contextlib.suppress(BrokenPipeError):
                    run.client.send(str(status).encode())
            elif run.client.fileno() in ready:  # who asked for it is gone
                _kill(run.pid)
        if listener.fileno() in ready:
            client, _ = listener.accept()
            text, files, *_ = socket.recv_fds(client, MOST_BYTES, MOST_FILES)
            if (pid := os.fork()) == 0:
                for other in (client, *(run.client for run in runs)):
                    other.close()
                os.setsid()
                return json.loads(text), files
            for file in files:
                os.close(file)
            runs.append(Run(pid, os.pidfd_open(pid), client))


def _ready(listener: socket.socket, runs: Sequence[Run]) -> set[int]:
    """Those that have something to say; of stdin and of clients it is that they have ended."""
    events = select.poll()
    events.register(listener, select.POLLIN)
    for descriptor in (0, *(run.client.fileno() for run in runs)):
        events.register(descriptor, 0)
    for run in runs:
        events.register(run.ending, select.POLLIN)
    return {descriptor for descriptor, _ in events.poll()}


def _kill(pid: int) -> None:
    """With all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _become(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Be the requested process, to its end."""
    above = max([*files, *request["files"]]) + 1
    held = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]
    for file in files:
        os.close(file)
    for file, wanted in zip(held, request["files"], strict=True):
        os.dup2(file, wanted)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    _, module, *arguments = request["arguments"]
    sys.path[:1] = [request["folder"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv, sys.orig_argv = [module, *arguments], [sys.executable, *request["arguments"]]
    run_to_the_end(module)


if __name__ == "__main__":
    main(*sys.argv[1:])
