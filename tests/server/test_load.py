"""Many clients at once: nothing is lost, nothing is wrong, memory stays flat.

`python -m pytest tests/server/test_load.py -s --long` runs 2,000 requests; without `--long` it is a hundred.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import httpx
import numpy as np
import pytest

from qwen3_fp8_ascend.provenance import provenance
from qwen3_fp8_ascend.serving import Server
from tests.support.greedy import Comparison, compare
from tests.support.load import Outcome, Request, Step, make_prompts, make_requests, requests_held, run_load
from tests.support.noise import largest_of_noise
from tests.support.processes import record_memory

from .conftest import MAX_MODEL_LEN

pytestmark = pytest.mark.server

CONCURRENCY = 32
GROWTH = 0.01
"""Largest growth of resident memory from the first half of the run to the second."""


@dataclass(frozen=True)
class Load:
    requests: int
    prompts: int
    max_tokens: int


LONG = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("load", "served"),
    [
        pytest.param(Load(100, 24, 16), "smollm2_server", id="short"),
        pytest.param(Load(2000, 60, 32), "smollm2_server", id="long", marks=LONG),
        pytest.param(Load(400, 24, 16), "experts_server", id="experts", marks=LONG),
    ],
)
def test_no_request_is_lost_or_wrong_and_memory_is_flat(
    request: pytest.FixtureRequest, load: Load, served: str
) -> None:
    server, prompts = request.getfixturevalue(served), make_prompts(load.prompts)
    alone = answers_alone(server, prompts, load.max_tokens)
    moved = moves_of_the_idle_server(server, alone)
    requests = make_requests(
        load.requests, prompts, max_tokens=load.max_tokens, too_long=MAX_MODEL_LEN, model=server.model
    )
    warm_up(server, prompts)
    start = time.perf_counter()
    with record_memory(server.process.pid) as memory:
        outcomes = run_load(server.url, server.model, requests, concurrency=CONCURRENCY)
    seconds = time.perf_counter() - start

    compared = [compare(o.steps, alone[o.request.prompt].steps) for o in outcomes if o.steps]
    floor = largest_of_noise(moved, sum(len(o.steps) for o in outcomes))
    report(load, outcomes, compared, moved, floor, memory.halves(), seconds)
    assert [o.lost for o in outcomes if o.lost] == []
    assert len(outcomes) == load.requests
    assert [c for c in compared if c.wrong(floor)] == []
    assert_mixed_up_answers_are_found(alone, floor)
    first, second = memory.halves()
    assert second - first <= GROWTH * first
    assert requests_left_in(server) == 0
    again = answers_alone(server, prompts[:10], load.max_tokens)
    assert {prompt: o.steps for prompt, o in again.items()} == {prompt: alone[prompt].steps for prompt in again}


def answers_alone(server: Server, prompts: list[str], max_tokens: int) -> dict[str, Outcome]:
    """Greedy answers of a server that has nothing else to do and no prompt in its cache."""
    answers = {}
    for prompt in prompts:
        httpx.post(f"{server.url}/reset_prefix_cache").raise_for_status()
        [answers[prompt]] = run_load(server.url, server.model, [Request("plain", prompt, max_tokens)], concurrency=1)
        assert answers[prompt].lost is None, answers[prompt].lost
    return answers


def warm_up(server: Server, prompts: list[str]) -> None:
    """The first full batch makes the server's buffers as large as they get."""
    run_load(server.url, server.model, [Request("plain", p, 2) for p in prompts * 4], concurrency=CONCURRENCY)


def moves_of_the_idle_server(server: Server, alone: dict[str, Outcome]) -> np.ndarray:
    """By how many nats each token's log-probability moves when the idle server computes it otherwise.

    An answer's tokens are computed again as parts of a prompt: many rows at once instead of one after the other.
    Shapes: -> (tokens of all answers,).
    """
    moved = []
    for prompt, outcome in alone.items():
        ids = server.post("/tokenize", {"model": server.model, "prompt": prompt})["tokens"]
        answer = [token_id(step) for step in outcome.steps]
        body = {"model": server.model, "prompt": ids + answer, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        entries = server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"][len(ids) :]
        for step, identity, entry in zip(outcome.steps, answer, entries, strict=True):
            moved.append(abs(step.logprob - entry[str(identity)]["logprob"]))
    return np.array(moved)


def assert_mixed_up_answers_are_found(alone: dict[str, Outcome], floor: float) -> None:
    """The negative control: every answer held against another prompt's. Some prompts end alike and may answer alike."""
    prompts = list(alone)
    pairs = zip(prompts, prompts[1:] + prompts[:1], strict=True)
    found = [compare(alone[one].steps, alone[other].steps).wrong(floor) for one, other in pairs]
    print(f"  mixed up on purpose: {sum(found)} of {len(found)} found")
    assert sum(found) > len(found) / 2


def token_id(step: Step) -> int:
    return int(step.token.removeprefix("token_id:"))


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
    floor: float,
    memory: tuple[int, int],
    seconds: float,
) -> None:
    kinds = Counter(o.request.kind for o in outcomes)
    print(f"\nrounding on the idle server moves {len(moved)} tokens by {moved.mean():.4f} nats on average,", end=" ")
    print(f"{moved.max():.4f} at most; limit for the load: {floor:.4f}")
    diverged = [c for c in compared if c.diverged]
    print(f"{load}: {seconds:.1f} s at concurrency {CONCURRENCY}; {dict(kinds)}")
    print(f"  left by their client: {sum(o.left for o in outcomes)}, lost: {sum(o.lost is not None for o in outcomes)}")
    print(f"  tokens: {sum(len(o.steps) for o in outcomes)}; answers compared: {len(compared)}, equal:", end=" ")
    print(f"{len(compared) - len(diverged)}, wrong: {sum(c.wrong(floor) for c in compared)}")
    print(f"  largest gap of a differing token: {max((c.gap for c in diverged), default=0):.4f} nats,", end=" ")
    print(f"a common token moved by {max((c.moved for c in compared), default=0):.4f} at most")
    print(f"  resident MB at most, first half and second: {memory[0] / 1e6:.1f}, {memory[1] / 1e6:.1f}")
    print(f"  {provenance()}")
