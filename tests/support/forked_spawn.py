"""Processes that multiprocessing would spawn are forks of this one as it is now: fresh, but without imports.

vLLM spawns a process for each rank, which imports vLLM for ten seconds of a processor. `fork_what_is_spawned` leaves a
fork of the calling process behind that has what is imported now and nothing of what comes later; it is asked for each
process instead of a new interpreter. What a spawned process gets it gets too: the environment and the arguments of the
moment it is started, pickled. Its libraries alone are loaded already, so that LD_PRELOAD comes too late.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from multiprocessing import connection, context, forkserver, popen_forkserver, process, resource_tracker
from typing import Any

PATIENCE = 10
"""Seconds in which a process has ended that was told to."""


@contextlib.contextmanager
def fork_what_is_spawned(depth: int = 1) -> Iterator[None]:
    """For the length of a `with` block. What was started in it and has not ended is ended then, as at a process's exit.

    So is the process that forks, and this process's times then hold those of all that was forked. With a `depth` of two
    what is spawned by a spawned process is a fork as well, and so on.

    Raises:
        AssertionError: a thread is running, or the fork server of multiprocessing.
    """
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]  # how else to have one without an interpreter
    assert server._forkserver_pid is None, "multiprocessing has a fork server already"
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: what they hold would be held for ever in a fork"
    resource_tracker.ensure_running()
    listener, address = socket.socket(socket.AF_UNIX), connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
    listener.bind(address)
    listener.listen()
    alive_r, alive_w = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(alive_w)
        try:
            forkserver.main(listener.detach(), alive_r, preload=[])
        finally:
            os._exit(0)
    os.close(alive_r)
    listener.close()
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, alive_w, pid
    spawned = context.SpawnProcess._Popen
    context.SpawnProcess._Popen = staticmethod(functools.partial(_fork, depth))  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        context.SpawnProcess._Popen = spawned  # type: ignore[method-assign]
        for left in multiprocessing.active_children():
            left.terminate()
            left.join(PATIENCE)
            left.kill()
        server._stop()


def _fork(depth: int, started: process.BaseProcess) -> popen_forkserver.Popen:
    target: Any = started._target  # type: ignore[attr-defined]
    started._target = functools.partial(_run, depth - 1, dict(os.environ), target)  # type: ignore[attr-defined]
    return popen_forkserver.Popen(started)


def _run(depth: int, environment: dict[str, str], target: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    os.environ.clear()
    os.environ.update(environment)
    with fork_what_is_spawned(depth) if depth else contextlib.nullcontext():
        return target(*arguments, **options)
