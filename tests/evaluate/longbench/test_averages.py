"""Overall figures: LongBench's own table (its README) and the E²-LLM paper's plain means are the independent source."""

from __future__ import annotations

import pytest

from e2llm.evaluate.longbench.averages import SETS, averages, missing
from e2llm.evaluate.longbench.tasks import TASKS

# LongBench's README, GPT-3.5-Turbo-16k: percent by task; the averages that it prints are EN 44.0 and ZH 44.5.
GPT = {
    "narrativeqa": 23.6, "qasper": 43.3, "multifieldqa_en": 52.3, "multifieldqa_zh": 61.2, "hotpotqa": 51.6,
    "2wikimqa": 37.7, "musique": 26.9, "dureader": 28.7, "gov_report": 29.5, "qmsum": 23.4, "multi_news": 26.7,
    "vcsum": 16.0, "trec": 68.0, "triviaqa": 91.4, "samsum": 41.7, "lsht": 29.2, "passage_count": 4.5,
    "passage_retrieval_en": 71.0, "passage_retrieval_zh": 77.5, "lcc": 54.7, "repobench-p": 53.6,
}  # fmt: skip


def by_name(scores: dict[str, list[float]]) -> dict[tuple[str, str], float]:
    return {(one.tasks, one.average): one.value for one in averages(scores)}


def test_the_published_macro_averages_come_out() -> None:
    found = by_name({task: [value / 100] * 3 for task, value in GPT.items()})
    assert 100 * found["en16", "macro"] == pytest.approx(44.0, abs=0.05)
    assert 100 * found["zh7", "macro"] == pytest.approx(44.5, abs=0.06)


def test_the_paper_prints_plain_means() -> None:
    """GPT-3.5-Turbo-16k there: EN 44.60, ZH 33.78, All 42.19, from the same cells with two digits more."""
    found = by_name({task: [value / 100] for task, value in GPT.items()})
    assert 100 * found["en14", "plain"] == pytest.approx(44.60, abs=0.05)
    assert 100 * found["zh4", "plain"] == pytest.approx(33.78, abs=0.05)
    assert 100 * found["all18", "plain"] == pytest.approx(42.19, abs=0.05)
    assert abs(found["all18", "macro"] - found["all18", "plain"]) > 0.001


def test_sets_are_those_of_the_tables() -> None:
    assert {name: len(tasks) for name, tasks in SETS.items()} == {
        "en14": 14, "zh4": 4, "all18": 18, "en16": 16, "zh7": 7, "all21": 21,
    }  # fmt: skip
    assert set(SETS["all18"]) == set(SETS["en14"]) | set(SETS["zh4"]) and len(TASKS) == len(GPT) == 21


def test_an_average_needs_its_whole_set() -> None:
    scores = {task: [value / 100] for task, value in GPT.items() if task != "lcc"}
    assert {name for name, _ in by_name(scores)} == {"zh4"}
    assert missing(scores)["all18"] == ["lcc"] and "zh4" not in missing(scores)


def test_n_counts_samples_and_the_interval_holds_the_value() -> None:
    scores = {task: [0.0, value / 100, min(1.0, value / 50)] for task, value in GPT.items()}
    for one in averages(scores):
        assert one.n == 3 * len(SETS[one.tasks])
        assert one.interval is not None and one.interval.low < one.value < one.interval.high
