"""The judge of greedy answers finds what is wrong and forgives what is rounding."""

from typing import Any, cast

import numpy as np
import pytest

from qwen3_fp8_ascend.serving import Server
from tests.support.greedy import IdleServer, compare
from tests.support.load import Outcome, Request, Step, make_prompts, make_requests, malformed_bodies

FLOOR = 0.1


ANSWER = [Step(f"token_id:{i}", logprob) for i, logprob in enumerate((-1.0, -0.9, -0.1, -2.0))]
AS_SAID = np.array([(step.logprob, step.logprob) for step in ANSWER])
"""What the idle server says of the answer if nothing moved: each token's log-probability, and that of the best one."""


def changed(place: int, logprob: float, best: float) -> np.ndarray:
    """One token whose log-probability, or that of the best one, is another with the idle server."""
    idle = AS_SAID.copy()
    idle[place] = logprob, best
    return idle


def test_the_same_answer_is_right_and_may_be_shorter() -> None:
    for count in range(1, len(ANSWER) + 1):
        compared = compare(ANSWER[:count], AS_SAID[:count])
        assert not compared.differs and not compared.wrong(0)


@pytest.mark.parametrize("place", range(len(ANSWER)))
def test_a_near_tie_may_fall_the_other_way_at_any_place(place: int) -> None:
    logprob = ANSWER[place].logprob
    compared = compare(ANSWER, changed(place, logprob - FLOOR / 2, logprob + FLOOR))
    assert compared.differs
    assert compared.behind.max() == pytest.approx(1.5 * FLOOR)
    assert not compared.wrong(FLOOR)
    assert compared.wrong(0.7 * FLOOR)


@pytest.mark.parametrize("place", range(len(ANSWER)))
def test_an_unlikely_token_is_wrong_at_any_place(place: int) -> None:
    """Also where its log-probability is as the answer says."""
    logprob = ANSWER[place].logprob
    assert compare(ANSWER, changed(place, logprob, logprob + 2.1 * FLOOR)).wrong(FLOOR)


@pytest.mark.parametrize("place", range(len(ANSWER)))
@pytest.mark.parametrize("move", [-1.1 * FLOOR, 1.1 * FLOOR])
def test_the_right_token_with_another_log_probability_is_wrong(place: int, move: float) -> None:
    logprob = ANSWER[place].logprob + move
    compared = compare(ANSWER, changed(place, logprob, logprob))
    assert not compared.differs
    assert compared.wrong(FLOOR)


class AnsweringServer:
    """Stands in for a server: two tokens of each prompt, and log-probabilities that say where a token stands."""

    model = "model"

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/tokenize":
            return {"tokens": [len(body["prompt"]), 99]}
        ids = body["prompt"]
        self.asked.append(ids)
        entries = [{str(t): {"logprob": -float(i)}, "7": {"logprob": 0.5 - i}} for i, t in enumerate(ids)]
        return {"choices": [{"prompt_logprobs": [None, *entries[1:]]}]}


def test_the_idle_server_is_asked_once_for_an_answer_and_its_beginnings() -> None:
    server = AnsweringServer()
    idle = IdleServer(cast(Server, server))
    whole = idle.logprobs("prompt", ANSWER)
    assert whole.tolist() == [[-2, -1.5], [-3, -2.5], [-4, -3.5], [-5, -4.5]]  # behind the prompt's two tokens
    assert server.asked == [[6, 99, 0, 1, 2, 3]]
    assert np.array_equal(idle.logprobs("prompt", ANSWER[:2]), whole[:2])
    assert len(server.asked) == 1
    idle.logprobs("other", ANSWER)
    assert server.asked[1] == [5, 99, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("outcome", "lost"),
    [
        (Outcome(Request("plain", max_tokens=1), 200, ANSWER[:1], "length"), False),
        (Outcome(Request("plain", max_tokens=2), 200, ANSWER[:1], "length"), True),
        (Outcome(Request("plain", max_tokens=2), 200, ANSWER[:1], "stop"), False),
        (Outcome(Request("stream", max_tokens=2), 200, ANSWER[:1], None), True),
        (Outcome(Request("plain"), 500), True),
        (Outcome(Request("cancel"), left=True), False),
        (Outcome(Request("cancel"), failure="ReadTimeout"), True),
        (Outcome(Request("malformed"), 400), False),
        (Outcome(Request("malformed"), 500), True),
        (Outcome(Request("too_long"), 200, ANSWER[:1], "length"), True),
    ],
)
def test_what_counts_as_lost(outcome: Outcome, lost: bool) -> None:
    assert (outcome.lost is not None) is lost


def test_load_has_every_kind_and_is_the_same_every_time() -> None:
    prompts = make_prompts(20)
    assert len(set(prompts)) == 20
    requests = make_requests(200, prompts, max_tokens=8, too_long=64, model="model")
    assert requests == make_requests(200, prompts, max_tokens=8, too_long=64, model="model")
    assert len(requests) == 200
    assert {request.kind for request in requests} == {
        "plain",
        "stream",
        "disconnect",
        "cancel",
        "malformed",
        "too_long",
    }
    assert len(set(malformed_bodies("model"))) == len(malformed_bodies("model"))
