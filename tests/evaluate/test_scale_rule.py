"""Keys decide first, then perplexity; asking only what decides comes to the answer that asking everything does."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from e2llm.evaluate.scale_rule import KEYS_FOR_ONE, best_scale, next_scale, rounded

NATIVE = 8192
Finds = Callable[[float, float, int], bool]
"""(scale, depth, index of the prompt) -> whether the key is found."""


def rows_of(window: int, perplexities: dict[float, float]) -> list[dict[str, Any]]:
    return [
        {"metric": "perplexity", "window": window, "scale": scale, "value": value, "n": 100}
        for scale, value in perplexities.items()
    ]


def answered(scale: float, window: int, prompts: int, finds: Finds) -> list[dict[str, Any]]:
    """Rows of one scale's keys as an evaluation writes them."""
    right = sum(finds(scale, (i % 10 + 0.5) / 10, i) for i in range(prompts))
    where = {"metric": "retrieval", "window": window, "scale": scale}
    return [{**where, "value": right / prompts, "n": prompts}, {**where, "value": 1.0, "n": 1, "depth": 0.5}]


def calibrated(
    window: int, perplexities: dict[float, float], finds: Finds, prompts: int = 24
) -> tuple[float, list[float]]:
    """The scale taken when one question after the other is asked, and the scales that keys were asked at."""
    rows, asked = rows_of(window, perplexities), []
    rows += rows_of(2 * window, {1.0: 1.0})  # another window says nothing
    while prompts and (scale := next_scale(rows, window, NATIVE)):
        asked.append(scale)
        rows += answered(scale, window, prompts, finds)
    return best_scale(rows, window, NATIVE), asked


def reaches(scale: float, depth: float, window: int) -> bool:
    return depth >= 1 - scale * NATIVE / window - 1e-9


@pytest.mark.parametrize("window", [65_536, 131_072])
def test_a_scale_that_loses_the_beginning_is_not_taken_for_its_perplexity(window: int) -> None:
    covering = window / NATIVE
    perplexities = {ratio * covering: 5 * factor for ratio, factor in
                    ((0.5, 2.0), (0.625, 1.3), (0.75, 1.02), (0.875, 0.995), (1.0, 1.0), (1.25, 1.01))}  # fmt: skip
    best, asked = calibrated(window, perplexities, lambda scale, depth, index: reaches(scale, depth, window))
    assert (best, asked) == (covering, [covering])
    # As many pass keys are no reason: other questions about the beginning are answered at the covering scale alone.
    best, asked = calibrated(window, perplexities, lambda scale, depth, index: True)
    assert (best, asked) == (covering, [covering])
    unasked = calibrated(window, perplexities, lambda scale, depth, index: True, prompts=0)
    assert unasked == (0.875 * covering, []), "without keys perplexity alone"
    best, asked = calibrated(window, perplexities, lambda scale, depth, index: False)
    assert best == 0.875 * covering, "where nothing is found, perplexity alone"
    assert asked == [covering, 1.25 * covering]
    # A model for which less is more: its keys are found below scale 6 of 8 alone, and one in four at 8.
    best, asked = calibrated(
        window, perplexities, lambda scale, depth, index: scale <= 0.75 * covering or index % 4 == 0
    )
    assert best == 0.75 * covering, "of three that find all, the one that reads best"
    assert asked == [ratio * covering for ratio in (1, 1.25, 0.875, 0.75, 0.625, 0.5)]


