"""How many keys a far key stands for, against counting."""

from __future__ import annotations

import math

import numpy as np
import pytest

from e2llm.positions.far import far_keys
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

RAGGED = np.array([0, 1, 2, 3, 4, 9, 10, 30, 31, 32, 33, 50])


def counted(positions: np.ndarray, leading: int, token: int) -> tuple[int, float]:
    """(segment, keys that each earlier ordinary key stands for), by walking to the token."""
    segment = begin = 0
    for place in range(1, token + 1):
        if positions[place] != positions[place - 1] + 1:
            segment, begin = segment + 1, place
    tokens, places = max(begin - leading, 1), max(int(positions[begin]) - leading, 1)
    return segment, max(places / tokens, 1.0)


@pytest.mark.parametrize("leading", [0, 4])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_segments_and_bias_are_what_counting_gives(leading: int, weight: float) -> None:
    found = far_keys(RAGGED, leading_tokens=leading, weight=weight, most_segments=4)
    for token in range(len(RAGGED)):
        segment, stands_for = counted(RAGGED, leading, token)
        assert found.segments[token] == segment
        assert found.bias[token] == pytest.approx(weight * math.log(stands_for), abs=1e-6)


def test_at_weight_one_a_token_sees_as_many_keys_as_in_a_whole_window() -> None:
    sampler = PositionSampler(
        native_window=512,
        training_window=256,
        scales=ScalesConfig(max_scale=16),
        placement=PlacementConfig(kind="jumps", max_jumps=7, far_weight=1.0),
    )
    for index in range(40):
        drawn = sampler.draw(index)
        assert drawn.far is not None
        segments, leading = drawn.far.segments, sampler.placement.leading_tokens
        for token in range(len(segments)):
            earlier = int((segments[leading:] < segments[token]).sum())
            near = int((segments[: token + 1] == segments[token]).sum())
            seen = leading * (segments[token] > 0) + earlier * math.exp(drawn.far.bias[token]) + near
            assert seen == pytest.approx(drawn.positions[token] + 1, rel=1e-5)


def test_without_a_weight_a_draw_is_the_same_and_has_none() -> None:
    plain, weighed = (
        PositionSampler(
            native_window=512,
            training_window=128,
            scales=ScalesConfig(max_scale=16),
            placement=PlacementConfig(kind="jumps", far_weight=weight),
        )
        for weight in (0.0, 0.5)
    )
    assert plain.draw(3).far is None
    assert np.array_equal(plain.draw(3).positions, weighed.draw(3).positions)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"far_weight": -0.1}, "far_weight = -0.1"),
        ({"far_weight": 2.5}, "far_weight = 2.5"),
        ({"kind": "randpos", "far_weight": 1.0}, "'randpos' can make inf"),
        ({"max_jumps": 64, "far_weight": 1.0}, "at most 64 segments"),
        ({"kind": "pose", "chunks": 65, "far_weight": 1.0}, "at most 64 segments"),
    ],
)
def test_what_cannot_be_weighed_is_refused(given: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PlacementConfig(**given)
