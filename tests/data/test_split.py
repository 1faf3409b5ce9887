"""The held-out choice: by content, never empty, never everything, never the same text on both sides."""

import numpy as np
import pytest

from e2llm.data.split import choose_held_out


def hashes(*values):
    return np.array(values, dtype=np.uint64)


def held(values, fraction=0.01, seed=0):
    return choose_held_out([hashes(*values)], fraction=fraction, seed=seed)[0]


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("seed", [-1, 0, 5])
def test_at_least_one_and_never_all(fraction, count, seed):
    assert 0 < held(range(count), fraction, seed).sum() < count


def test_nothing_to_hold_out():
    assert not held(range(100), fraction=0).any()
    assert not held([7], fraction=0.9).any()
    assert not held([7, 7, 7], fraction=0.9).any()


def test_share_is_near_the_fraction():
    assert held(range(10_000), fraction=0.1).mean() == pytest.approx(0.1, abs=0.01)


def test_choice_follows_content_and_seed():
    random = np.random.default_rng(0).integers(0, 2**63, 500)
    order = np.random.default_rng(1).permutation(500)
    assert (held(random, 0.2)[order] == held(random[order], 0.2)).all()
    assert (held(random, 0.2) == held(np.append(random, 12345), 0.2)[:500]).all()
    assert (held(random, 0.2, seed=0) != held(random, 0.2, seed=1)).any()


def test_copies_go_together_within_and_across_sources():
    first, second = hashes(*range(50), *range(50)), hashes(*range(25, 90), 1000)
    a, b = choose_held_out([first, second], fraction=0.1, seed=3)
    assert not set(first[a]) & (set(first[~a]) | set(second[~b]))
    assert not set(second[b]) & (set(first[~a]) | set(second[~b]))


def test_a_source_that_would_be_left_with_nothing():
    out = hashes(*range(10))[held(range(10))]
    with pytest.raises(ValueError, match=r"data\.sources\[1\].*held_out_fraction = 0"):
        choose_held_out([hashes(*range(10)), hashes(*out)], fraction=0.01, seed=0)
