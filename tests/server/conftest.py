from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from qwen3_fp8_ascend.serving import Server, serve, serving_environment
from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3
from tests.support.forked_server import forked
from tests.support.logprobs import TEXTS, text_logprobs

ASCEND = ("--quantization", "ascend")
MAX_MODEL_LEN = 1024
COMMON = ("--max-model-len", str(MAX_MODEL_LEN))
EAGER = "--enforce-eager"
TRACED = {"VLLM_CPU_CI_ENV": "1"}
"""Environment: what torch.compile would hand to Inductor runs as one graph of the operators as they are.

It is vLLM's own, for its tests. An operator that cannot be traced, or is lost or misplaced in a graph, is seen without
the minutes that Inductor and g++ take for a model. Whole models are compiled in tests/server/test_serving.py.
"""

Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server for the length of a test: `start(model, *arguments, **environment)`."""
    with ExitStack() as servers:

        def started(model: Path, *arguments: str, **environment: str) -> Server:
            log = tmp_path / "server.log"
            return servers.enter_context(
                serve(model, *COMMON, *arguments, log=log, environment=serving_environment(**environment))
            )

        yield started


@pytest.fixture
def start_forked(start: Start) -> Start:
    """The same of a server whose processes are forks (`forked_server`), where what it answers is all that is asked."""

    def started(model: Path, *arguments: str, **environment: str) -> Server:
        with forked():
            return start(model, *arguments, **environment)

    return started


@pytest.fixture(scope="session")
def text_logprobs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[np.ndarray]]:
    """Log-probabilities of texts under a served model, in fp32 and eagerly unless said otherwise.

    In bf16 one flipped bit in a large activation changes a whole group's codes, and runs that are exact
    in themselves drift apart; fp32 shows what the linears contribute. One server answers all who ask for the same.
    """
    known: dict[tuple[object, ...], list[np.ndarray]] = {}

    def run(model: Path, *arguments: str, texts: Sequence[str] = TEXTS, **environment: str) -> list[np.ndarray]:
        key = (model, arguments, tuple(texts), tuple(sorted(environment.items())))
        if key not in known:
            known[key] = ask_a_server(model, *arguments, texts=texts, **environment)
        return known[key]

    def ask_a_server(model: Path, *arguments: str, texts: Sequence[str], **environment: str) -> list[np.ndarray]:
        log = tmp_path_factory.mktemp("server") / "server.log"
        with serve(
            model, *COMMON, "--dtype", "float32", *arguments, log=log, environment=serving_environment(**environment)
        ) as server:
            return text_logprobs(server, texts)

    return run


@pytest.fixture(scope="session")
def logprobs_of(text_logprobs_of: Callable[..., list[np.ndarray]]) -> Callable[..., np.ndarray]:
    """The same of all texts, one after the other."""
    return lambda *arguments, **options: np.concatenate(text_logprobs_of(*arguments, **options))


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 in block FP8 (GQA, q/k norms, two layers); the bf16 one is beside it."""
    return write_block_fp8_qwen3(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="session")
def other_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights."""
    return write_block_fp8_qwen3(tmp_path_factory.mktemp("models") / "qwen3", seed=1)
