"""Whether an answer is the greedy one of its prompt, where rounding depends on the batch.

The kernels' and vLLM's attention paths change with the number of rows, so a request in a batch is rounded otherwise
than alone, and where two tokens are almost equally likely greedy decoding may take the other one, after which all
differs. So answers are not compared with answers. An idle server is given the answer as the end of its prompt and says
how likely it holds each token there (teacher forcing): a right answer's tokens are as likely as the load's server said,
and no other token is likelier, both to within what rounding moves. That is asked of every token, and an answer that
belongs to another prompt does not have it for long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen3_fp8_ascend.serving import Server
from tests.support.load import Step


@dataclass(frozen=True)
class Comparison:
    """An answer beside what an idle server says of its tokens.

    moved: by how many nats each token's log-probability differs. behind: by how many nats each is less likely than the
    best one at its place, as the idle server has it.
    Shapes: moved, behind (tokens,).
    """

    moved: np.ndarray
    behind: np.ndarray

    def wrong(self, limit: float) -> bool:
        """Whether this cannot be rounding, which moves a log-probability by at most `limit` nats.

        A token that was the best one is then behind another by at most twice that, since both may have moved.
        """
        return bool((self.moved > limit).any() or (self.behind > 2 * limit).any())

    @property
    def differs(self) -> bool:
        """Whether the idle server would have taken another token somewhere."""
        return bool((self.behind > 0).any())


def compare(answer: Sequence[Step], idle: np.ndarray) -> Comparison:
    """Compare an answer with `IdleServer.logprobs` of it."""
    said = np.array([step.logprob for step in answer])
    return Comparison(np.abs(said - idle[:, 0]), idle[:, 1] - idle[:, 0])


class IdleServer:
    """Says how likely it holds answers. Must have nothing else to do, so that nothing depends on a load."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._known: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}

    def logprobs(self, prompt: str, answer: Sequence[Step]) -> np.ndarray:
        """Of each token behind the prompt and the tokens before it, its log-probability, and that of the best one.

        Shapes: -> (tokens, 2). An answer's beginning has the numbers of the whole one, if that was asked for before.
        """
        tokens = tuple(step.token for step in answer)
        if (prompt, tokens) not in self._known:
            numbers = self._ask(prompt, [token_id(token) for token in tokens])
            for count in range(1, len(tokens) + 1):
                self._known.setdefault((prompt, tokens[:count]), numbers[:count])
        return self._known[prompt, tokens]

    def _ask(self, prompt: str, answer: list[int]) -> np.ndarray:
        ids = self._server.post("/tokenize", {"model": self._server.model, "prompt": prompt})["tokens"]
        body = {"model": self._server.model, "prompt": ids + answer, "max_tokens": 1, "temperature": 0}
        choice = self._server.post("/v1/completions", body | {"prompt_logprobs": 1})["choices"][0]
        entries = choice["prompt_logprobs"][len(ids) :]
        assert len(entries) == len(answer)
        return np.array(
            [
                (entry[str(token)]["logprob"], max(other["logprob"] for other in entry.values()))
                for token, entry in zip(answer, entries, strict=True)
            ]
        )


def token_id(token: str) -> int:
    """Of a token as `Step` names it."""
    return int(token.removeprefix("token_id:"))
