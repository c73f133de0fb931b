"""Whether a greedy answer is the one that the same server gives alone, where rounding depends on the batch.

The kernels' and vLLM's attention paths change with the number of rows, so a request in a batch is rounded otherwise
than alone, and where two tokens are almost equally likely greedy decoding may take the other one. Such a token is
right as long as the run that is compared with holds it for likely too, to within what rounding moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.support.load import Step


@dataclass(frozen=True)
class Comparison:
    """An answer beside the one given alone.

    same: how many tokens are equal from the start on. diverged: whether a further token differs.
    gap: by how many nats the differing token is less likely than the best one, in the run alone; infinite if it
    is not even among the likeliest there. moved: largest change of a common token's log-probability.
    """

    same: int
    diverged: bool
    gap: float
    moved: float

    def wrong(self, floor: float) -> bool:
        """Whether this cannot be rounding, which moves a log-probability by at most `floor` nats.

        Two tokens change places only if their distance is within twice that.
        """
        return self.moved > floor or self.gap > 2 * floor


def compare(answer: Sequence[Step], alone: Sequence[Step]) -> Comparison:
    """Compare an answer with the beginning of the one that the same prompt gets alone.

    After the first differing token the contexts differ, and so may everything else.
    """
    moved = 0.0
    for index, (got, want) in enumerate(zip(answer, alone, strict=False)):
        if got.token != want.token:
            best = max(want.top.values())
            gap = best - want.top.get(got.token, float("-inf"))
            return Comparison(index, True, gap, moved)
        moved = max(moved, abs(got.logprob - want.logprob))
    missing = len(answer) > len(alone)
    return Comparison(min(len(answer), len(alone)), missing, float("inf") if missing else 0.0, moved)
