"""Processes that are killed and servers that are told to stop: nothing hangs, nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from qwen3_fp8_ascend.testing.load import Outcome, Request, requests_held, run_load
from qwen3_fp8_ascend.testing.processes import alive, family, named, wait_until_ended
from qwen3_fp8_ascend.testing.server import Server

from .conftest import ASCEND, EAGER, Start

pytestmark = pytest.mark.server

PATIENCE = 30
"""Seconds within which a fault must have been reported, and a server have ended."""


@pytest.mark.parametrize(
    "victim", [pytest.param("Worker", id="worker"), pytest.param("EngineCore", id="engine", marks=pytest.mark.long)]
)
def test_a_killed_process_is_reported_and_a_restart_serves_again(start: Start, tiny_qwen3: Path, victim: str) -> None:
    """In the same go: the restarted server is told to stop while it works, and ends cleanly."""
    server = start(tiny_qwen3, *ASCEND, EAGER)
    before = answer(server)
    processes = family(server.process.pid)
    running = Background(server)
    os.kill(named(server.process.pid, victim).pid, signal.SIGKILL)
    killed = time.monotonic()
    outcome = running.result()
    health, after = reported_by(server), time.monotonic() - killed
    print(f"\n{victim} killed: the running request got {outcome.lost!r}; {health} {after:.1f} s later")
    assert outcome.lost is not None
    left = wait_until_ended(processes, PATIENCE)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(1)
    print(f"  exit status {server.process.returncode}, processes left: {[p.name() for p in left]}")
    assert left == []
    assert server.process.returncode not in (None, 0)
    assert "EngineDeadError" in server.log.read_text()

    restarted = start(tiny_qwen3, *ASCEND, EAGER)
    assert answer(restarted).steps == before.steps
    processes = family(restarted.process.pid)
    running = Background(restarted)
    told = time.monotonic()
    restarted.process.send_signal(signal.SIGTERM)
    status = restarted.process.wait(PATIENCE)
    left = wait_until_ended(processes, 5)
    print(f"SIGTERM: exit status {status} after {time.monotonic() - told:.1f} s, the running request got", end=" ")
    print(f"{running.result().lost!r}, processes left: {[p.name() for p in left]}")
    assert status == 0
    assert left == []
    assert alive(processes) == []
    assert_port_is_free(restarted)


class Background:
    """A long answer that is being generated while something happens to its server."""

    def __init__(self, server: Server) -> None:
        self._outcomes: list[Outcome] = []
        request = Request("stream", "Notes of day 1.", 900)
        self._thread = threading.Thread(
            target=lambda: self._outcomes.extend(run_load(server.url, server.model, [request], concurrency=1)),
            daemon=True,
        )
        self._thread.start()
        while not requests_held(server.url):
            assert self._thread.is_alive(), "the request ended before anything could happen to it"
            time.sleep(0.02)

    def result(self) -> Outcome:
        """The outcome; a request that hangs fails the test."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the request hangs"
        return self._outcomes[0]


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
