"""Confidence intervals against scipy, published values, the normal limit and the exact coverage of the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from e2llm.intervals import (
    Interval,
    interval_fields,
    interval_of_average,
    interval_of_mean,
    interval_of_ratio,
    interval_of_statistic,
    wilson,
)
from e2llm.intervals import interval_of_perplexity as of_perplexity


def ends(found: Interval | None) -> tuple[float, float]:
    assert found is not None
    return found.low, found.high


def test_large_samples_give_the_normal_interval() -> None:
    scores = np.random.default_rng(1).random(2000)
    half = 1.96 * scores.std() / math.sqrt(len(scores))
    assert ends(interval_of_mean(scores.tolist())) == pytest.approx(
        (scores.mean() - half, scores.mean() + half), abs=half / 10
    )


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe 1998, Table I, method 3 (Wilson without continuity correction), to its four digits.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_the_published_intervals(right: int, n: int, low: float, high: float) -> None:
    scores = [1.0] * right + [0.0] * (n - right)
    assert ends(interval_of_mean(scores)) == pytest.approx((low, high), abs=5e-5)


def test_shares_have_scipys_intervals() -> None:
    stats = pytest.importorskip("scipy.stats")
    for n in (1, 2, 10, 100, 3000):
        for right in sorted({0, 1, n // 3, n - 1, n}):
            own = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
            assert ends(interval_of_mean([True] * right + [False] * (n - right))) == pytest.approx(
                (own.low, own.high), abs=1e-12
            )


def binomial(right: int, n: int, share: float) -> float:
    return math.comb(n, right) * share**right * (1 - share) ** (n - right)


def test_why_shares_are_not_bootstrapped() -> None:
    """Exact chance that the interval of 20 answers holds a true share of 0.05: the reason for Wilson's interval."""
    n, truth, random = 20, 0.05, np.random.default_rng(0)
    held = {"wilson": 0.0, "bootstrap": 0.0}
    for right in range(n + 1):
        low, high = ends(wilson(right / n, n))
        held["wilson"] += binomial(right, n, truth) * (low <= truth <= high)
        low, high = np.percentile(random.binomial(n, right / n, 4000) / n, [2.5, 97.5])
        held["bootstrap"] += binomial(right, n, truth) * (low <= truth <= high)
    assert held["wilson"] == pytest.approx(0.925, abs=0.005) and held["bootstrap"] == pytest.approx(0.639, abs=0.005)


def test_equal_scores_are_no_certainty() -> None:
    """Scores of 0.37 twice: at most as wide as right and wrong answers of that mean, which is the binomial case."""
    low, high = ends(interval_of_mean([0.37] * 50))
    assert 0.24 < low < 0.37 < high < 0.51
    assert ends(interval_of_mean([0.2])) != (0.2, 0.2)


def test_nothing_to_judge_by() -> None:
    assert interval_of_mean([]) is None
    assert of_perplexity([3.0], [10]) is None and interval_of_ratio([3.0, 0.0], [10, 0]) is None
    assert interval_of_statistic(1, lambda rows: 0.0) is None
    assert interval_fields(None) == {} and interval_fields(Interval(0.1, 0.2)) == {"low": 0.1, "high": 0.2}


def test_the_same_scores_give_the_same_interval() -> None:
    scores = [0.0, 1.0, 1.0, 0.5, 0.25]
    assert interval_of_mean(scores) == interval_of_mean(scores)


def test_coverage_of_the_truth() -> None:
    """Of intervals of samples of a known distribution some 95 % hold its mean; fewer at n = 40, as theory says."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high = ends(interval_of_mean(random.beta(2, 5, 40).tolist()))
        held += low <= 2 / 7 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_perplexity_resamples_documents_with_their_lengths() -> None:
    nats, tokens = [200.0, 260.0, 230.0, 900.0], [100, 100, 100, 300]
    low, high = ends(of_perplexity(nats, tokens))
    means = [n / t for n, t in zip(nats, tokens, strict=True)]
    assert math.exp(min(means)) < low < math.exp(sum(nats) / sum(tokens)) < high < math.exp(max(means))
    assert ends(interval_of_ratio(nats, tokens)) == pytest.approx((math.log(low), math.log(high)))


def test_documents_that_count_nothing_do_not_matter() -> None:
    assert interval_of_ratio([1.0, 5.0, 0.0], [10, 20, 0]) == interval_of_ratio([1.0, 5.0], [10, 20])


def test_a_statistic_of_drawn_samples() -> None:
    """The mean as a statistic is the mean's own interval."""
    scores = np.random.default_rng(2).random(30)
    found = interval_of_statistic(30, lambda rows: float(scores[rows].mean()))
    assert ends(found) == pytest.approx(ends(interval_of_mean(scores.tolist())))


def test_an_average_is_surer_than_its_tasks() -> None:
    random = np.random.default_rng(3)
    groups = [random.random(50) for _ in range(16)]
    intervals = [interval_of_mean(group.tolist()) for group in groups]
    low, high = ends(interval_of_average([g.mean() for g in groups], [i for i in intervals if i], [1 / 16] * 16))
    # Independent tasks: variances add up.
    half = 1.96 * math.sqrt(sum(group.var() / 50 for group in groups)) / 16
    mean = float(np.mean(groups))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=half / 10)


def test_an_average_of_one_and_of_perfect_tasks() -> None:
    one = wilson(0.3, 50)
    assert ends(interval_of_average([0.3], [one], [1.0])) == pytest.approx((one.low, one.high))
    low, high = ends(interval_of_average([1.0, 1.0], [wilson(1.0, 20)] * 2, [0.5, 0.5]))
    assert wilson(1.0, 20).low < low < 1.0 == high
    # By hand: weights 0.75 and 0.25; ends 0.1 below and 0.2 above, 0.3 below and 0.4 above.
    found = interval_of_average([0.5, 0.5], [Interval(0.4, 0.7), Interval(0.2, 0.9)], [0.75, 0.25])
    assert ends(found) == pytest.approx((0.5 - math.hypot(0.075, 0.075), 0.5 + math.hypot(0.15, 0.1)))


def test_rounding_does_not_leave_the_range() -> None:
    """Weights of 1/49 sum to a little more than 1; a Record would refuse the row of a nearly perfect model."""
    weights = [(1 + 1e-15) / 49] * 49
    assert sum(weights) > 1
    found = interval_of_average([1.0] * 49, [wilson(1.0, 5)] * 49, weights)
    assert found.high == 1.0
