"""LongBench rows become samples as published; a row that cannot be asked or scored says why."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from e2llm.evaluate.longbench.prompts import PROMPTS
from e2llm.evaluate.longbench.tasks import TASKS, make_samples, score
from e2llm.evaluate.samples import Sample


def row(**fields: Any) -> dict[str, Any]:
    return {"input": "Who?", "context": "Bob {sang} \n\n{input}.", "answers": ["Bob"], "all_classes": None} | fields


def sample(task: str, **fields: Any) -> Sample:
    (found,) = make_samples(task, row(**fields), "1")
    return found


def test_prompts_are_rendered_once() -> None:
    """Braces in a context are text, not fields."""
    found = sample("hotpotqa")
    assert found.body.count("Bob {sang} \n\n{input}.") == 1 and found.body.endswith("Question: Who?\nAnswer:")
    assert found.cut == "middle" and found.answers == ("Bob",)


def test_lengths_templates_and_prompts_of_every_task() -> None:
    assert list(TASKS) == list(PROMPTS) and len(TASKS) == 21
    assert all(prompt.count("{context}") == 1 for prompt in PROMPTS.values())
    assert [task.max_new_tokens for task in TASKS.values()] == [
        128, 128, 64, 64, 32, 32, 32, 128, 512, 512, 512, 512, 64, 32, 128, 64, 32, 32, 32, 64, 64,
    ]  # fmt: skip
    assert {name for name, task in TASKS.items() if not task.chat} == {
        "trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p",
    }  # fmt: skip
    assert {name for name, task in TASKS.items() if task.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    assert {name for name, task in TASKS.items() if task.language == "zh"} == {
        "multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh",
    }  # fmt: skip


OFFICIAL = {
    "narrativeqa": "aada7ed24b06", "qasper": "0fbdd123fe7f", "multifieldqa_en": "20b4666a2de8",
    "multifieldqa_zh": "344b3a4e557c", "hotpotqa": "9ec4ae308865", "2wikimqa": "9ec4ae308865",
    "musique": "9ec4ae308865", "dureader": "ae53329f51b1", "gov_report": "91c25d585b18",
    "qmsum": "dca23b678fe0", "multi_news": "2af3f28c40b9", "vcsum": "3e5d8241bc9b",
    "trec": "0eff8bebdba9", "triviaqa": "00a802e6377e", "samsum": "a68d88423490",
    "lsht": "f3edabdf7fae", "passage_count": "986550b6c610", "passage_retrieval_en": "39b96b7fa52b",
    "passage_retrieval_zh": "c1e2346e245e", "lcc": "6a1f24cf0bb8", "repobench-p": "ee9ec182ea5f",
}  # fmt: skip
"""Beginning of the SHA-256 of each prompt in LongBench's own dataset2prompt.json, UTF-8."""


def test_every_prompt_is_longbenchs_to_the_letter() -> None:
    found = {name: hashlib.sha256(prompt.encode()).hexdigest()[:12] for name, prompt in PROMPTS.items()}
    assert found == OFFICIAL


def test_a_score_is_the_best_over_the_answers() -> None:
    two = sample("hotpotqa", answers=["Alice", "Bob Dylan"])
    assert score(two, "Bob").value == pytest.approx(2 / 3)
    assert score(two, "alice.").value == 1.0


def test_only_the_first_line_of_few_shot_answers_counts() -> None:
    trec = sample("trec", answers=["Date"], all_classes=["Date", "Food"])
    assert score(trec, "\n Date\nQuestion: …\nType: Food").value == 1.0
    assert score(sample("hotpotqa", answers=["Date"]), "x\nDate").value == pytest.approx(2 / 3)


def test_a_line_of_code_keeps_its_indentation() -> None:
    assert score(sample("lcc", answers=["    return x"]), "```\n    return x\n```").value == 1.0


@pytest.mark.parametrize(
    ("task", "fields", "complaint"),
    [
        ("hotpotqa", {"context": "  "}, "context is empty"),
        ("hotpotqa", {"context": None}, "context is NoneType"),
        ("hotpotqa", {"input": 3}, "input is int"),
        ("hotpotqa", {"answers": []}, r"answers = \[\]"),
        ("hotpotqa", {"answers": "Bob"}, "answers = Bob: a list of texts"),
        ("hotpotqa", {"answers": ["Bob", ""]}, "none of them empty"),
        ("trec", {"answers": ["Date"]}, "all_classes = None"),
        ("trec", {"answers": ["Date"], "all_classes": ["Food"]}, r"\['Date'\] are not among all_classes"),
        ("passage_retrieval_en", {"answers": ["the third"]}, "names no paragraph"),
    ],
)
def test_rows_that_cannot_be_used(task: str, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_samples(task, row(**fields), "1")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="context is missing"):
        make_samples("hotpotqa", {"input": "", "answers": ["x"]}, "1")
