"""Distances between what two runs computed for the same tokens. Plain numpy, fp64 sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Closeness:
    """How close vectors of two runs are, vector by vector; a vector is one token's logits or one layer's output.

    `cosine` is the mean and `min_cosine` the smallest over the vectors. A relative error is
    ||a - b||2 / ||b||2 of one vector, so that elements near zero do not decide it; `p99_rel` and `max_rel` are over
    the vectors.
    """

    vectors: int
    cosine: float
    min_cosine: float
    p99_rel: float
    max_rel: float


def closeness(a: np.ndarray, b: np.ndarray) -> Closeness:
    """Compare vectors with those of the reference.

    Shapes: a, b (vectors, n); b is the reference.
    Raises:
        ValueError: shapes differ, or there is nothing to compare.
    """
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise ValueError(f"cannot compare vectors of shapes {a.shape} and {b.shape}")
    cosines, errors = np.empty(len(a)), np.empty(len(a))
    for i, (row, reference) in enumerate(zip(a, b, strict=True)):
        x, y = row.astype(np.float64), reference.astype(np.float64)
        xx, yy = np.sqrt(x @ x), np.sqrt(y @ y)
        both_zero = xx == 0 and yy == 0
        cosines[i] = 1.0 if both_zero else (x @ y) / (xx * yy) if xx and yy else 0.0
        difference = np.sqrt((x - y) @ (x - y))
        errors[i] = difference / yy if yy else (0.0 if both_zero else np.inf)
    return Closeness(
        len(a), float(cosines.mean()), float(cosines.min()), float(np.quantile(errors, 0.99)), float(errors.max())
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Shapes: (..., n) -> (..., n) fp64."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def kl_divergence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KL(b || a) of each token's distribution, in nats; b is the reference.

    Shapes: a, b (tokens, n) logits -> (tokens,) fp64.
    """
    out = np.empty(len(a))
    for i, (row, reference) in enumerate(zip(a, b, strict=True)):
        p, q = log_softmax(reference), log_softmax(row)
        out[i] = max(0.0, float(np.exp(p) @ (p - q)))
    return out


def lumped_kl_divergence(
    ids: np.ndarray, logprobs: np.ndarray, reference_ids: np.ndarray, reference_logprobs: np.ndarray
) -> np.ndarray:
    """A lower bound of KL(reference || run) from the most probable tokens of both, in nats.

    Tokens that both lists have are kept apart, all others are one outcome; joining outcomes never raises the
    divergence.

    Shapes: ids, reference_ids (tokens, top) int, logprobs, reference_logprobs (tokens, top) -> (tokens,) fp64.
    """
    out = np.empty(len(ids))
    for i in range(len(ids)):
        run = dict(zip(ids[i].tolist(), logprobs[i].tolist(), strict=True))
        reference = dict(zip(reference_ids[i].tolist(), reference_logprobs[i].tolist(), strict=True))
        common = [t for t in reference if t in run and t >= 0]
        p = np.exp([reference[t] for t in common])
        q = np.exp([run[t] for t in common])
        p, q = np.append(p, max(0.0, 1 - p.sum())), np.append(q, max(1e-12, 1 - q.sum()))
        kept = p > 0
        out[i] = max(0.0, float((p[kept] * (np.log(p[kept]) - np.log(q[kept]))).sum()))
    return out


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share of equal elements."""
    return float((a == b).mean())


def perplexity(logprobs: np.ndarray) -> float:
    """exp of the mean negative log-probability, over natural logarithms of the tokens' probabilities."""
    return float(np.exp(-logprobs.astype(np.float64).mean()))