@pytest.mark.parametrize("asked", [1, 2, 5, 11, 12, 23, 24, 60, 100])
def test_one_key_of_twelve_is_luck(asked: int) -> None:
    luck = asked // KEYS_FOR_ONE
    for reference in range(asked + 1):
        for other in range(asked + 1):
            rows = rows_of(4 * NATIVE, {2.0: 11.0, 4.0: 10.0})
            for scale, count in ((2.0, other), (4.0, reference)):
                where = {"metric": "retrieval", "window": 4 * NATIVE, "scale": scale}
                rows += [{**where, "value": count / asked, "n": asked}, {**where, "value": 1.0, "n": 1, "depth": 0.5}]
            expected = 2.0 if reference > 0 and other > reference + luck else 4.0
            assert best_scale(rows, 4 * NATIVE, NATIVE) == expected


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([(12, 3.7, None), (16, 3.8, None)], 12),
        ([(12, 3.7, 6), (14, 3.75, 18), (16, 3.8, 20)], 16),
        ([(12, 3.7, 20), (14, 3.75, 20), (16, 3.8, 20)], 16),
        ([(12, 3.7, 20), (14, 3.75, 20), (16, 3.8, 19)], 16),
        ([(12, 3.7, 20), (14, 3.75, 20), (16, 3.8, 18)], 12),
        ([(12, 3.7, 18), (14, 3.75, 20), (16, 3.8, 2)], 14),
        ([(12, 3.7, 0), (16, 3.8, 0)], 12),
        ([(12, 3.7, 0), (16, 3.8, 1)], 16),
        ([(12, 3.7, 20), (16, 3.8, 2), (20, 3.9, 20)], 20),
        ([(12, 3.9, 20), (16, 3.7, 2), (20, 3.8, 20)], 20),
        ([(12, 3.7, 20), (16, 3.8, 20), (20, 3.7, 20)], 20),
        ([(12, 3.7, 20), (16, 3.7, 20), (20, 3.7, 20)], 16),
        ([(12, 3.7, None), (16, 3.8, 20)], 16),
        ([(12, 3.9, 20), (14, 3.9, 20), (16, 3.8, 3)], 12),
    ],
)
def test_keys_come_before_perplexity(found: list[Any], best: float) -> None:
    """(scale, perplexity, keys of 20 or None where none were asked); a window of 16 native ones."""
    window = 16 * NATIVE
    rows = rows_of(window, {float(scale): perplexity for scale, perplexity, _ in found})
    for scale, _, keys in found:
        if keys is not None:
            rows.append({"metric": "retrieval", "window": window, "scale": float(scale), "value": keys / 20, "n": 20})
    assert best_scale(rows, window, NATIVE) == best
    assert best_scale(rows[::-1], window, NATIVE) == best, "in whatever order"


def test_asking_what_decides_gives_what_asking_everything_gives() -> None:
    saved = 0
    for seed in range(300):
        draw = random.Random(seed)
        window = draw.choice([2, 3, 5, 8, 12]) * NATIVE
        ratios = draw.sample([0.25, 0.5, 0.625, 0.75, 0.875, 1.0, 1.1, 1.25, 1.5], draw.randint(1, 6))
        scales = sorted({rounded(max(1.0, ratio * window / NATIVE)) for ratio in ratios})
        perplexities = {scale: draw.choice([4.9, 5.0, 5.1, 6.0]) for scale in scales}
        finds, prompts = drawn_model(draw, scales, window), draw.choice([1, 2, 8, 24, 50])
        best, asked = calibrated(window, perplexities, finds, prompts)
        rows = rows_of(window, perplexities)
        for scale in scales:
            rows += answered(scale, window, prompts, finds)
        assert next_scale(rows, window, NATIVE) is None
        assert best_scale(rows, window, NATIVE) == best, seed
        assert len(set(asked)) == len(asked) <= len(scales)
        saved += len(scales) - len(asked)
    assert saved > 300


def drawn_model(draw: random.Random, scales: list[float], window: int) -> Finds:
    share = {scale: draw.choice([0.0, 0.5, 0.9, 0.97, 1.0, 1.0]) for scale in scales}
    beyond, seed = draw.choice([0.0, 0.5, 1.0]), draw.random()

    def finds(scale: float, depth: float, index: int) -> bool:
        luck = random.Random(f"{seed} {scale} {depth} {index}").random()
        return luck < share[scale] * (1.0 if reaches(scale, depth, window) else beyond)

    return finds
