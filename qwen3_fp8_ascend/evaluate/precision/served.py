"""Runs through a running server: its log-probabilities of the prompts' tokens, and greedy continuations."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.precision.runs import TOP, Run
from qwen3_fp8_ascend.evaluate.servers import client_of, server_facts, unanswered, wait_until_up
from qwen3_fp8_ascend.provenance import provenance, server_device


def run_server(
    url: str,
    model: str | None,
    prompts: Sequence[str],
    name: str,
    *,
    greedy_tokens: int,
    device: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Run:
    """What a vLLM server makes of the prompts; of each position it gives the most probable tokens, not all logits.

    `device`: what it computes on. If nobody says so, a server here computes on this machine's NPU, else its GPU.
    Raises:
        BlockFp8Error: no server there, it serves no such model, or it is not a vLLM that gives log-probabilities.
    """
    wait_until_up(url, 0)
    facts = server_facts(url, model)
    all_ids, logprobs, tops, top_values, greedy = [], [], [], [], []
    for number, prompt in enumerate(prompts, 1):
        progress(f"{name}: prompt {number} of {len(prompts)}")
        choice = _complete(url, facts["model"], prompt, greedy_tokens)
        positions = choice["prompt_logprobs"]
        all_ids.append(np.array(choice["prompt_token_ids"], dtype=np.int64))
        for token, entries in zip(choice["prompt_token_ids"][1:], positions[1:], strict=True):
            logprobs.append(entries[str(token)]["logprob"])
            best = sorted(entries.items(), key=lambda item: item[1]["rank"])[:TOP]
            filling = [(-1, {"logprob": -np.inf})] * (TOP - len(best))
            tops.append([int(t) for t, _ in [*best, *filling]])
            top_values.append([e["logprob"] for _, e in [*best, *filling]])
        greedy.append(choice["token_ids"])
    machine = provenance()
    return Run(
        name,
        str(facts.get("root") or facts["model"]),
        list(prompts),
        np.concatenate(all_ids),
        np.array([len(ids) for ids in all_ids], dtype=np.int64),
        np.array(logprobs, dtype=np.float32),
        np.array(tops, dtype=np.int64),
        np.array(top_values, dtype=np.float32),
        np.array(greedy, dtype=np.int64).reshape(len(prompts), greedy_tokens),
        facts=machine | {"device": device or _device_of(url, machine), "vLLM of the server": str(facts["vllm"])},
    )


def _device_of(url: str, machine: Mapping[str, str]) -> str:
    here = (urllib.parse.urlsplit(url).hostname or "") in ("localhost", "127.0.0.1", "::1")
    return (server_device(machine) or "cpu") if here else "not said"


def _complete(url: str, model: str, prompt: str, greedy_tokens: int) -> dict[str, Any]:
    openai, client = client_of(url)
    extra = {"prompt_logprobs": TOP, "return_token_ids": True, "ignore_eos": True}
    try:
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=greedy_tokens, temperature=0, extra_body=extra
        )
    except openai.OpenAIError as error:
        raise unanswered(url, error, model) from error
    choice: dict[str, Any] = answer.choices[0].model_dump()
    if not choice.get("prompt_logprobs") or not choice.get("prompt_token_ids"):
        raise BlockFp8Error(
            "the server gives no log-probabilities of the prompt",
            where=url,
            expected="prompt_logprobs and prompt_token_ids, as vLLM's completions have them",
            fix="use a vLLM that is among the tested versions",
        )
    ids, positions, greedy = choice["prompt_token_ids"], choice["prompt_logprobs"], choice.get("token_ids") or []
    if len(positions) != len(ids) or len(greedy) != greedy_tokens:
        raise BlockFp8Error(
            "the server answered with other tokens than were asked for",
            where=url,
            expected=f"{len(ids)} positions of the prompt and {greedy_tokens} new tokens",
            got=f"{len(positions)} and {len(greedy)}",
            fix="serve with a --max-model-len of the longest prompt and --greedy-tokens together",
        )
    return choice
