"""A process that has imported vLLM and computed nothing; each run that tests ask of it is a fork, without imports.

Importing vLLM's engine takes ten seconds of a processor, more than most runs do. What starts fresh in a new process
starts fresh here: before the fork no plugin is loaded, no config read, and no thread started, or it refuses to fork.
Servers, and what a user starts, import all that they need themselves: tests of how a process starts ask `vllm serve`.

`python -m tests.support.preloaded MODULES...` is the process: one request a line, as `Request` is in JSON; `run` asks.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from tests.support import costs

ROOT = Path(__file__).parent.parent.parent
VLLM = (
    "transformers",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "tests.support.vllm_quantizations",
)


@dataclass(frozen=True)
class Request:
    """A module that is run as `python -m` would run it, with what it writes in a log."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    log: str


@dataclass(frozen=True)
class Ended:
    """How a run ended: an exit status as of `subprocess` (negative: a signal), and what it took of processors."""

    status: int
    seconds: float


class Preloaded:
    """A process that has these modules imported; it ends when this one does, however that ends."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**environment, "OPENBLAS_NUM_THREADS": "1"},  # else NumPy and SciPy start threads when imported
            start_new_session=True,  # Ctrl-C is for the tests, which then end and take it along
        )

    def run(self, module: str, *arguments: str, environment: Mapping[str, str], log: Path, timeout: float) -> int:
        """Run a module in a fork. Returns the exit status.

        Raises:
            subprocess.TimeoutExpired: it was not done in time, and has been killed with all that it started.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        request = Request(module, list(arguments), dict(environment), str(log))
        started, late = "", threading.Event()
        try:
            process.stdin.write(json.dumps(asdict(request)) + "\n")
            process.stdin.flush()
            started = process.stdout.readline()
            assert started, f"the process with the imports ended with status {process.wait()}, see above"
            timer = threading.Timer(timeout, _end, (late, started))
            timer.start()
            try:
                ended = Ended(**json.loads(process.stdout.readline()))
            finally:
                timer.cancel()
        except BaseException:  # a test's own time limit, Ctrl-C: the next run must not read what is left of this one
            _kill_group(started)
            process.kill()
            process.wait()
            raise
        costs.add(ended.seconds)
        if late.is_set():
            raise subprocess.TimeoutExpired([module, *arguments], timeout)
        return ended.status

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


_SHARED: dict[tuple[str, ...], Preloaded] = {}


def run(
    module: str,
    *arguments: str,
    environment: Mapping[str, str],
    log: Path,
    timeout: float,
    imported: tuple[str, ...] = VLLM,
) -> int:
    """As the method of this name, of a process that is started when it is first needed."""
    if imported not in _SHARED or _SHARED[imported].has_ended():
        _SHARED[imported] = Preloaded(imported)
    return _SHARED[imported].run(module, *arguments, environment=environment, log=log, timeout=timeout)


def _end(late: threading.Event, pid: str) -> None:
    late.set()
    _kill_group(pid)


def _kill_group(pid: str) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid), signal.SIGKILL)


def import_for_forks(modules: Sequence[str]) -> None:
    """Without garbage collection in forks looking through all of it, which would make its pages each fork's own."""
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the imports print
    import_for_forks(sys.argv[1:])
    requested = _request_in_a_fork(answers)
    if requested is not None:
        _become(requested)


def _request_in_a_fork(answers: TextIO) -> Request | None:
    """Serve requests until there are no more (None); in a fork, return the one that it is for."""
    for line in sys.stdin:
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"{threads} threads: what they hold would be held for ever in a fork"
        used = _seconds_of_children()
        if (pid := os.fork()) == 0:
            os.setsid()
            answers.close()
            return Request(**json.loads(line))
        print(pid, file=answers)
        _, status = os.waitpid(pid, 0)
        ended = Ended(os.waitstatus_to_exitcode(status), _seconds_of_children() - used)
        print(json.dumps(asdict(ended)), file=answers)
    return None


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _become(request: Request) -> None:
    """Be the requested process, to its end: what is registered for the exit is called as usual."""
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for given, wanted in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(given, wanted)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv = [request.module, *request.arguments]
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
