"""Scale draws against the distributions they are named for (seeded, so a failure is no accident)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from e2llm.positions.scales import ScalesConfig, draw_scale


def draws(config: ScalesConfig, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([draw_scale(rng, config) for _ in range(n)])


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_uniform_integers() -> None:
    found = draws(ScalesConfig(distribution="uniform_integers", max_scale=20), 20_000)
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == list(range(1, 21)), "1 and g_max belong to G"
    assert chi_square(counts, np.full(20, 1000.0)) < 43.8  # 99.9 % quantile of chi-square with 19 degrees


def test_log_uniform() -> None:
    n, top = 20_000, 32.0
    found = np.sort(draws(ScalesConfig(distribution="log_uniform", max_scale=top), n))
    assert found[0] >= 1 and found[-1] <= top
    cumulated = np.log(found) / math.log(top)
    steps = np.arange(n + 1) / n
    distance = max((steps[1:] - cumulated).max(), (cumulated - steps[:-1]).max())
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov, 99.9 %
    assert len(np.unique(found)) == n, "reals, not a grid"


def test_log_uniform_of_one_is_one() -> None:
    assert set(draws(ScalesConfig(distribution="log_uniform", max_scale=1.0), 10)) == {1.0}


@pytest.mark.parametrize("weights", [(1.0, 3.0, 0.0, 6.0), ()])
def test_weighted(weights: tuple[float, ...]) -> None:
    values = (1.0, 2.5, 4.0, 16.0)
    n = 10_000
    found = draws(ScalesConfig(distribution="weighted", max_scale=16.0, values=values, weights=weights), n)
    shares = np.array(weights or (1.0,) * 4) / (sum(weights) or 4)
    counts = np.array([(found == value).sum() for value in values])
    assert counts.sum() == n
    np.testing.assert_allclose(counts, shares * n, atol=4 * math.sqrt(n) / 2)
    assert (counts[shares == 0] == 0).all()


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_a_curriculum_moves_the_shares(progress: float) -> None:
    config = ScalesConfig(
        distribution="weighted", max_scale=16.0, values=(1.0, 4.0, 16.0), weights=(0, 1, 3), final_weights=(8, 2, 0)
    )
    n, rng = 10_000, np.random.default_rng(0)
    found = [draw_scale(rng, config, progress) for _ in range(n)]
    expected = {0.0: (0, 0.25, 0.75), 0.25: (0.2, 0.2375, 0.5625), 1.0: (0.8, 0.2, 0)}[progress]  # by hand
    np.testing.assert_allclose([found.count(value) / n for value in (1.0, 4.0, 16.0)], expected, atol=0.02)


def test_a_curriculum_may_begin_with_equal_shares() -> None:
    config = ScalesConfig(distribution="weighted", max_scale=4.0, values=(1.0, 4.0), final_weights=(1, 0))
    assert [config.shares(progress) for progress in (0.0, 0.5, 1.0)] == [(0.5, 0.5), (0.75, 0.25), (1.0, 0.0)]


def test_fixed() -> None:
    assert set(draws(ScalesConfig(distribution="fixed", max_scale=2.7), 20)) == {2.7}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_scale": 0.5}, r"scales\.max_scale = 0\.5.*at least 1"),
        ({"max_scale": math.nan}, r"scales\.max_scale = nan"),
        ({"max_scale": math.inf}, r"scales\.max_scale = inf"),
        ({"max_scale": 2.5}, r"scales\.max_scale = 2\.5: uniform_integers needs an integer; log_uniform"),
        ({"distribution": "normal"}, r"scales\.distribution = 'normal': choose one of uniform_integers, log_uniform"),
        ({"values": (1.0, 2.0)}, r"scales\.values = .*only distribution = 'weighted'"),
        ({"distribution": "fixed", "weights": (1.0,)}, r"only distribution = 'weighted'"),
        ({"distribution": "weighted"}, r"scales\.values = \(\)"),
        ({"distribution": "weighted", "values": (0.5, 16.0)}, r"scales\.values = .*at least 1"),
        ({"distribution": "weighted", "values": (1.0, 8.0)}, r"scales\.max_scale = 16\.0: must be the largest"),
        ({"distribution": "weighted", "values": (16.0,), "weights": (1.0, 2.0)}, r"scales\.weights"),
        ({"distribution": "weighted", "values": (1.0, 16.0), "weights": (-1.0, 2.0)}, r"scales\.weights"),
        ({"distribution": "weighted", "values": (16.0,), "weights": (0.0,)}, r"scales\.weights.*above 0"),
        ({"distribution": "weighted", "values": (16.0,), "weights": (math.nan,)}, r"scales\.weights"),
        ({"distribution": "weighted", "values": (16.0,), "weights": (math.inf,)}, r"scales\.weights.*finite"),
        ({"distribution": "weighted", "values": (16.0,), "final_weights": (1.0, 2.0)}, r"scales\.final_weights"),
        ({"distribution": "weighted", "values": (16.0,), "final_weights": (0.0,)}, r"scales\.final_weights.*above 0"),
        ({"distribution": "fixed", "final_weights": (1.0,)}, r"scales\.final_weights.*only distribution = 'weighted'"),
    ],
)
def test_errors_name_the_field(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalesConfig(**settings)
