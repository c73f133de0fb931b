"""The judge of greedy answers finds what is wrong and forgives what is rounding."""

import math

import pytest

from tests.support.greedy import compare
from tests.support.load import Outcome, Request, Step, make_prompts, make_requests, malformed_bodies

FLOOR = 0.1


def step(token: str, logprob: float = -1.0, **others: float) -> Step:
    return Step(token, logprob, {token: logprob} | others)


ALONE = [step("a"), step("b", -0.9, c=-1.05, d=-4.0), step("e"), step("f")]


def test_the_same_answer_is_right_and_may_be_shorter() -> None:
    assert not compare(ALONE, ALONE).diverged
    shorter = compare(ALONE[:2], ALONE)
    assert (shorter.same, shorter.diverged, shorter.wrong(FLOOR)) == (2, False, False)


def test_a_near_tie_may_fall_the_other_way_and_what_follows_is_not_compared() -> None:
    other = [step("a"), step("c", -1.0, b=-1.0), step("z", -9.0)]
    compared = compare(other, ALONE)
    assert (compared.same, compared.diverged) == (1, True)
    assert compared.gap == pytest.approx(0.15)
    assert not compared.wrong(FLOOR)
    assert compared.wrong(FLOOR / 2)


@pytest.mark.parametrize("token", ["d", "unheard"])
def test_an_unlikely_token_is_wrong(token: str) -> None:
    assert compare([step("a"), step(token)], ALONE).wrong(FLOOR)


def test_the_right_token_with_another_log_probability_is_wrong() -> None:
    compared = compare([step("a", -1.0 - 2 * FLOOR), *ALONE[1:]], ALONE)
    assert not compared.diverged
    assert compared.wrong(FLOOR)


def test_an_answer_that_goes_on_after_the_end_is_wrong() -> None:
    assert compare([*ALONE, step("g")], ALONE).gap == math.inf


@pytest.mark.parametrize(
    ("outcome", "lost"),
    [
        (Outcome(Request("plain", max_tokens=1), 200, ALONE[:1], "length"), False),
        (Outcome(Request("plain", max_tokens=2), 200, ALONE[:1], "length"), True),
        (Outcome(Request("plain", max_tokens=2), 200, ALONE[:1], "stop"), False),
        (Outcome(Request("stream", max_tokens=2), 200, ALONE[:1], None), True),
        (Outcome(Request("plain"), 500), True),
        (Outcome(Request("cancel"), left=True), False),
        (Outcome(Request("cancel"), failure="ReadTimeout"), True),
        (Outcome(Request("malformed"), 400), False),
        (Outcome(Request("malformed"), 500), True),
        (Outcome(Request("too_long"), 200, ALONE[:1], "length"), True),
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
