"""Needles in real text: a map of length × depth, one needle or many.

`needle`: one sentence at each depth from the beginning to the end in even steps, as in the needle-in-a-haystack maps
that users know. `multi_needle`: several of them spread over the whole text, all asked for together; each one counts
for its own depth. Names are words of the text, values numbers of seven digits.
"""

from __future__ import annotations

import numpy as np

from e2llm.evaluate.questions import Draft, Kind, Texts
from e2llm.evaluate.ruler.needles import hide
from e2llm.evaluate.ruler.words import distinct, name_drawer, number

DEPTHS = 11
"""Depths of the single needle: 0, 10 %, …, 100 %."""
NUM_NEEDLES = 5
"""Needles of one multi-needle question."""

INTRODUCTION = "Read the text below. Some secret numbers are mentioned in it; I will ask for them at the end.\n\n"
NEEDLE = "The secret number of {name} is {value}."
QUESTION = "\n\nWhat {are} the secret {numbers} of {names}?"
ANSWER = " The secret {numbers} of {names} {are}"


def single(texts: Texts, random: np.random.Generator, window: int, index: int) -> Draft:
    """One needle at the depth whose turn it is."""
    return _draft(texts, random, index, [index % DEPTHS / (DEPTHS - 1)])


def several(texts: Texts, random: np.random.Generator, window: int, index: int) -> Draft:
    """Needles one in each equal part of the text."""
    return _draft(texts, random, index, [(i + float(random.random())) / NUM_NEEDLES for i in range(NUM_NEEDLES)])


def _draft(texts: Texts, random: np.random.Generator, index: int, depths: list[float]) -> Draft:
    names = distinct(random, name_drawer(texts.words), len(depths))
    values = distinct(random, number, len(depths))
    needles = [NEEDLE.format(name=name, value=value) for name, value in zip(names, values, strict=True)]
    context = texts.context(random, index)
    order = [int(i) for i in random.permutation(len(names))]  # asked for in another order than they stand in
    asked = [names[i] for i in order]
    one = len(names) == 1
    wording = {
        "names": asked[0] if one else ", ".join(asked[:-1]) + " and " + asked[-1],
        "numbers": "number" if one else "numbers",
        "are": "is" if one else "are",
    }
    return Draft(
        body=lambda size: INTRODUCTION + hide(context(size), needles, depths) + QUESTION.format(**wording),
        answer_start=ANSWER.format(**wording),
        expected=tuple(values[i] for i in order),
        most=len(texts.running(index)),
        depths=tuple(depths[i] for i in order),
        source=texts.documents[index % len(texts.documents)].name,
    )


def depth_bin(kind: str, depth: float) -> float:
    """The depth that a row is reported at: as asked for one needle, the middle of its part for several."""
    return round(depth, 3) if kind == "needle" else (min(int(depth * NUM_NEEDLES), NUM_NEEDLES - 1) + 0.5) / NUM_NEEDLES


_WORDING = INTRODUCTION + "{context}" + QUESTION + ANSWER + f" [{NEEDLE}]"
NEEDLE_MAPS = {
    "needle": Kind(name="needle", make=single, answer_tokens=24, suite="needle", metric="retrieval", wording=_WORDING),
    "multi_needle": Kind(
        name="multi_needle",
        make=several,
        answer_tokens=24 * NUM_NEEDLES,
        suite="needle",
        metric="retrieval",
        wording=_WORDING,
    ),
}
