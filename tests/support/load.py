"""Load for a running server: many clients at once, well behaved and not, and what became of each request."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from qwen3_fp8_ascend.errors import BlockFp8Error

Kind = Literal["plain", "stream", "disconnect", "cancel", "malformed", "too_long"]

MIX: tuple[tuple[Kind, int], ...] = (
    ("plain", 40),
    ("stream", 35),
    ("disconnect", 8),
    ("cancel", 7),
    ("malformed", 6),
    ("too_long", 4),
)
"""Kinds of requests and how many of a hundred are of each."""

PLAIN: dict[str, Any] = {"trust_env": False, "verify": False}
"""For httpx and a server without TLS: to load certificates takes longer than many an answer."""


@dataclass(frozen=True)
class Step:
    """One generated token and its log-probability in nats.

    Tokens are named as vLLM does it when asked for ids, "token_id:17": texts of different tokens may be equal.
    """

    token: str
    logprob: float


@dataclass(frozen=True)
class Request:
    """One request. `body` replaces the ordinary one where it is malformed; `after` says when the client leaves:

    after that many chunks ("disconnect") or seconds ("cancel").
    """

    kind: Kind
    prompt: str = ""
    max_tokens: int = 16
    body: bytes | None = None
    after: float = 0


@dataclass
class Outcome:
    """What the client saw: the HTTP status, tokens as far as they came, and why the request failed, if it did."""

    request: Request
    status: int = 0
    steps: list[Step] = field(default_factory=list)
    finish_reason: str | None = None
    left: bool = False
    failure: str | None = None

    @property
    def lost(self) -> str | None:
        """Why this request counts as lost, or None: each must end in its answer, a refusal it earned, or its leaving.

        Malformed and over-long requests must be refused with a 4xx; all others must be accepted and finish.
        """
        if self.failure is not None:
            return self.failure
        if self.request.kind in ("malformed", "too_long"):
            return None if 400 <= self.status < 500 else f"status {self.status} instead of a refusal"
        if self.left:
            return None
        if self.status != 200:
            return f"status {self.status}"
        if self.finish_reason not in ("length", "stop"):
            return f"finish reason {self.finish_reason}"
        if self.finish_reason == "length" and len(self.steps) != self.request.max_tokens:
            return f"{len(self.steps)} tokens of {self.request.max_tokens}"
        return None


def make_prompts(count: int, facts: int = 32, seed: int = 0) -> list[str]:
    """Different prompts of 15 tokens to about 18 for each of `facts`, which are numbered; a question continues them."""
    generator = random.Random(seed)
    prompts = []
    for number in range(count):
        sentences = [f"Notes of day {number + 1}."]
        for _ in range(int(2 ** generator.uniform(0, math.log2(facts)))):
            a, b = generator.randrange(2, 90), generator.randrange(2, 90)
            sentences.append(
                generator.choice(
                    (
                        f"The sum of {a} and {b} is {a + b}.",
                        f"A train that travels {a} km in one hour travels {a * 2} km in two hours.",
                        f"There were {a} apples and {b} pears in the basket.",
                    )
                )
            )
        sentences.append(
            generator.choice(
                ("In short, the day was", "The capital of France is", "Water boils at", "The next note says that")
            )
        )
        prompts.append(" ".join(sentences))
    return prompts


def make_requests(
    count: int, prompts: Sequence[str], *, max_tokens: int, too_long: int, model: str, seed: int = 0
) -> list[Request]:
    """Requests of all kinds in the proportions of `MIX`, in random order; `too_long`: the model's length in tokens."""
    generator = random.Random(seed)
    kinds = [kind for kind, share in MIX for _ in range(max(1, count * share // 100))]
    kinds = (kinds + ["plain"] * count)[:count]
    generator.shuffle(kinds)
    bad = malformed_bodies(model)
    requests = []
    for kind in kinds:
        prompt, tokens = generator.choice(prompts), generator.randint(1, max_tokens)
        if kind == "malformed":
            requests.append(Request(kind, body=generator.choice(bad)))
        elif kind == "too_long":
            requests.append(Request(kind, "word " * generator.randint(too_long, 3 * too_long)))
        elif kind == "disconnect":
            requests.append(Request(kind, prompt, max_tokens, after=generator.randint(1, max(1, max_tokens // 2))))
        elif kind == "cancel":
            requests.append(Request(kind, prompt, max_tokens, after=generator.uniform(0.01, 1)))
        else:
            requests.append(Request(kind, prompt, tokens))
    return requests


def malformed_bodies(model: str) -> list[bytes]:
    """Bodies that a server must refuse: no JSON, wrong types, missing or impossible values."""
    good: dict[str, Any] = {"model": model, "prompt": "Hello", "max_tokens": 4}
    changes: list[dict[str, Any]] = [
        {"prompt": None},
        {"prompt": {"text": "Hello"}},
        {"prompt": [10**9]},
        {"prompt": [-1]},
        {"max_tokens": "many"},
        {"max_tokens": -1},
        {"temperature": -1},
        {"top_p": 7},
        {"logprobs": 10**6},
        {"model": "another"},
        {"stream": "perhaps"},
    ]
    whole = json.dumps(good).encode()
    return [b"", b"{", whole[:-3], b"\xff\xfe", b"[]", *(json.dumps(good | change).encode() for change in changes)]


async def send(client: httpx.AsyncClient, request: Request, model: str) -> Outcome:
    """Send one request and behave as its kind says. Failures of any sort end up in the outcome."""
    outcome = Outcome(request)
    streams = request.kind in ("stream", "disconnect")
    body = request.body
    if body is None:
        fields = {"model": model, "prompt": request.prompt, "max_tokens": request.max_tokens, "temperature": 0}
        body = json.dumps(fields | {"logprobs": 1, "return_tokens_as_token_ids": True, "stream": streams}).encode()
    try:
        if streams:
            await _stream(client, body, outcome)
        elif request.kind == "cancel":
            try:
                await asyncio.wait_for(_whole(client, body, outcome), request.after)
            except asyncio.TimeoutError:
                outcome.left = True
        else:
            await _whole(client, body, outcome)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        outcome.failure = f"{type(error).__name__}: {error}"
    return outcome


async def _whole(client: httpx.AsyncClient, body: bytes, outcome: Outcome) -> None:
    response = await client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    outcome.status = response.status_code
    if response.status_code == 200:
        _take(response.json()["choices"][0], outcome)


async def _stream(client: httpx.AsyncClient, body: bytes, outcome: Outcome) -> None:
    headers = {"Content-Type": "application/json"}
    leave = outcome.request.after if outcome.request.kind == "disconnect" else float("inf")
    chunks = 0
    async with client.stream("POST", "/v1/completions", content=body, headers=headers) as response:
        outcome.status = response.status_code
        if response.status_code != 200:
            await response.aread()
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            message = json.loads(line.removeprefix("data: "))
            if "error" in message:
                outcome.failure = f"error in the stream: {message['error']}"
                return
            _take(message["choices"][0], outcome)
            chunks += 1
            if chunks >= leave:
                outcome.left = True
                return


def _take(choice: dict[str, Any], outcome: Outcome) -> None:
    logprobs = choice["logprobs"]
    if logprobs is not None:
        for token, logprob in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True):
            outcome.steps.append(Step(token, logprob))
    outcome.finish_reason = choice["finish_reason"]


async def _run(
    url: str, model: str, requests: Sequence[Request], concurrency: int, timeout: float, each: Callable[[Outcome], None]
) -> list[Outcome]:
    outcomes: list[Outcome | None] = [None] * len(requests)
    queue = iter(enumerate(requests))
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, **PLAIN) as client:

        async def work() -> None:
            for index, request in queue:
                outcome = await send(client, request, model)
                outcomes[index] = outcome
                each(outcome)

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return [outcome for outcome in outcomes if outcome is not None]


def run_load(
    url: str,
    model: str,
    requests: Sequence[Request],
    *,
    concurrency: int,
    timeout: float = 120,
    each: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Send all requests, at most `concurrency` at a time, and return their outcomes in the requests' order.

    `each` is called with every outcome as it comes. No failure of a request raises: see `Outcome.lost`.
    """
    return asyncio.run(_run(url, model, requests, concurrency, timeout, each))


def requests_held(url: str) -> int:
    """How many requests a vLLM server is working on or has waiting, by its own metrics."""
    lines = httpx.get(f"{url}/metrics", **PLAIN).text.splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names)]
    if len(values) != len(names):
        raise BlockFp8Error("the server's metrics are not those of vLLM", where=url, expected=names, got=values)
    return int(sum(values))
