"""`vllm` whose engine and ranks are forks: `python -m tests.support.forked_server serve MODEL ...`.

Each of a server's three or more processes imports vLLM, which takes as long as all that most tests ask of it. Here the
first one has what all of them need, or is a fork of one that has (`forked`), and none polls (`quiet_waits`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qwen3_fp8_ascend import serving
from tests.support import preloaded
from tests.support.forked_spawn import fork_what_is_spawned
from tests.support.quiet_waits import sleep_at_once

MODULE = "tests.support.forked_server"
MAIN = "vllm.entrypoints.cli.main"


def forked() -> AbstractContextManager[Any]:
    """For the length of a `with` block, `qwen3_fp8_ascend.serving.serve` starts such servers, by a fork of its own."""

    def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> preloaded.Forked:
        log.touch()  # may be read at once
        _, *arguments = command
        return preloaded.shared().start(MODULE, *arguments, environment=environment, log=log)

    return patch.object(serving, "start_process", start)


def main() -> None:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # else NumPy starts threads when it is imported
    preloaded.import_for_forks(preloaded.VLLM)
    sleep_at_once()
    with fork_what_is_spawned(depth=2):  # the engine, and its ranks
        importlib.import_module(MAIN).main()


if __name__ == "__main__":
    main()
