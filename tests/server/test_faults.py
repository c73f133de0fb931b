"""Processes that are killed and servers that are told to stop: nothing hangs, nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from qwen3_fp8_ascend.serving import Server, stop
from tests.support.expert_models import write_experts
from tests.support.load import Outcome, Request, requests_held, run_load
from tests.support.processes import family, named, wait_until_ended

from .conftest import ASCEND, EAGER, Start

pytestmark = pytest.mark.server

LONG = pytest.mark.long
PATIENCE = 30
"""Seconds within which a fault must have been reported, and a server have ended."""


@pytest.mark.parametrize(
    ("started", "model", "victim", "terminate"),
    [
        pytest.param("start_forked", "tiny_qwen3", "Worker", os.kill, id="forked-worker-process"),
        pytest.param("start", "tiny_qwen3", "Worker", os.kill, id="worker-process", marks=LONG),
        pytest.param("start", "tiny_qwen3", "EngineCore", os.killpg, id="engine-group", marks=LONG),
        pytest.param("start", "tiny_experts", "Worker", os.kill, id="experts-worker-process", marks=LONG),
        pytest.param("start", "tiny_experts", "EngineCore", os.killpg, id="experts-engine-group", marks=LONG),
    ],
)
def test_a_killed_process_is_reported_and_a_restart_serves_again(
    request: pytest.FixtureRequest,
    start_forked: Start,
    started: str,
    model: str,
    victim: str,
    terminate: Callable[[int, int], None],
) -> None:
    """In the same go the restarted server is told to stop: by itself, as containers do, or with all its processes,

    as a terminal and systemd do. What is killed is of a `vllm serve`, in the short form one whose processes are forks;
    the restart's are. A `vllm serve` is told to stop in tests/server/test_scripts.py.
    """
    folder = request.getfixturevalue(model)
    server = request.getfixturevalue(started)(folder, *ASCEND, EAGER)
    before = answer(server)
    processes = family(server.process.pid)
    running, pid = Background(server), named(server.process.pid, victim).pid
    running.hold(pid)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    health, after = reported_by(server), time.monotonic() - killed
    failures = running.failures()
    print(f"\n{victim} killed: {health} after {after:.1f} s; requests: {failures}")
    assert any("EngineCore encountered an issue" in reason for reason in failures), failures
    left = wait_until_ended(processes, PATIENCE)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(1)
    print(f"  exit status {server.process.returncode}, processes left: {[p.name() for p in left]}")
    assert left == []
    # vLLM 0.30 ends with status 0 here, so a supervisor must restart it whatever the status.
    assert server.process.returncode is not None
    assert "EngineDeadError" in server.log.read_text()

    restarted = start_forked(folder, *ASCEND, EAGER)
    assert answer(restarted).steps == before.steps
    processes = family(restarted.process.pid)
    told = time.monotonic()
    terminate(restarted.process.pid, signal.SIGTERM)
    status = restarted.process.wait(PATIENCE)
    print(f"SIGTERM: exit status {status} after {time.monotonic() - told:.1f} s")
    assert status == 0
    assert wait_until_ended(processes, 5) == []
    assert_port_is_free(restarted)


@pytest.fixture
def tiny_experts(tmp_path: Path) -> Path:
    """A random Qwen3 with a layer of experts in block FP8."""
    return write_experts(tmp_path / "experts", "qwen3_moe")


@LONG
@pytest.mark.parametrize("terminate", [os.kill, os.killpg], ids=["process", "group"])
def test_sigterm_while_clients_stream_leaves_nothing_behind(
    start: Start, tiny_qwen3: Path, terminate: Callable[[int, int], None]
) -> None:
    """The engine ends and no new client is let in. The HTTP process may wait for its open streams for ever.

    vLLM 0.30 ends the engine first, and whether the streams hear of it differs from run to run; the counts, with and
    without this plugin, are in docs/reliability_server.md. A supervisor's SIGKILL, here `stop`, has to follow.
    """
    server = start(tiny_qwen3, *ASCEND, EAGER)
    api, *others = family(server.process.pid)
    workers = [process for process in others if "VLLM" in " ".join(process.cmdline())]
    assert len(workers) == 2
    running = Background(server)
    terminate(server.process.pid, signal.SIGTERM)
    assert wait_until_ended(workers, PATIENCE) == []
    waits = bool(wait_until_ended([api], 10))
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health", timeout=2)
    stop(server.process, patience=1)
    print(f"\nthe HTTP process {'waits for its streams' if waits else 'ended by itself'}; {running.failures()}")
    assert wait_until_ended([api, *others], 5) == []
    assert_port_is_free(server)


class Background:
    """Clients that keep asking for long answers while something happens to their server."""

    def __init__(self, server: Server) -> None:
        self._outcomes: list[Outcome] = []
        requests = [Request("stream", f"Notes of day {day}.", 900) for day in range(80)]
        self._thread = threading.Thread(
            target=lambda: run_load(server.url, server.model, requests, concurrency=4, each=self._outcomes.append),
            daemon=True,
        )
        self._thread.start()
        deadline = time.monotonic() + PATIENCE
        while requests_held(server.url) < 2:
            assert time.monotonic() < deadline, "no requests arrived"
            time.sleep(0.02)

    def hold(self, pid: int) -> None:
        """Stop a process without which no request ends, and wait until every client waits for it.

        The four clients' requests end together, and a busy machine takes long to send the next ones: a process that was
        killed then had none.
        """
        os.kill(pid, signal.SIGSTOP)
        ended = -1
        while ended != len(self._outcomes):
            ended = len(self._outcomes)
            time.sleep(2)

    def failures(self) -> Counter[str]:
        """Why requests failed, each reason with its number; a request that hangs fails the test."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "a request hangs"
        return Counter(outcome.lost for outcome in self._outcomes if outcome.lost)


def answer(server: Server) -> Outcome:
    [outcome] = run_load(server.url, server.model, [Request("plain", "Notes of day 1.", 8)], concurrency=1)
    assert outcome.lost is None, outcome.lost
    return outcome


def reported_by(server: Server) -> str:
    """How the server says that it cannot serve any more: its health endpoint's status, or that it is gone."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            status = httpx.get(f"{server.url}/health", timeout=5).status_code
        except httpx.TransportError as error:
            return f"connection refused ({type(error).__name__})"
        if status != 200:
            return f"health {status}"
        time.sleep(0.1)
    raise AssertionError(f"still healthy {PATIENCE} s after its engine was killed")


def assert_port_is_free(server: Server) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", urlsplit(server.url).port))
