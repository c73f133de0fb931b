"""`vllm` whose engine and ranks are forks: `python -m tests.support.forked_server serve MODEL ...`.

Each of a server's three or more processes imports vLLM, which takes as long as all that most tests ask of it. Here the
first one imports what all of them need, and none polls (`quiet_waits`). Processes that are killed are of `vllm`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

from qwen3_fp8_ascend import serving
from tests.support.forked_spawn import fork_what_is_spawned
from tests.support.preloaded import VLLM, import_for_forks
from tests.support.quiet_waits import sleep_at_once

MODULE = "tests.support.forked_server"
MAIN = "vllm.entrypoints.cli.main"
SERVER = (MAIN, "vllm.entrypoints.cli.serve", "vllm.entrypoints.openai.api_server")


def forked() -> AbstractContextManager[Callable[..., list[str]]]:
    """For the length of a `with` block, `qwen3_fp8_ascend.serving.serve` starts such servers."""
    command = serving.serve_command

    def of(model: str | Path, port: int, name: str, *arguments: str) -> list[str]:
        _, *rest = command(model, port, name, *arguments)
        return [sys.executable, "-m", MODULE, *rest]

    return patch.object(serving, "serve_command", of)


def main() -> None:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # else NumPy starts threads when it is imported
    import_for_forks((*VLLM, *SERVER))
    sleep_at_once()
    with fork_what_is_spawned(depth=2):  # the engine, and its ranks
        importlib.import_module(MAIN).main()


if __name__ == "__main__":
    main()
