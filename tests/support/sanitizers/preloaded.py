"""A process under a sanitizer that has imported what every test needs, and runs pytest in a fork for each request.

Importing torch under a sanitizer takes longer than most tests that find a planted defect. A library is loaded in the
fork alone, so each sees one. No thread may be running when it forks: ThreadSanitizer could not follow the child's.

A request is a line of JSON, `{"arguments", "environment", "output", "timeout"}`, and so is its answer,
`{"status", "seconds"}`: a status as `subprocess` has it, or None if pytest ran out of time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import hypothesis.extra.numpy  # noqa: F401
import pytest
import torch  # noqa: F401

import qwen3_fp8_ascend.ops  # noqa: F401

POLL_SECONDS = 0.02


def child(request: dict[str, Any]) -> None:
    """Never returns."""
    status = 70  # EX_SOFTWARE: pytest itself raised
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(request["environment"])
        status = int(pytest.main(request["arguments"]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status_of(pid: int, seconds: float) -> int | None:
    """How a child ended; it is killed if it takes longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL_SECONDS)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(request)
        status = status_of(pid, request["timeout"])
        print(json.dumps({"status": status, "seconds": time.monotonic() - start}), flush=True)


if __name__ == "__main__":
    main()
