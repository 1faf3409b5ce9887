"""Scores of answers worked by hand, awkward ones among them, and of the harness' own RULER."""

from __future__ import annotations

import numpy as np
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


def test_shares_are_those_of_the_harness_ruler() -> None:
    """Random answers of RULER's own parts. Of several spellings the harness counts a share and RULER any: one here."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.ruler.common_utils import process_results, process_results_part

    random = np.random.default_rng(0)
    parts = ["12345", "GRASS", "grass", "Île", "巴黎", " ", "\n", "\t", "\x00", "a-b", "VAR1", "var", ".", ""]
    for _ in range(300):
        answer = "".join(random.choice(parts, random.integers(0, 12)))
        expected = [str(one) for one in random.choice([part for part in parts if part.strip()], random.integers(1, 5))]
        document = {"max_length": 4096, "outputs": expected}
        assert match_all(answer, expected) == process_results(document, [answer])["4096"]
        document["outputs"] = expected[:1]
        assert match_part(answer, expected[:1]) == process_results_part(document, [answer])["4096"]
