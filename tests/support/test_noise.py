"""The statistics of noise: how often they fail where nothing is wrong, and whether they find what is."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.noise import FALSE_ALARMS, largest_of_noise, rank_sum_probability


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_probability_of_ranks_is_what_counting_gives() -> None:
    """Two units with three draws each: sixteen pairs of ranks, all equally likely."""
    noise = np.tile([1.0, 2.0, 3.0], (2, 1))
    for value, rank in ((0.5, 0), (1.5, 1), (2.5, 2), (3.5, 3)):
        pairs = sum(a + b >= 2 * rank for a in range(4) for b in range(4))
        assert rank_sum_probability(np.full(2, value), noise) == pytest.approx(pairs / 16)
    assert rank_sum_probability(np.full(2, 2.0), noise) == rank_sum_probability(np.full(2, 1.5), noise)


def test_noise_of_any_distribution_is_seldom_taken_for_more(random: np.random.Generator) -> None:
    """Heavy tails, and another spread in each unit: the probability is at most p in a share p of all runs."""
    runs, units, draws = 4000, 10, 7
    spread = 10.0 ** random.uniform(-8, 0, (units, 1))
    found = np.sort(
        [
            rank_sum_probability(all_draws[:, 0], all_draws[:, 1:])
            for all_draws in random.standard_cauchy((runs, units, draws + 1)) * spread
        ]
    )
    for p in (0.5, 0.1, 0.01):
        assert (found <= p).mean() <= p + 4 * (p / runs) ** 0.5


def test_what_is_above_noise_is_found_and_what_is_below_passes(random: np.random.Generator) -> None:
    noise = random.exponential(size=(12, 7))
    assert rank_sum_probability(noise.max(1) + 1e-9, noise) < FALSE_ALARMS
    assert rank_sum_probability(noise.min(1) / 2, noise) == pytest.approx(1)


@pytest.mark.parametrize("distribution", ["exponential", "standard_normal"])
def test_the_largest_of_noise_stays_below_the_limit(random: np.random.Generator, distribution: str) -> None:
    """At a rate that can be counted: one run in fifty may exceed the limit."""
    runs, rate = 1500, 0.02

    def draw(count: int) -> np.ndarray:
        return abs(getattr(random, distribution)(size=count))

    above = sum(draw(700).max() > largest_of_noise(draw(400), 700, rate) for _ in range(runs))
    assert above <= runs * rate + 4 * (runs * rate) ** 0.5


def test_the_limit_is_not_far_above_the_noise(random: np.random.Generator) -> None:
    """It would be no judge of anything else: the largest of 700 is about log(700) = 6.6 here."""
    limits = [largest_of_noise(random.exponential(size=600), 700) for _ in range(50)]
    assert min(limits) > 6.6 and max(limits) < 4 * 6.6


def test_too_small_a_sample_is_refused(random: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="249 draws, expected 250 or more"):
        largest_of_noise(random.exponential(size=249), 10)
    with pytest.raises(ValueError, match="values for"):
        rank_sum_probability(np.zeros(3), np.zeros((2, 4)))
