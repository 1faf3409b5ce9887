"""Wordings of planted codes: any words, one place each for name and value, never the evaluation's, mostly new."""

import re

import pytest

from e2llm.data.synthetic import Draw, fill
from e2llm.data.synthetic_codes import QUOTES, asks, pairs, plant_codes, statements
from e2llm.data.synthetic_wordings import ASKS, MADE_UP, STATEMENTS, ask, label, statement

COUNT = 3000
NAME, VALUE = "«name»", "«value»"


@pytest.mark.parametrize("make", [statement, ask])
def test_one_place_for_the_name_and_one_for_the_value(make) -> None:
    for i in range(COUNT):
        filled = fill(make(Draw(1, i)), NAME, VALUE)
        assert filled.count(NAME) == filled.count(VALUE) == 1, filled
        assert make is statement or filled.index(NAME) < filled.index(VALUE), filled


@pytest.mark.parametrize(("make", "fixed", "least"), [(statement, STATEMENTS, 0.4), (ask, ASKS, 0.95)])
def test_made_up_wordings_are_mostly_new(make, fixed, least) -> None:
    """The share that is made up, and how much of it stands there once: a question has two labels, marks and an end."""
    found = [one for i in range(COUNT) if (one := make(Draw(2, i))) not in fixed]
    assert len(found) / COUNT == pytest.approx(MADE_UP, abs=0.06)
    assert len(set(found)) / len(found) > least


def test_labels_hold_none_of_the_evaluations_words() -> None:
    draw = Draw(3)
    draw.words = ["key", "value", "corresponding", "pass", "specified", "extract", "keys", "values"]
    found = " ".join(label(draw) for _ in range(COUNT)).lower()
    assert not re.search(r"\b(keys?|values?|corresponding|pass|specified|extract)\b", found.replace("_", " "))


def test_mostly_quotes_do_not_tell_names_from_values() -> None:
    """Of sets with quotes: what stands around names stands around values, but for double quotes, never around both."""
    same = quoted = 0
    for i in range(COUNT):
        draw = Draw(4, i)
        (name, value), *_ = facts = pairs(draw, 6)
        text = "\n".join(statements(draw, facts))
        around = [next(((a, b) for a, b in (*QUOTES, ('"', '"')) if a and f"{a}{one}{b}" in text), None)
                  for one in (name, value)]
        quoted += any(around)
        same += any(around) and around[0] == around[1]
        assert not (around[0] == around[1] == ('"', '"'))
    assert same / quoted > 0.5, "without the rule one in nine"


def test_half_of_the_questions_stand_alone() -> None:
    host = [f"line {i} of an ordinary text" for i in range(300)]
    places = []
    for i in range(400):
        lines = [line for line in plant_codes(5, i, "\n".join(host)).split("\n") if line]
        kinds = "".join("h" if line in host else "f" for line in lines[lines.index(host[150]) :])  # no statements there
        assert kinds.endswith("f"), "a question ends the text"
        places.append(len(re.findall("h+f+", kinds)))
    assert 0.4 < sum(n > 2 for n in places) / 400 < 0.6, "together: midway and at the end"
    assert max(places) >= 8


def test_questions_are_worded_apart_from_their_statements() -> None:
    """Of one set hardly a question repeats the statement's line: then going on as that line did would answer it."""
    repeated = total = 0
    for i in range(600):
        draw = Draw(6, i)
        facts = pairs(draw, 6)
        stated = "\n".join(statements(draw, facts))
        asked = asks(draw, facts)
        repeated += sum(line in stated for line in asked)
        total += len(asked)
    assert repeated / total < 0.03
