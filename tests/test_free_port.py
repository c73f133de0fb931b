"""The port for a server that takes a while to start: free, and none that a connection is given meanwhile."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path

import pytest

from qwen3_fp8_ascend import serving
from qwen3_fp8_ascend.serving import free_port


def test_no_connection_is_given_it() -> None:
    if not serving.CONNECTION_PORTS.exists():
        pytest.skip("this system does not tell which ports connections are given")
    first = int(serving.CONNECTION_PORTS.read_text().split()[0])
    for _ in range(20):
        with socket.socket() as server:
            server.bind(("127.0.0.1", free_port()))
            assert 10_000 <= server.getsockname()[1] < first


def test_one_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        port = taken.getsockname()[1]
        other = free_port()
        choices = itertools.chain([port, port], itertools.repeat(other))
        monkeypatch.setattr(serving.secrets, "choice", lambda ports: next(choices))
        assert free_port() == other


@pytest.mark.parametrize("text", [None, "", "1024 65535"])
def test_where_nothing_is_told_or_left_there_is_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    file = tmp_path / "range"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(serving, "CONNECTION_PORTS", file)
    assert free_port() >= 1024
