"""Which copies of a layer its readers take."""

from typing import Any

import pytest
import torch

from qwen3_fp8_ascend.testing import contenders
from qwen3_fp8_ascend.testing.contenders import Weights, ours
from qwen3_fp8_ascend.testing.devices import open_device
from qwen3_fp8_ascend.testing.judges import random_problem
from tests.support.cpu_levels import needs_cpu_backend


@needs_cpu_backend
@pytest.mark.parametrize("copies", [2, 7, 40])
def test_in_a_round_no_two_read_the_same_copy(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that has just been read is in a cache, and whoever reads it next would seem fast."""
    problem = random_problem(1, (128,), 128)
    weights = Weights(problem.weight, problem.scale, copies * problem.weight.numel(), open_device("cpu"))
    taken: list[int] = []

    def block_linear(x: torch.Tensor, packed: Any, *rest: object) -> None:
        taken.append(id(packed))

    monkeypatch.setattr(contenders.ops, "block_linear", block_linear)
    readers = [peer.prepare(weights)(problem.x) for peer in ours(weights.device) if peer.backend == "cpu"]
    assert len(readers) >= 2
    met = set()
    for number in range(2 * copies):
        taken.clear()
        for read in readers:
            read(number)
        assert len(set(taken)) == len(readers)
        met.update(taken)
    assert len(met) == max(copies, len(readers))
