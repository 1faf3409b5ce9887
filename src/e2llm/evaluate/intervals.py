"""How sure a mean is: 95 % confidence intervals by bootstrap over what was sampled (documents, prompts, examples).

Flows in: one number an example. Flows out: `Interval`, or None where the examples show no spread to judge by. The
percentile bootstrap (Efron and Tibshirani 1993, Sect. 13.3) with fixed draws, so that the same examples give the same
interval. Knows no model, no metric and no file.
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
_DRAWS_TOGETHER = 2**22
"""Indices held at once: an evaluation may have ten thousand examples."""

DESCRIPTION = {
    "confidence": CONFIDENCE,
    "method": "percentile bootstrap over documents, prompts or examples; Wilson where all scores are 0 or all are 1",
    "resamples": RESAMPLES,
    "seed": SEED,
}
"""What a Record says about its intervals."""


@dataclass(frozen=True)
class Interval:
    """Lowest and highest value, in the unit of what was estimated."""

    low: float
    high: float


def interval_fields(interval: Interval | None) -> dict[str, Any]:
    """`low` and `high` of a Record's row; {} where there is no interval."""
    return {} if interval is None else {"low": interval.low, "high": interval.high}


def interval_of_mean(scores: Sequence[float]) -> Interval | None:
    """Interval of the mean of scores between 0 and 1.

    Where all are 0 or all are 1 every resample is the same and the bootstrap would claim certainty; Wilson's interval
    (1927, Eq. 3) does not. None for equal scores in between, and for none.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) == 0:
        return None
    if (values == values[0]).all():
        return _wilson(float(values[0]), len(values)) if values[0] in (0.0, 1.0) else None
    return _percentiles(_resampled(len(values), lambda drawn: values[drawn].mean(axis=1)))


def interval_of_perplexity(nats: Sequence[float], tokens: Sequence[int]) -> Interval | None:
    """Interval of exp(sum of nats / sum of tokens) over documents; None with a single document."""
    if len(nats) < 2:
        return None
    loss, count = np.asarray(nats, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    return _percentiles(_resampled(len(loss), lambda d: np.exp(loss[d].sum(axis=1) / count[d].sum(axis=1))))


def interval_of_average(groups: Sequence[Sequence[float]], weights: Sequence[float]) -> Interval | None:
    """Interval of sum(weight × mean of group) of scores from 0 to 1: each group (a task) is resampled within itself.

    None where no group shows any spread. `weights` sum to 1, so what lies outside 0 to 1 by rounding is put back.
    """
    total = np.zeros(RESAMPLES)
    for index, (scores, weight) in enumerate(zip(groups, weights, strict=True)):
        values = np.asarray(scores, dtype=np.float64)
        # Each group its own draws: equal ones would tie tasks together that were sampled apart.
        total += weight * _resampled(len(values), lambda d, v=values: v[d].mean(axis=1), stream=index)  # type: ignore[misc]
    return None if total.max() - total.min() < 1e-12 else _percentiles(total.clip(0.0, 1.0))


def _resampled(n: int, statistic: Callable[[np.ndarray], np.ndarray], stream: int = 0) -> np.ndarray:
    """`statistic` of (resamples, n) drawn indices, for RESAMPLES resamples in pieces of bounded size."""
    random = np.random.default_rng([SEED, stream])
    together = max(1, _DRAWS_TOGETHER // n)
    pieces = [min(together, RESAMPLES - start) for start in range(0, RESAMPLES, together)]
    return np.concatenate([statistic(random.integers(0, n, (rows, n))) for rows in pieces])


def _percentiles(values: np.ndarray) -> Interval:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))


def _wilson(share: float, n: int) -> Interval:
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding must not push the bound that equals the share over it.
    return Interval(max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))
