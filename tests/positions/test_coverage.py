"""Coverage histograms against cases small enough to know."""

from __future__ import annotations

import numpy as np
import pytest

from e2llm.positions.coverage import Coverage, coverage
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

L, R, G = 64, 32, 4
W = L * G


def cover(kind: str, *, draw: str = "uniform_integers", **settings: int) -> tuple[Coverage, PositionSampler]:
    sampler = PositionSampler(
        native_window=L,
        training_window=R,
        scales=ScalesConfig(distribution=draw, max_scale=G),
        placement=PlacementConfig(kind=kind, **settings),
    )
    return coverage(sampler, num_samples=400, pairs_per_sample=64, bins=W), sampler


@pytest.mark.parametrize("kind", ["none", "paper", "jumps", "pose", "randpos", "end_anchor"])
def test_shares_sum_to_one_on_the_edges_promised(kind: str) -> None:
    found, _ = cover(kind)
    assert found.distance_edges.tolist() == found.position_edges.tolist() == list(range(W + 1))
    assert found.scale_edges.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5] and found.native_window == L
    assert (found.scale_counts > 0).all(), "every integer has a row, and no row is between two"
    assert found.distance_scale.shape == (W, len(found.scale_edges) - 1)
    for shares in (found.distance_scale, found.position_counts, found.scale_counts):
        assert shares.min() >= 0 and shares.sum() == pytest.approx(1.0)
    assert found.leading_distance.sum() == pytest.approx(1.0 if kind in {"paper", "jumps"} else 0.0)
    assert len(found.examples) == 12


def test_none_covers_its_window_alone() -> None:
    found, sampler = cover("none")
    np.testing.assert_allclose(found.position_counts[:R], 1 / R)
    assert found.position_counts[R:].sum() == 0
    distances = found.distance_scale.sum(axis=1)
    # Pairs of R tokens at distance d: R - d of R (R - 1) / 2.
    np.testing.assert_allclose(distances[1:R], (R - np.arange(1, R)) / (R * (R - 1) / 2), atol=0.01)
    assert distances[0] == 0 and distances[R:].sum() == 0
    drawn = np.array([sampler.draw(index).scale for index in range(400)])
    counted = np.histogram(drawn, found.scale_edges)[0] / 400
    np.testing.assert_allclose(found.scale_counts, counted)
    np.testing.assert_allclose(found.distance_scale.sum(axis=0), counted, atol=0.01)


def test_paper_reaches_far_from_the_leading_tokens_only() -> None:
    found, _ = cover("paper", draw="fixed")
    ordinary = found.distance_scale.sum(axis=1)
    assert (ordinary[1 : R - 4] > 0).all() and ordinary[R - 4 :].sum() == 0
    assert found.leading_distance[:4].sum() == 0
    assert (found.leading_distance[4 : W - 1] > 0).mean() > 0.98
    assert found.scale_counts[-1] == 1.0 and found.distance_scale[:, :-1].sum() == 0, "all at the largest scale"


def test_jumps_reach_far_between_ordinary_tokens() -> None:
    found, _ = cover("jumps", draw="fixed")
    ordinary = found.distance_scale.sum(axis=1)
    assert (ordinary[1 : W // 2] > 0).mean() > 0.95 and (ordinary[W // 2 : W - 5] > 0).mean() > 0.5
    assert ordinary[W - 4 :].sum() == 0


def test_examples_are_the_first_draws() -> None:
    found, sampler = cover("jumps")
    for index, example in enumerate(found.examples):
        np.testing.assert_array_equal(example.positions, sampler.draw(index).positions)


def test_same_sampler_same_coverage() -> None:
    first, sampler = cover("jumps")
    again = coverage(sampler, num_samples=400, pairs_per_sample=64, bins=W)
    np.testing.assert_array_equal(first.distance_scale, again.distance_scale)


def test_scale_one_only() -> None:
    sampler = PositionSampler(
        native_window=L,
        training_window=R,
        scales=ScalesConfig(distribution="fixed", max_scale=1.0),
        placement=PlacementConfig(kind="paper"),
    )
    found = coverage(sampler, num_samples=20, pairs_per_sample=16)
    assert found.scale_counts.tolist() == [1.0] and found.scale_edges.tolist() == [0.5, 1.5]
    assert found.distance_edges[-1] == L


@pytest.mark.parametrize(
    ("scales", "edges"),
    [
        (ScalesConfig(distribution="fixed", max_scale=3), [0.5, 1.5, 2.5, 3.5]),
        (ScalesConfig(distribution="weighted", max_scale=3, values=(1, 3)), [0.5, 1.5, 2.5, 3.5]),
        (ScalesConfig(distribution="weighted", max_scale=3, values=(1.5, 3)), np.linspace(1, 3, 33)),
        (ScalesConfig(distribution="fixed", max_scale=2.5), np.linspace(1, 2.5, 33)),
        (ScalesConfig(distribution="log_uniform", max_scale=16), 2.0 ** (np.arange(33) / 8)),
        (ScalesConfig(distribution="uniform_integers", max_scale=200), np.arange(0.5, 201, 2)),
    ],
    ids=lambda value: value.distribution if isinstance(value, ScalesConfig) else "",
)
def test_scale_edges_suit_the_draw(scales: ScalesConfig, edges: np.ndarray) -> None:
    sampler = PositionSampler(native_window=L, training_window=R, scales=scales, placement=PlacementConfig(kind="none"))
    found = coverage(sampler, num_samples=300, pairs_per_sample=4)
    np.testing.assert_allclose(found.scale_edges, edges)
    assert found.scale_counts.sum() == pytest.approx(1.0), "the largest scale is counted too"
    if scales.distribution == "log_uniform":
        assert (found.scale_counts > 0).all() and found.scale_counts.max() < 4 / 32, "evenly filled rows"


def test_log_uniform_with_a_single_scale() -> None:
    scales = ScalesConfig(distribution="log_uniform", max_scale=1)
    sampler = PositionSampler(native_window=L, training_window=R, scales=scales, placement=PlacementConfig(kind="none"))
    assert coverage(sampler, num_samples=3, pairs_per_sample=4).scale_counts[0] == 1.0
