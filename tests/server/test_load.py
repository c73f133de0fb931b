"""Many clients at once: nothing is lost, nothing is wrong, memory stays flat.

`python -m pytest tests/server/test_load.py -s --long` runs 2,000 requests; without `--long` it is a hundred.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from qwen3_fp8_ascend.provenance import provenance
from qwen3_fp8_ascend.serving import Server
from tests.support.greedy import Comparison, IdleServer, compare
from tests.support.load import PLAIN, Outcome, Request, make_prompts, make_requests, requests_held, run_load
from tests.support.noise import largest_of_noise
from tests.support.processes import record_memory

from .conftest import ASCEND, EAGER, MAX_MODEL_LEN
from .test_renewal import DEVELOPER

pytestmark = pytest.mark.server

CONCURRENCY = 32
GROWTH = 0.01
"""Largest growth of resident memory from the first half of the run to the second."""
ROUNDING = 0.5
"""Nats by which rounding may move a log-probability, however seldom: by that of two logits below 64 in bf16, which are
multiples of 0.25. Where the kernels' bits do not depend on the batch, a sample may hold no move at all."""
FOUND = 0.9
"""Of answers that are mixed up on purpose, the share to be found: prompts that end alike may be answered alike."""


@dataclass(frozen=True)
class Load:
    requests: int
    prompts: int
    max_tokens: int
    facts: int
    """In the longest prompt: the head is computed for each of its tokens too when the idle server is asked."""
    settings: tuple[str, ...] = ()
    """Of the server."""


FP8_HEAD = ("--hf-overrides", '{"qwen3_fp8_ascend": {"lm_head": "fp8"}}')

LONG = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("load", "model", "started"),
    [
        pytest.param(Load(100, 22, 16, 6, FP8_HEAD), "smollm2", "start_forked", id="short"),
        pytest.param(Load(2000, 60, 32, 32), "smollm2", "start", id="long", marks=LONG),
        pytest.param(Load(400, 24, 16, 32), "copied_experts", "start", id="experts", marks=LONG),
    ],
)
def test_no_request_is_lost_or_wrong_and_memory_is_flat(
    request: pytest.FixtureRequest, load: Load, model: str, started: str
) -> None:
    """W8A8 in bf16. The long forms start `vllm` itself; in the short one the engine and its rank are forks.

    Its head is FP8: torch's is slow where a processor has no bf16 instructions.
    """
    folder, start = request.getfixturevalue(model), request.getfixturevalue(started)
    server = start(folder, *ASCEND, EAGER, *load.settings, **DEVELOPER)
    prompts = make_prompts(load.prompts, load.facts)
    alone = answers_alone(server, prompts, load.max_tokens)
    idle = IdleServer(server)
    moved = moves_of_the_idle_server(idle, alone)
    requests = make_requests(
        load.requests, prompts, max_tokens=load.max_tokens, too_long=MAX_MODEL_LEN, model=server.model
    )
    warm_up(server, prompts)
    start = time.perf_counter()
    with record_memory(server.process.pid) as memory:
        outcomes = run_load(server.url, server.model, requests, concurrency=CONCURRENCY)
    seconds = time.perf_counter() - start

    answered = sorted((o for o in outcomes if o.steps), key=lambda o: len(o.steps), reverse=True)
    compared = [compare(o.steps, idle.logprobs(o.request.prompt, o.steps)) for o in answered]
    # Each token of an answer, and the best one in its place, has a log-probability that may have moved.
    limit = max(ROUNDING, largest_of_noise(moved, 2 * sum(len(o.steps) for o in answered)))
    report(load, outcomes, compared, moved, limit, memory.halves(), seconds)
    assert [o.lost for o in outcomes if o.lost] == []
    assert len(outcomes) == load.requests
    assert [c for c in compared if c.wrong(limit)] == []
    assert_mixed_up_answers_are_found(idle, alone, limit)
    first, second = memory.halves()
    assert second - first <= GROWTH * first
    assert requests_left_in(server) == 0
    again = answers_alone(server, prompts[:10], load.max_tokens)
    assert {prompt: o.steps for prompt, o in again.items()} == {prompt: alone[prompt].steps for prompt in again}


