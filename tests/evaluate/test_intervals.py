"""Confidence intervals against known theory: the normal limit, Wilson's published values, coverage of the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from e2llm.evaluate.intervals import Interval, interval_fields, interval_of_average, interval_of_mean
from e2llm.evaluate.intervals import interval_of_perplexity as of_perplexity


def test_large_samples_give_the_normal_interval() -> None:
    scores = np.random.default_rng(1).random(2000)
    found = interval_of_mean(scores.tolist())
    half = 1.96 * scores.std() / math.sqrt(len(scores))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=half / 10)


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    # Wilson score interval, 95 %: 0/20 is in Newcombe 1998, Table I, method 3; the others n / (n + z²) by hand.
    [(0.0, 20, 0.0, 0.1611), (1.0, 29, 0.8830, 1.0), (1.0, 1, 0.2065, 1.0)],
)
def test_equal_answers_are_no_certainty(share: float, n: int, low: float, high: float) -> None:
    found = interval_of_mean([share] * n)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_nothing_to_judge_by() -> None:
    assert interval_of_mean([]) is None
    assert interval_of_mean([0.37, 0.37]) is None
    assert of_perplexity([3.0], [10]) is None
    assert interval_of_average([[1.0, 1.0]], [1.0]) is None
    assert interval_fields(None) == {} and interval_fields(Interval(0.1, 0.2)) == {"low": 0.1, "high": 0.2}


def test_the_same_scores_give_the_same_interval() -> None:
    scores = [0.0, 1.0, 1.0, 0.5, 0.25]
    assert interval_of_mean(scores) == interval_of_mean(scores)


def test_coverage_of_the_truth() -> None:
    """Of intervals of samples of a known distribution some 95 % hold its mean; fewer at n = 40, as theory says."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = interval_of_mean(random.beta(2, 5, 40).tolist())
        assert found is not None
        held += found.low <= 2 / 7 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_perplexity_resamples_documents_with_their_lengths() -> None:
    nats, tokens = [200.0, 260.0, 230.0, 900.0], [100, 100, 100, 300]
    found = of_perplexity(nats, tokens)
    assert found is not None
    means = [n / t for n, t in zip(nats, tokens, strict=True)]
    assert math.exp(min(means)) < found.low < math.exp(sum(nats) / sum(tokens)) < found.high < math.exp(max(means))


def test_an_average_is_surer_than_its_tasks() -> None:
    random = np.random.default_rng(3)
    groups = [random.random(50).tolist() for _ in range(16)]
    one, many = interval_of_mean(groups[0]), interval_of_average(groups, [1 / 16] * 16)
    assert one is not None and many is not None
    # Independent tasks: the width falls by the square root of their number.
    assert (many.high - many.low) == pytest.approx((one.high - one.low) / 4, rel=0.25)


def test_rounding_does_not_leave_the_range() -> None:
    """Weights of 1/49 sum to a little more than 1; a Record would refuse the row of a nearly perfect model."""
    groups = [[1.0] * 5] * 48 + [[1.0] * 4 + [0.0]]
    weights = [(1 + 1e-15) / 49] * 49
    assert sum(weights) > 1
    found = interval_of_average(groups, weights)
    assert found is not None and found.high == 1.0
