"""The 21 tasks of LongBench as one table: group, language, metric, answer length, chat template or not.

Lengths are those of config/dataset2maxlen.json, the rest of pred.py and eval.py of LongBench (arXiv 2308.14508).
Flows in: one row of a task's file. Flows out: a `Sample`, or a ValueError that says what is wrong with the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from e2llm.evaluate.longbench import metrics
from e2llm.evaluate.longbench.prompts import PROMPTS
from e2llm.evaluate.longbench.words import segmenter
from e2llm.evaluate.samples import Sample, Score, text_field, text_list


@dataclass(frozen=True)
class Task:
    """One task. Few-shot and code tasks go on a given text: no chat template there."""

    name: str
    group: str
    language: str
    """Of question and answer; code counts as English, as in the E²-LLM paper's tables."""
    metric: str
    """Metric as it stands in Records."""
    score: metrics.Metric
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False
    """Only the first line of the answer is scored."""


def _table() -> dict[str, Task]:
    few: dict[str, Any] = {"group": "few_shot", "chat": False, "first_line": True}
    code: dict[str, Any] = {
        "group": "code", "metric": "edit_similarity", "score": metrics.edit_similarity, "chat": False,
    }  # fmt: skip
    one, many, summary, made = "single_document_qa", "multi_document_qa", "summarization", "synthetic"
    f1, rouge, accuracy = "f1", "rouge_l", "accuracy"
    tasks = (
        Task("narrativeqa", one, "en", f1, metrics.qa_f1, 128),
        Task("qasper", one, "en", f1, metrics.qa_f1, 128),
        Task("multifieldqa_en", one, "en", f1, metrics.qa_f1, 64),
        Task("multifieldqa_zh", one, "zh", f1, metrics.qa_f1_zh, 64),
        Task("hotpotqa", many, "en", f1, metrics.qa_f1, 32),
        Task("2wikimqa", many, "en", f1, metrics.qa_f1, 32),
        Task("musique", many, "en", f1, metrics.qa_f1, 32),
        Task("dureader", many, "zh", rouge, metrics.rouge_zh, 128),
        Task("gov_report", summary, "en", rouge, metrics.rouge, 512),
        Task("qmsum", summary, "en", rouge, metrics.rouge, 512),
        Task("multi_news", summary, "en", rouge, metrics.rouge, 512),
        Task("vcsum", summary, "zh", rouge, metrics.rouge_zh, 512),
        Task("trec", language="en", metric=accuracy, score=metrics.classification, max_new_tokens=64, **few),
        Task("triviaqa", language="en", metric=f1, score=metrics.qa_f1, max_new_tokens=32, **few),
        Task("samsum", language="en", metric=rouge, score=metrics.rouge, max_new_tokens=128, **few),
        Task("lsht", language="zh", metric=accuracy, score=metrics.classification, max_new_tokens=64, **few),
        Task("passage_count", made, "en", accuracy, metrics.count, 32),
        Task("passage_retrieval_en", made, "en", accuracy, metrics.retrieval, 32),
        Task("passage_retrieval_zh", made, "zh", accuracy, metrics.retrieval, 32),
        Task("lcc", language="en", max_new_tokens=64, **code),
        Task("repobench-p", language="en", max_new_tokens=64, **code),
    )
    return {task.name: task for task in tasks}


TASKS = _table()
"""Task -> what it is, in LongBench's order."""


def make_samples(name: str, row: Mapping[str, Any], identity: str) -> list[Sample]:
    """The one sample of a row: context, input, answers, all_classes. ValueError for what cannot be asked or scored."""
    task = TASKS[name]
    context, question = text_field(row, "context"), text_field(row, "input", empty=True)
    answers = text_list(row, "answers")
    classes = text_list(row, "all_classes") if task.score is metrics.classification else ()
    unknown = [answer for answer in answers if answer not in classes] if classes else []
    if unknown:
        raise ValueError(f"answers {unknown} are not among all_classes")
    if task.score is metrics.retrieval:
        for answer in answers:
            metrics.paragraph_number(answer)
    return [
        Sample(
            task=name,
            identity=identity,
            body=PROMPTS[name].format(context=context, input=question),
            cut="middle",
            answers=answers,
            classes=classes,
            chat=task.chat,
            max_new_tokens=task.max_new_tokens,
        )
    ]


def score(sample: Sample, prediction: str) -> Score:
    """Best score over a sample's answers."""
    task = TASKS[sample.task]
    scored = metrics.first_line(prediction) if task.first_line else prediction
    return Score(max(task.score(scored, answer, sample.classes) for answer in sample.answers))


def prepare(tasks: list[str]) -> None:
    """Raise before anything is read where a metric needs a package that is missing."""
    if any(TASKS[name].score in (metrics.qa_f1_zh, metrics.rouge_zh) for name in tasks):
        segmenter()
