"""Metrics against scores made by the packages that LongBench was published with (tests/goldens/make_longbench.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e2llm.evaluate.longbench import metrics
from e2llm.evaluate.longbench.rouge import rouge_l

GOLDENS = json.loads((Path(__file__).parents[2] / "goldens" / "longbench.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("metric", sorted({row["metric"] for row in GOLDENS}))
def test_scores_equal_the_goldens(metric: str) -> None:
    rows = [row for row in GOLDENS if row["metric"] == metric]
    assert len(rows) >= 30 and any(0 < row["score"] < 1 for row in rows)
    for row in rows:
        score = getattr(metrics, metric)(row["prediction"], row["reference"], row["classes"])
        assert score == pytest.approx(row["score"], abs=1e-12), row


def test_long_sentences_are_scored() -> None:
    """The `rouge` package fails on these by recursion, and LongBench's script makes that a 0."""
    words = " ".join(f"w{i}" for i in range(1500))
    assert rouge_l(words, words) == pytest.approx(1.0, abs=1e-6)


def test_first_line_as_published() -> None:
    assert metrics.first_line("\n\n Other location\nQuestion: next") == " Other location"
    assert metrics.first_line("") == ""


def test_a_reference_without_a_paragraph_is_refused() -> None:
    with pytest.raises(ValueError, match="names no paragraph"):
        metrics.retrieval("Paragraph 3", "the third one")
