"""Statistics for tests that judge a result by the noise of rounding.

The largest of a sample bounds nothing: another processor, or another run, exceeds it. Each function here says under
which assumption how many runs fail although nothing is wrong; `FALSE_ALARMS` is that share.
"""

from __future__ import annotations

import math

import numpy as np

FALSE_ALARMS = 1e-4
"""One failure in 10,000 runs where nothing is wrong."""

TAIL = 0.2
"""The share of a sample, from its largest value down, that its tail is estimated from."""

LEAST_IN_TAIL = 50


def rank_sum_probability(values: np.ndarray, noise: np.ndarray) -> float:
    """The probability that noise alone ranks as high as `values` do, all units together.

    Each unit (a prompt, say) has one value to judge and several draws of noise. If the value is noise too, its rank
    among the draws is uniform, whatever the noise's distribution is; the ranks of independent units are added, and the
    distribution of their sum is exact. Only values that are above noise make this small: a quieter one passes. Equal
    numbers count for the value.

    Shapes: values (units,), noise (units, draws).
    Source: Wilcoxon's rank-sum test for one against many, stratified by unit.
    """
    units, draws = noise.shape
    if values.shape != (units,):
        raise ValueError(f"{values.shape} values for {units} units of noise")
    ranks = (noise < values[:, None]).sum(axis=1)
    distribution = np.ones(1)
    for _ in range(units):
        distribution = np.convolve(distribution, np.full(draws + 1, 1 / (draws + 1)))
    return float(distribution[ranks.sum() :].sum())


def largest_of_noise(sample: np.ndarray, count: int, false_alarms: float = FALSE_ALARMS) -> float:
    """A limit that the largest of `count` further draws exceeds in at most `false_alarms` of all runs.

    Assumes that the tail falls at least exponentially, as that of a sum of many small roundings does, which is close
    to a normal distribution's. Then what a draw has above the threshold u that a share p of all draws exceeds is, at
    most, exponential with some mean b, and one of `count` draws is above u + b log(p count / false_alarms) with a
    probability of at most `false_alarms`. b is the mean of n excesses, raised by four of its standard errors
    b / sqrt(n) since it is estimated. Noise that is rare breaks the assumption: a sample without any has a limit of 0,
    and whoever judges by it needs a bound of another origin beside it.

    Shapes: sample (draws,), all >= 0.
    Source: peaks over threshold (Pickands 1975) with shape 0, the exponential tail.
    """
    ordered = np.sort(np.asarray(sample, dtype=np.float64))
    n = int(TAIL * len(ordered))
    if n < LEAST_IN_TAIL:
        raise ValueError(f"{len(ordered)} draws, expected {math.ceil(LEAST_IN_TAIL / TAIL)} or more")
    threshold = ordered[-n - 1]
    excess = (ordered[-n:] - threshold).mean() * (1 + 4 / math.sqrt(n))
    return float(threshold + excess * math.log(TAIL * count / false_alarms))
