"""Keys decide first, then perplexity; asking only what decides comes to the answer that asking everything does."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from e2llm.evaluate.config import WHOLE_TEXT, depths_label
from e2llm.evaluate.scale_rule import KEYS_FOR_ONE, Question, best_scale, key_parts, next_question, rounded

NATIVE = 8192
Finds = Callable[[float, float, int], bool]
"""(scale, depth, index of the prompt) -> whether the key is found."""


def rows_of(window: int, perplexities: dict[float, float]) -> list[dict[str, Any]]:
    return [
        {"metric": "perplexity", "window": window, "scale": scale, "value": value, "n": 100}
        for scale, value in perplexities.items()
    ]


def answered(question: Question, window: int, prompts: int, finds: Finds) -> list[dict[str, Any]]:
    """Rows of one question as an evaluation writes them."""
    low, high = question.depths
    depths = [low + (high - low) * (i % 10 + 0.5) / 10 for i in range(prompts)]
    right = sum(finds(question.scale, depth, i) for i, depth in enumerate(depths))
    label = {"depths": depths_label(question.depths)} if depths_label(question.depths) else {}
    where = {"metric": "retrieval", "window": window, "scale": question.scale, **label}
    return [{**where, "value": right / prompts, "n": prompts}, {**where, "value": 1.0, "n": 1, "depth": 0.5}]


def calibrated(
    window: int, perplexities: dict[float, float], finds: Finds, prompts: int = 24
) -> tuple[float, dict[float, int]]:
    """The scale taken when one question after the other is asked, and how many keys were asked at each."""
    rows, asked = rows_of(window, perplexities), dict.fromkeys(perplexities, 0)
    rows += rows_of(2 * window, {1.0: 1.0})  # another window says nothing
    parts = key_parts(list(perplexities), window, NATIVE, prompts) if prompts else {}
    while question := next_question(rows, window, NATIVE, tuple(parts)):
        asked[question.scale] += parts[question.depths]
        rows += answered(question, window, parts[question.depths], finds)
    return best_scale(rows, window, NATIVE), asked


def reaches(scale: float, depth: float, window: int) -> bool:
    return depth >= 1 - scale * NATIVE / window - 1e-9


def measured_model(window: int) -> Finds:
    """SmolLM2-135M: three of four keys are found beyond a scale's reach, all within."""
    return lambda scale, depth, index: reaches(scale, depth, window) or index % 4 != 3


@pytest.mark.parametrize("window", [65_536, 131_072])
def test_a_scale_that_loses_the_beginning_is_not_taken_for_its_perplexity(window: int) -> None:
    covering = window / NATIVE
    perplexities = {ratio * covering: 5 * factor for ratio, factor in
                    ((0.5, 2.0), (0.625, 1.3), (0.75, 1.02), (0.875, 0.995), (1.0, 1.0), (1.25, 1.01))}  # fmt: skip
    best, asked = calibrated(window, perplexities, measured_model(window))
    assert best == covering
    # The smaller one loses keys in the part that decides, and no more are asked there; the others could not be taken.
    expected = {0.875 * covering: 12, covering: 24}
    assert {scale: count for scale, count in asked.items() if count} == expected
    best, asked = calibrated(window, perplexities, lambda scale, depth, index: True)
    assert best == 0.875 * covering, "a model that reads beyond what it was trained on may"
    assert sum(asked.values()) == 48
    unasked = calibrated(window, perplexities, measured_model(window), prompts=0)
    assert unasked == (0.875 * covering, dict.fromkeys(perplexities, 0)), "without keys perplexity alone"
    best, asked = calibrated(window, perplexities, lambda scale, depth, index: False)
    assert best == 0.875 * covering, "where nothing is found, perplexity alone"
    assert {scale for scale, count in asked.items() if count} == {covering, 1.25 * covering}


