"""Scores of answers worked by hand, awkward ones among them."""

from __future__ import annotations

import pytest

from e2llm.evaluate.ruler.score import match_all, match_part


@pytest.mark.parametrize(
    ("answer", "expected", "share", "part"),
    [
        ("", ["12"], 0.0, 0.0),
        (" 12, 34 and 56.", ["12", "34", "56", "78"], 0.75, 1.0),
        ("12 12 12", ["12", "34"], 0.5, 1.0),
        ("the GRASS", ["Grass", "green"], 0.5, 1.0),
        ("a\x00b\tc", ["a\nb\nc"], 1.0, 1.0),
        ("1234567", ["12345"], 1.0, 1.0),  # a substring counts, as in RULER
        ("Île de Ré, 巴黎", ["巴黎", "île"], 1.0, 1.0),
        ("none of them", ["x"], 0.0, 0.0),
    ],
)
def test_by_hand(answer: str, expected: list[str], share: float, part: float) -> None:
    assert match_all(answer, expected) == share
    assert match_part(answer, expected) == part
