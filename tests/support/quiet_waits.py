"""vLLM's processes sleep while they wait for each other, where vLLM lets them poll.

The engine and its workers pass messages through shared memory. Whoever reads asks for the next one again and again
until a second has gone by without any, and only then sleeps until it is told of one: the engine so takes a processor
for as long as a worker computes, and each worker one for a second after each request. Where nobody times them, they
sleep at once, and look again after `LONGEST` if they are not told: what tells them may get lost, and vLLM itself looks
again after five seconds. What is sent, and what is computed, is the same.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
LONGEST = 20
"""Milliseconds."""
PLUGIN = "[vllm.general_plugins]\nquiet_waits = tests.support.quiet_waits:sleep_at_once\n"


def sleep_at_once() -> None:
    """In this process and its forks, for all queues that are made from now on."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    wait: Any = SpinCondition.wait
    if hasattr(wait, "__wrapped__"):
        return  # a fork of a process that does so already

    @functools.wraps(wait)
    def wait_a_little(condition: Any, timeout_ms: int | None = None) -> None:
        condition.busy_loop_s = 0
        wait(condition, LONGEST if timeout_ms is None else min(LONGEST, timeout_ms))

    SpinCondition.wait = wait_a_little  # type: ignore[method-assign]


def quiet_environment(folder: Path) -> dict[str, str]:
    """The environment variable that makes all processes of a `vllm serve` do so, by a plugin of vLLM in `folder`."""
    about = folder / "quiet_waits-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: quiet-waits\nVersion: 0\n")
    (about / "entry_points.txt").write_text(PLUGIN)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
