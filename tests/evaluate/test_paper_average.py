"""The mean over the paper's short tasks: by hand, only when all were run, by either accuracy."""

from __future__ import annotations

import math
from typing import Any

import pytest

from e2llm.evaluate.paper_average import PAPER_TASKS, average_rows, missing
from e2llm.records import make_row
from e2llm.report.quoted import SHORT_AVERAGED

NAMES = list(PAPER_TASKS)


def row(task: str, value: float, metric: str = "acc", unit: str = "share", **labels: Any) -> dict[str, Any]:
    own = {"scale": 2.0, "harness_metric": metric, "filter": "none", "low": value - 0.07, "high": value + 0.14}
    return make_row("accuracy", value, unit, 100, **(own | {"task": task} | labels))


def seven() -> list[dict[str, Any]]:
    """Values 0.1 … 0.7, the last task by exact match; hellaswag, the third, also normalized at 0.65."""
    rows = [row(name, (i + 1) / 10, "exact_match" if name == "nq_open" else "acc") for i, name in enumerate(NAMES)]
    return [*rows, row("hellaswag", 0.65, "acc_norm"), row("other", 0.85)]


def test_both_accuracies_by_hand() -> None:
    plain, normalized = average_rows(seven(), {"scale": 2.0, "suite": "short"})
    assert plain["value"] == pytest.approx(2.8 / 7) and normalized["value"] == pytest.approx((2.8 + 0.35) / 7)
    assert [one["harness_metric"] for one in (plain, normalized)] == ["acc", "acc_norm"]
    assert all((one["metric"], one["task"], one["n"], one["scale"]) == ("average", "average", 700, 2.0)
               for one in (plain, normalized))  # fmt: skip
    # Seven equal distances put together: each a seventh, their squares added.
    assert plain["value"] - plain["low"] == pytest.approx(0.07 / math.sqrt(7))
    assert plain["high"] - plain["value"] == pytest.approx(0.14 / math.sqrt(7))
    assert "hellaswag acc none" in plain["averaged"] and "hellaswag acc_norm none" in normalized["averaged"]
    assert "nq_open exact_match none" in normalized["averaged"]


def test_a_mean_that_takes_the_same_numbers_is_not_written_twice() -> None:
    rows = [one for one in seven() if one["harness_metric"] != "acc_norm"]
    assert len(average_rows(rows, {})) == 1


@pytest.mark.parametrize("lost", NAMES)
def test_no_average_unless_all_were_run(lost: str) -> None:
    assert average_rows([one for one in seven() if one["task"] != lost], {}) == []
    assert missing([name for name in NAMES if name != lost]) == {"table7": [lost]}


def test_a_score_that_is_no_share_is_not_averaged_and_no_interval_is_made_up() -> None:
    rows = [row("piqa", 0.1, unit="score") if one["task"] == "piqa" else one for one in seven()]
    assert average_rows(rows, {}) == []
    rows = [{k: v for k, v in one.items() if k not in ("low", "high")} if one["task"] == "race" else one
            for one in seven()]  # fmt: skip
    assert all("low" not in one and "high" not in one for one in average_rows(rows, {}))


def test_missing_tasks_are_named_where_some_were_run() -> None:
    assert missing([*NAMES, "other"]) == {} and missing(["other"]) == {}
    assert missing(["piqa", "race", "other"]) == {"table7": [n for n in NAMES if n not in ("piqa", "race")]}


def test_the_report_knows_the_same_list() -> None:
    assert tuple(NAMES) == SHORT_AVERAGED
