"""A process that is forked where one would be spawned is as fresh, and gets what a spawned one gets."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

from tests.support.forked_spawn import fork_what_is_spawned


def look(sender: Connection, number: int) -> None:
    sender.send(
        {
            "process": multiprocessing.current_process().name,
            "left": hasattr(json, "left"),
            "environment": [os.environ.get(name) for name in ("EARLY", "LATE", "LATER")],
            "number": number,
            "parent": os.getppid(),
        }
    )
    sys.exit(number)


def start_three() -> None:
    """As vLLM does for two ranks; what they send and their exit statuses."""
    os.environ["EARLY"] = "early"
    with fork_what_is_spawned():
        json.left = "a trace"  # type: ignore[attr-defined]
        os.environ["LATE"] = "late"
        del os.environ["EARLY"]
        spawn, found = multiprocessing.get_context("spawn"), []
        receiver, sender = spawn.Pipe(duplex=False)
        for number in range(3):
            started: Any = spawn.Process(target=look, args=(sender, number), name=f"rank {number}", daemon=True)
            started.start()
            os.environ["LATER"] = str(number)
            seen = receiver.recv()
            started.join(60)
            found.append(seen | {"status": started.exitcode, "parent": seen["parent"] == os.getpid()})
    print(json.dumps(found))


def work(sender: Connection) -> None:
    while time.process_time() < 0.5:
        pass
    sender.send("worked")
    time.sleep(600)


def leave_one_behind() -> None:
    with fork_what_is_spawned():
        spawn = multiprocessing.get_context("spawn")
        receiver, sender = spawn.Pipe(duplex=False)
        started: Any = spawn.Process(target=work, args=(sender,))
        started.start()
        assert receiver.recv() == "worked"
    times = os.times()
    print(json.dumps([started.exitcode, times.children_user + times.children_system > 0.3]))


def run(function: Callable[[], None]) -> Any:
    command = [sys.executable, "-m", __name__, function.__name__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_fresh_and_has_the_environment_of_its_start() -> None:
    seen = json.loads(run(start_three))
    assert [one["process"] for one in seen] == ["rank 0", "rank 1", "rank 2"]
    assert [one["environment"] for one in seen] == [[None, "late", later] for later in (None, "0", "1")]
    assert [(one["number"], one["status"]) for one in seen] == [(0, 0), (1, 1), (2, 2)]
    assert {(one["left"], one["parent"]) for one in seen} == {(False, False)}


def test_what_is_left_is_ended_and_counted() -> None:
    assert json.loads(run(leave_one_behind)) == [-signal.SIGTERM, True]


def test_threads_are_refused() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        with pytest.raises(AssertionError, match="threads"), fork_what_is_spawned():
            pytest.fail("it forked")
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
