"""Start `vllm serve`, wait until it answers, and stop it again whatever happens."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_fp8_ascend.errors import BlockFp8Error


@dataclass(frozen=True)
class Server:
    """A running `vllm serve` on the loopback address."""

    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path

    def post(self, path: str, body: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
        """POST JSON to e.g. ``/v1/completions`` and return the answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)


CONNECTION_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""On Linux: the first and the last port of those that the system gives to outgoing connections."""


def free_port() -> int:
    """A TCP port that was free on the loopback address a moment ago.

    It is none that a connection may be given while the server that it is for starts, which takes up to a minute.
    """
    try:
        end = int(CONNECTION_PORTS.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        end = 32768  # Linux's own; other systems begin higher
    candidates = range(10_000, end)
    tried = [secrets.choice(candidates) for _ in range(100)] if candidates else []  # forks share `random`'s state
    for port in (*tried, 0):  # 0: whichever the system chooses
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise BlockFp8Error("no TCP port is free on 127.0.0.1", fix="end what holds them (`ss -tlnp` lists it)")


def serve_command(model: str | Path, port: int, name: str, *arguments: str) -> list[str]:
    """The `vllm serve` command line for this environment's vLLM."""
    vllm = Path(sys.executable).with_name("vllm")
    return [
        str(vllm),
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        name,
        *arguments,
    ]


def serving_environment(**changes: str) -> dict[str, str]:
    """The environment for a server on this machine's CPU; variables that are already set win over the defaults."""
    cores = sorted(os.sched_getaffinity(0))
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # vLLM's own choice ("auto") leaves one core idle.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    return defaults | dict(os.environ) | changes


def start_process(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own; what it prints is written to `log`."""
    with log.open("wb") as sink:
        return subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )


@contextlib.contextmanager
def serve(
    model: str | Path,
    *arguments: str,
    log: Path,
    name: str = "model",
    environment: dict[str, str] | None = None,
    timeout: float = 600,
    on_wait: Callable[[float, str], None] | None = None,
) -> Iterator[Server]:
    """Run `vllm serve MODEL ARGUMENTS...` for the length of a `with` block.

    The server has a process group of its own, all of which is stopped at the end, also after an error or Ctrl-C.
    `on_wait(seconds, last log line)` is called about twice a second until the server is ready.
    Raises:
        BlockFp8Error: the server stopped or was not ready in time; the message ends with the reason in its log.
    """
    port = free_port()
    command = serve_command(model, port, name, *arguments)
    log.parent.mkdir(parents=True, exist_ok=True)
    process = start_process(command, log, serving_environment() if environment is None else environment)
    try:
        server = Server(f"http://127.0.0.1:{port}", name, process, log)
        _wait_until_ready(server, command, timeout, on_wait)
        yield server
    finally:
        stop(process)


def exit_on_sigterm() -> None:
    """Turn SIGTERM into an orderly exit, so that a script that is stopped stops its servers too."""

    def leave(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, leave)


def stop(process: subprocess.Popen[bytes], patience: float = 20) -> None:
    """End a server's whole process group: SIGTERM, then SIGKILL for what is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_until_ready(
    server: Server, command: Sequence[str], timeout: float, on_wait: Callable[[float, str], None] | None
) -> None:
    start = time.monotonic()
    while (waited := time.monotonic() - start) < timeout:
        if server.process.poll() is not None:
            raise BlockFp8Error(
                "the server stopped before it was ready",
                where=f"log: {server.log}",
                got=f"exit code {server.process.returncode}\n{failure_in(server.log)}",
                fix=f"the command was: {' '.join(command)}",
            )
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if on_wait is not None:
                on_wait(waited, _last_line(server.log))
            time.sleep(0.5)
    raise BlockFp8Error(
        f"the server was not ready after {timeout:.0f} s",
        where=f"log: {server.log}",
        got=_last_line(server.log),
        fix="allow more time, or look into the log",
    )


PREFIX = re.compile(r"^\(\w+ pid=\d+\) ?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
"""What vLLM puts before each line: "(Worker pid=1) ERROR 11-22 14:00:00 [file.py:1] "."""


def failure_in(log: Path) -> str:
    """The first exception in a server's log with the lines that belong to its message, or the log's end."""
    lines = [PREFIX.sub("", line) for line in log.read_text(errors="replace").splitlines()]
    for index, line in enumerate(lines):
        if re.match(r"[\w.]*(Error|Exception)\b", line):
            more = itertools.takewhile(lambda part: part.startswith(" "), lines[index + 1 : index + 12])
            return "\n".join([line, *more])
    return "\n".join(lines[-15:])


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 2000))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")
