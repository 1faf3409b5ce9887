"""How sure a number is: 95 % confidence intervals over what was sampled (documents, prompts, examples).

Flows in: one number a sample. Flows out: `Interval`, or None where a single sample shows no spread to judge by.

Right or wrong answers: Wilson's score interval (1927, Eq. 3). The bootstrap claims certainty where all answers are
alike and covers too little near that: of 20 answers with a true share of 0.05 its interval holds the truth 64 times in
a hundred, Wilson's 92 (the test adds up the binomial probabilities). Anything graded, and sums over documents: the
percentile bootstrap (Efron and Tibshirani 1993, Sect. 13.3) with fixed draws, so that the same samples give the same
interval. Means of several tasks: the tasks' own intervals put together (Zou and Donner 2008), which is defined where a
task has all answers right. Knows no model, no metric and no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
BLOCKS = "blocks"
"""`interval` of a row whose interval is over contiguous blocks of one document's tokens (the block bootstrap, Künsch
1989)."""
_DRAWS_TOGETHER = 2**22
"""Indices held at once: an evaluation may have ten thousand examples."""

DESCRIPTION = {
    "confidence": CONFIDENCE,
    "method": "Wilson over right or wrong answers; percentile bootstrap over documents, prompts or examples otherwise, "
    "over blocks of tokens where a row's interval is 'blocks' (one document); means over tasks from the tasks' "
    "intervals",
    "resamples": RESAMPLES,
    "seed": SEED,
}
"""What a Record says about its intervals."""


@dataclass(frozen=True)
class Interval:
    """Lowest and highest value, in the unit of what was estimated."""

    low: float
    high: float


def interval_fields(interval: Interval | None, *, kind: str = "") -> dict[str, Any]:
    """`low` and `high` of a Record's row; {} where there is no interval. `kind`: the row's `interval`, where it is not
    over what `n` or `documents` count, such as BLOCKS."""
    if interval is None:
        return {}
    return {"low": interval.low, "high": interval.high} | ({"interval": kind} if kind else {})


def document_fields(
    sums: Sequence[float],
    counts: Sequence[float],
    blocks: Sequence[tuple[float, float]],
    *,
    of: Callable[[Sequence[float], Sequence[float]], Interval | None],
) -> dict[str, Any]:
    """Fields of the interval `of` (a ratio, a perplexity) over documents; with a single one, over its `blocks` (sum,
    count), and marked as such: they say how sure its value is, and nothing about other documents."""
    if len(sums) > 1:
        return interval_fields(of(sums, counts))
    return interval_fields(of([total for total, _ in blocks], [count for _, count in blocks]), kind=BLOCKS)


def interval_of_mean(scores: Sequence[float]) -> Interval | None:
    """Interval of the mean of scores between 0 and 1; None for no score.

    Wilson's where all scores are 0 or 1, and where all are equal: no scores of a mean vary more than right and wrong
    ones do, so that is the widest it can be.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) == 0:
        return None
    if np.isin(values, (0.0, 1.0)).all() or (values == values[0]).all():
        return wilson(float(values.mean()), len(values))
    return _percentiles(_resampled(len(values), lambda drawn: values[drawn].mean(axis=1)))


def interval_of_ratio(sums: Sequence[float], counts: Sequence[float]) -> Interval | None:
    """Interval of sum(sums) / sum(counts) over documents, such as nats over tokens; None with a single document.

    Documents that count nothing say nothing about the ratio and are left out.
    """
    total, count = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    total, count = total[count > 0], count[count > 0]
    if len(total) < 2:
        return None
    return _percentiles(_resampled(len(total), lambda d: total[d].sum(axis=1) / count[d].sum(axis=1)))


def interval_of_perplexity(nats: Sequence[float], tokens: Sequence[float]) -> Interval | None:
    """Interval of exp(sum of nats / sum of tokens) over documents; None with a single document."""
    found = interval_of_ratio(nats, tokens)
    return None if found is None else Interval(math.exp(found.low), math.exp(found.high))


def interval_of_statistic(
    samples: int, statistic: Callable[[np.ndarray], float], *, resamples: int = RESAMPLES
) -> Interval | None:
    """Interval of any statistic, a function of the (n,) indices that were drawn; None with a single sample.
    `resamples`: fewer, for a statistic that is slow."""
    if samples < 2:
        return None
    return _percentiles(_resampled(samples, lambda drawn: np.array([statistic(rows) for rows in drawn]), resamples))


def interval_of_average(means: Sequence[float], intervals: Sequence[Interval], weights: Sequence[float]) -> Interval:
    """Interval of sum(weight × mean) of independent means from their own intervals, within 0 to 1.

    The "method of variance estimates recovery" (Zou and Donner 2008, Eq. 3 and 4): distances from a mean to its ends
    add up as standard errors do. Weights are positive.
    """
    value = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
    spreads = [
        (weight * (mean - one.low), weight * (one.high - mean))
        for weight, mean, one in zip(weights, means, intervals, strict=True)
    ]
    low = value - math.hypot(*(below for below, _ in spreads))
    high = value + math.hypot(*(above for _, above in spreads))
    return Interval(max(0.0, low), min(1.0, high))


def wilson(share: float, n: int) -> Interval:
    """Wilson's interval of a share of `n` independent answers."""
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding must not push the bound that equals the share over it.
    return Interval(max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))


def _resampled(
    n: int, statistic: Callable[[np.ndarray], np.ndarray], resamples: int = RESAMPLES
) -> np.ndarray:
    """`statistic` of (resamples, n) drawn indices, in pieces of bounded size."""
    random = np.random.default_rng([SEED, 0])
    together = max(1, _DRAWS_TOGETHER // n)
    pieces = [min(together, resamples - start) for start in range(0, resamples, together)]
    return np.concatenate([statistic(random.integers(0, n, (rows, n))) for rows in pieces])


def _percentiles(values: np.ndarray) -> Interval:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))
