"""A process that has imported vLLM and computed nothing; each run that tests ask of it is a fork, without imports.

Importing vLLM's engine takes ten seconds of a processor, more than most runs do. What starts fresh in a new process
starts fresh here: before the fork no plugin is loaded, no config read, and no thread started, or it refuses to fork.
What a user starts imports all that it needs itself: tests of how a process starts ask `vllm serve`.

`python -m tests.support.preloaded MODULES...` is the process: a line asks it to start a run, or how one ended.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import math
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO
from unittest.mock import patch

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
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
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


class Forked:
    """A run that has been started, as far as `subprocess.Popen` has a word for it. It leads a session of its own."""

    def __init__(self, template: Preloaded, arguments: Sequence[str], pid: int) -> None:
        self.args, self.pid = list(arguments), pid
        self.returncode: int | None = None
        self._template, self._ending = template, os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its exit status as of `subprocess` (negative: a signal), None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, within so many seconds.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            ending = select.poll()
            ending.register(self._ending, select.POLLIN)
            if not ending.poll(None if timeout is None else math.ceil(1000 * timeout)):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            ended = Ended(**self._template.ask({"ended": self.pid}))
            os.close(self._ending)
            self.returncode = ended.status
            costs.add(ended.seconds)
        return self.returncode

    def kill(self) -> None:
        """With all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Preloaded:
    """A process that has these modules imported; it ends when this one does, however that ends."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**environment, "OPENBLAS_NUM_THREADS": "1"},  # else NumPy and SciPy start threads when imported
            start_new_session=True,  # Ctrl-C is for the tests, which then end and take it along
        )

    def start(self, module: str, *arguments: str, environment: Mapping[str, str], log: Path) -> Forked:
        """Begin to run a module in a fork."""
        request = Request(module, list(arguments), dict(environment), str(log))
        return Forked(self, [module, *arguments], self.ask({"start": asdict(request)})["pid"])

    def run(self, module: str, *arguments: str, environment: Mapping[str, str], log: Path, timeout: float) -> int:
        """Run a module in a fork. Returns the exit status.

        Raises:
            subprocess.TimeoutExpired: it was not done in time, and has been killed with all that it started.
        """
        forked = self.start(module, *arguments, environment=environment, log=log)
        try:
            return forked.wait(timeout)
        except BaseException:  # a test's own time limit and Ctrl-C among them
            forked.kill()
            forked.wait()
            raise

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """What the process answers."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with self._lock:
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BaseException:  # whoever asks next must not get what is left of this answer
                process.kill()
                process.wait()
                raise
        assert answer, f"the process with the imports ended with status {process.wait()}, see above"
        return json.loads(answer)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


_SHARED: dict[tuple[str, ...], Preloaded] = {}


def shared(imported: tuple[str, ...] = VLLM) -> Preloaded:
    """A process that is started when it is first needed."""
    if imported not in _SHARED or _SHARED[imported].has_ended():
        _SHARED[imported] = Preloaded(imported)
    return _SHARED[imported]


def end_shared() -> None:
    """End those processes; their times are then among those of this one's children."""
    while _SHARED:
        _SHARED.popitem()[1].close()


def import_for_forks(modules: Sequence[str]) -> None:
    """Without garbage collection in forks looking through all of it, which would make its pages each fork's own."""
    with _decorators_that_compile_nothing() if set(VLLM) <= set(modules) else contextlib.nullcontext():
        for module in modules:
            importlib.import_module(module)
    gc.collect()
    gc.freeze()


def _decorators_that_compile_nothing() -> contextlib.AbstractContextManager[Any]:
    """While vLLM is imported: it has a few functions beside its models that a decorator compiles.

    Dynamo and Inductor take half of a short run for them, even in eager execution. Models are compiled as always, when
    they are made.
    """
    import torch

    def as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return as_it_is if function is None else function

    return patch.object(torch, "compile", as_it_is)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the imports print
    # It finds where a title is written only while nothing has changed the environment.
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").getproctitle()
    import_for_forks(sys.argv[1:])
    requested = _request_in_a_fork(answers)
    if requested is not None:
        _become(requested)


def _request_in_a_fork(answers: TextIO) -> Request | None:
    """Serve requests until there are no more (None); in a fork, return the one that it is for."""
    for line in sys.stdin:
        question = json.loads(line)
        if "ended" in question:
            _, status, used = os.wait4(question["ended"], 0)
            answer = asdict(Ended(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime))
        else:
            threads = len(os.listdir("/proc/self/task"))
            assert threads == 1, f"{threads} threads: what they hold would be held for ever in a fork"
            if (pid := os.fork()) == 0:
                os.setsid()
                answers.close()
                return Request(**question["start"])
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers)
    return None


def _become(request: Request) -> NoReturn:
    """Be the requested process, to its end."""
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for given, wanted in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(given, wanted)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv = [request.module, *request.arguments]
    run_to_the_end(request.module)


def run_to_the_end(module: str) -> NoReturn:
    """Run it as `python -m` would, and end as forks of multiprocessing do.

    What is registered for the exit is called. That an interpreter then takes all that is imported apart is spared: it
    takes most of a second.
    """
    status: int | str | None = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    main()