@pytest.fixture
def copied_experts(smollm2_experts: dict[str, Path]) -> Path:
    """SmolLM2 as a mixture of experts."""
    return smollm2_experts["copied"]


def answers_alone(server: Server, prompts: list[str], max_tokens: int) -> dict[str, Outcome]:
    """Greedy answers of a server that has nothing else to do and no prompt in its cache."""
    answers = {}
    for prompt in prompts:
        httpx.post(f"{server.url}/reset_prefix_cache", **PLAIN).raise_for_status()
        [answers[prompt]] = run_load(server.url, server.model, [Request("plain", prompt, max_tokens)], concurrency=1)
        assert answers[prompt].lost is None, answers[prompt].lost
    return answers


def warm_up(server: Server, prompts: list[str]) -> None:
    """The first full batch makes the server's buffers as large as they get."""
    run_load(server.url, server.model, [Request("plain", p, 2) for p in prompts * 4], concurrency=CONCURRENCY)


def moves_of_the_idle_server(idle: IdleServer, alone: dict[str, Outcome]) -> np.ndarray:
    """By how many nats each token's log-probability moves when the idle server computes it otherwise.

    An answer's tokens are computed again as parts of a prompt: many rows at once instead of one after the other.
    Shapes: -> (tokens of all answers,).
    """
    return np.concatenate([compare(o.steps, idle.logprobs(prompt, o.steps)).moved for prompt, o in alone.items()])


def assert_mixed_up_answers_are_found(idle: IdleServer, alone: dict[str, Outcome], limit: float) -> None:
    """The negative control: every answer held for that of another prompt, the next one."""
    prompts = list(alone)
    pairs = zip(prompts, prompts[1:] + prompts[:1], strict=True)
    found = [compare(alone[one].steps, idle.logprobs(other, alone[one].steps)).wrong(limit) for one, other in pairs]
    print(f"  mixed up on purpose: {sum(found)} of {len(found)} found")
    assert sum(found) >= FOUND * len(found)


def requests_left_in(server: Server) -> int:
    """Requests that the server still holds 10 s after the last client left, those of vanished clients included."""
    deadline = time.monotonic() + 10
    while (held := requests_held(server.url)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return held


def report(
    load: Load,
    outcomes: list[Outcome],
    compared: list[Comparison],
    moved: np.ndarray,
    limit: float,
    memory: tuple[int, int],
    seconds: float,
) -> None:
    kinds = Counter(o.request.kind for o in outcomes)
    print(f"\nrounding on the idle server moves {len(moved)} tokens by {moved.mean():.4f} nats on average,", end=" ")
    print(f"{moved.max():.4f} at most; limit for the load: {limit:.4f}")
    print(f"{load}: {seconds:.1f} s at concurrency {CONCURRENCY}; {dict(kinds)}")
    print(f"  left by their client: {sum(o.left for o in outcomes)}, lost: {sum(o.lost is not None for o in outcomes)}")
    tokens = sum(len(o.steps) for o in outcomes)
    print(
        f"  tokens: {tokens}; answers compared: {len(compared)}, wrong: {sum(c.wrong(limit) for c in compared)};",
        end=" ",
    )
    print(f"with a token that is not the idle server's best: {sum(c.differs for c in compared)},", end=" ")
    print(f"by {max((c.behind.max() for c in compared), default=0):.4f} nats at most;", end=" ")
    print(f"a token moved by {max((c.moved.max() for c in compared), default=0):.4f} at most")
    print(f"  resident MB at most, first half and second: {memory[0] / 1e6:.1f}, {memory[1] / 1e6:.1f}")
    print(f"  {provenance()}")
