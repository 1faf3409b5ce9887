"""Draws against the distributions written out by hand, and independence of who else is in the batch."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from e2llm.engine.request import Sampling
from e2llm.engine.sampling import draw

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]


def by_hand(*, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> dict[int, float]:
    """Token -> probability, in plain Python."""
    weights = {i: math.exp(x / temperature) for i, x in enumerate(LOGITS)}
    ranked = sorted(weights, key=lambda i: -weights[i])
    kept = ranked[:top_k] if top_k else ranked
    total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if mass < top_p * total:
            nucleus.append(i)
        mass += weights[i]
    kept = [i for i in nucleus if weights[i] >= min_p * weights[ranked[0]]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 3},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 2.0, "top_p": 0.7, "top_k": 5, "min_p": 0.3},
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(settings: dict[str, Any]) -> None:
    expected, count = by_hand(**settings), 20_000
    source = random.Random(0)
    drawn = draw(torch.tensor([LOGITS] * count), [Sampling(**settings)] * count, [source] * count)
    found = Counter(one.token for one in drawn if one is not None)
    assert found.keys() <= expected.keys()
    for token, probability in expected.items():
        assert abs(found[token] / count - probability) < 5 * math.sqrt(probability * (1 - probability) / count) + 1e-9


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 5e-324}, {"min_p": 1.0}, {"temperature": 1e-30}, {"temperature": 0.0}],
    ids=str,
)
def test_settings_that_leave_one_token(settings: dict[str, Any]) -> None:
    samplings = [Sampling(**({"temperature": 100.0} | settings))] * 50
    source = random.Random(0)
    assert {one.token for one in draw(torch.tensor([LOGITS] * 50), samplings, [source] * 50) if one} == {0}


def test_a_draw_does_not_depend_on_its_company() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 500, generator=generator) * 3
    kinds = [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(),
        Sampling(temperature=1, top_k=9),
    ]
    samplings = [kinds[row % 4] for row in range(12)]
    together = draw(logits, samplings, [random.Random(row) for row in range(12)])
    order = random.Random(3).sample(range(12), 12)
    shuffled = draw(logits[order], [samplings[row] for row in order], [random.Random(row) for row in order])
    for place, row in enumerate(order):
        alone = draw(logits[row : row + 1], [samplings[row]], [random.Random(row)])
        assert together[row] == alone[0] == shuffled[place]


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.tensor([LOGITS, LOGITS, LOGITS])
    samplings = [Sampling(temperature=5.0, logprobs=3), Sampling(), Sampling(logprobs=0)]
    first, second, third = draw(logits, samplings, [random.Random(0)] * 3)
    total = math.log(sum(map(math.exp, LOGITS)))
    assert first is not None and second is not None and third is not None
    assert second.logprob is None and third.logprob is not None and third.logprob.top == ()
    assert first.logprob is not None and first.logprob.logprob == pytest.approx(LOGITS[first.token] - total)
    assert [token for token, _ in first.logprob.top] == [0, 1, 2]
    assert [p for _, p in first.logprob.top] == pytest.approx([x - total for x in LOGITS[:3]])
    assert third.logprob.logprob == pytest.approx(2.0 - total)


def test_more_alternatives_than_tokens() -> None:
    (one,) = draw(torch.tensor([LOGITS]), [Sampling(logprobs=20)], [random.Random(0)])
    assert one is not None and one.logprob is not None and len(one.logprob.top) == len(LOGITS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(bad: float) -> None:
    logits = torch.tensor([LOGITS, LOGITS, [float("-inf"), *LOGITS[1:]]])
    logits[0, 3] = bad
    samplings = [Sampling(temperature=1.0, logprobs=1), Sampling(logprobs=1), Sampling(temperature=1.0)]
    first, second, third = draw(logits, samplings, [random.Random(0)] * 3)
    assert first is None and second is not None and second.token == 0
    assert third is not None and third.token != 0, "a token may be ruled out"