def test_the_half_that_decides_stands_where_smaller_scales_do_not_reach() -> None:
    ratios = (0.5, 0.75, 0.875, 1.0, 1.25)
    assert key_parts([8 * ratio for ratio in ratios], 65_536, NATIVE, 24) == {(0.0, 0.125): 12, WHOLE_TEXT: 12}
    assert key_parts([6.0, 8.0], 65_536, NATIVE, 9) == {(0.0, 0.25): 5, WHOLE_TEXT: 4}
    assert key_parts([8.0, 10.0], 65_536, NATIVE, 24) == {WHOLE_TEXT: 24}, "all cover the window"
    assert key_parts([1.0, 2.0], 16_384, NATIVE, 10) == {(0.0, 0.5): 5, WHOLE_TEXT: 5}
    assert key_parts([4.0, 6.0], 65_536, NATIVE, 24) == {(0.0, 0.5): 12, WHOLE_TEXT: 12}, "the largest stands for them"
    for window in range(9_000, 200_000, 777):  # scales have three digits: the covering one may be a little too small
        adequate = window / NATIVE
        scales = [rounded(ratio * adequate) for ratio in ratios]
        (low, high), whole = key_parts(scales, window, NATIVE, 24)
        assert whole == WHOLE_TEXT and low == 0 and high == pytest.approx(0.125, abs=0.01)
        for scale in (scale for scale in scales if scale < rounded(adequate)):
            assert not reaches(scale, high - 1e-3, window)


def found_by(reference: int, other: int, asked: int) -> float:
    """Best of scale 2 and the covering 4, which find so many of the keys; 2 has the lower perplexity."""
    rows = rows_of(4 * NATIVE, {2.0: 9.0, 4.0: 10.0})
    for scale, count in ((2.0, other), (4.0, reference)):
        where = {"metric": "retrieval", "window": 4 * NATIVE, "scale": scale}
        rows += [{**where, "value": count / asked, "n": asked}, {**where, "value": 1.0, "n": 1, "depth": 0.5}]
    return best_scale(rows, 4 * NATIVE, NATIVE)


@pytest.mark.parametrize("asked", [1, 2, 5, 11, 12, 23, 24, 60, 100])
def test_one_key_of_twelve_is_luck(asked: int) -> None:
    forgiven = asked // KEYS_FOR_ONE
    for reference in range(asked + 1):
        for other in range(asked + 1):
            assert found_by(reference, other, asked) == (2.0 if other >= reference - forgiven else 4.0)


def test_the_figures_of_the_allowance() -> None:
    """What the docstring of KEYS_FOR_ONE says, from the binomial distribution."""

    def at_least(least: int, n: int, share: float) -> float:
        return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(least, n + 1))

    good, bad = 0.98, 0.74
    assert [round(1 - at_least(n - 1 - (n > 12), n, good), 2) for n in (12, 24)] == [0.02, 0.01]
    assert [round(at_least(n - 1 - (n > 12), n, bad), 2) for n in (12, 24)] == [0.14, 0.03]
    assert [round(at_least(least, 5, bad), 2) for least in (4, 5)] == [0.61, 0.22]


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([(12, 3.7, None), (16, 3.8, None)], 12),
        ([(12, 3.7, 6), (14, 3.75, 18), (16, 3.8, 20)], 16),
        ([(12, 3.7, 6), (14, 3.75, 19), (16, 3.8, 20)], 14),
        ([(12, 3.7, 0), (16, 3.8, 0)], 12),
        ([(12, 3.7, 0), (16, 3.8, 1)], 12),
        ([(12, 3.7, 20), (16, 3.8, 2), (20, 3.9, 20)], 12),
        ([(12, 3.9, 20), (16, 3.7, 2), (20, 3.8, 20)], 20),
        ([(12, 3.7, None), (16, 3.8, 20)], 16),
        ([(12, 3.7, 20), (14, 3.7, 20), (16, 3.8, 20)], 12),
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
        finds, prompts = drawn_model(draw, scales, window), draw.choice([2, 8, 24, 50])
        best, asked = calibrated(window, perplexities, finds, prompts)
        rows, parts = rows_of(window, perplexities), key_parts(scales, window, NATIVE, prompts)
        for scale in scales:
            for depths, count in parts.items():
                rows += answered(Question(scale, depths), window, count, finds)
        assert next_question(rows, window, NATIVE, tuple(parts)) is None
        assert best_scale(rows, window, NATIVE) == best, seed
        assert max(asked.values()) <= prompts
        saved += len(scales) * prompts - sum(asked.values())
    assert saved > 0


def drawn_model(draw: random.Random, scales: list[float], window: int) -> Finds:
    share = {scale: draw.choice([0.0, 0.5, 0.9, 0.97, 1.0, 1.0]) for scale in scales}
    beyond, seed = draw.choice([0.0, 0.5, 1.0]), draw.random()

    def finds(scale: float, depth: float, index: int) -> bool:
        luck = random.Random(f"{seed} {scale} {depth} {index}").random()
        return luck < share[scale] * (1.0 if reaches(scale, depth, window) else beyond)

    return finds
