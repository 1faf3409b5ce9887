"""Permutations are permutations, and shares keep to Tijdeman's bound after every sample."""

import numpy as np
import pytest

from e2llm.data.order import assign_sources, keyed_hash, number_within_source, permute


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 100, 1025])
def test_permute_is_one_to_one(count):
    assert sorted(permute(i, count, key=7) for i in range(count)) == list(range(count))


def test_permute_depends_on_the_key_and_mixes():
    orders = [[permute(i, 500, key) for i in range(500)] for key in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert all(abs(np.corrcoef(order, range(500))[0, 1]) < 0.2 for order in orders)


def test_permute_is_the_same_for_ever():
    # A resumed run may sit on another version of everything.
    assert [permute(i, 10, key=1) for i in range(10)] == [5, 1, 3, 6, 9, 4, 8, 2, 7, 0]
    assert keyed_hash(1, -2) == 2811536125434670634


@pytest.mark.parametrize("weights", [(1,), (1, 1), (3, 1), (0.2, 0.5, 0.3), (1, 2, 4, 8, 16), (0.9, *[0.01] * 10)])
def test_shares_are_within_the_bound_after_every_sample(weights):
    assigned = assign_sources(weights, 3000)
    bound = 1 - 1 / max(2, 2 * len(weights) - 2)
    n = np.arange(1, 3001)
    for source, weight in enumerate(weights):
        assert np.abs(np.cumsum(assigned == source) - n * weight / sum(weights)).max() <= bound + 1e-6


def test_random_shares_are_within_the_bound():
    random = np.random.default_rng(0)
    for sources in (2, 3, 5, 9):
        weights = (random.exponential(size=sources) ** 3 + 1e-4).tolist()
        counts = np.cumsum(assign_sources(weights, 1000)[:, None] == np.arange(sources), axis=0)
        exact = np.arange(1, 1001)[:, None] * np.array(weights) / sum(weights)
        assert np.abs(counts - exact).max() <= 1 - 1 / (2 * sources - 2) + 1e-6


def test_more_samples_change_nothing_before():
    assert (assign_sources((3, 2, 5), 1000)[:50] == assign_sources((3, 2, 5), 50)).all()


def test_number_within_source():
    assert number_within_source(np.array([0, 1, 0, 0, 2, 1], dtype=np.int16)).tolist() == [0, 0, 1, 2, 0, 1]
