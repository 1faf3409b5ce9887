"""The E²-LLM paper's Table 7: its short tasks among the harness', and the mean over them as rows.

Flows in: a run's rows, one a task, metric and filter. Flows out: rows `task: average`, where all of the list's tasks
were run, and the names of those that are missing. The paper does not say which accuracy it averages, so there is a mean
of each task's plain accuracy and one of the length-normalized ones where a task has them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from e2llm.intervals import Interval, interval_fields, interval_of_average
from e2llm.records import make_row

PAPER_TASKS = {
    "piqa": "PIQA",
    "wsc273": "WSC",
    "hellaswag": "HellaSwag",
    "social_iqa": "SIQA",
    "winogrande": "WinoGrande",
    "race": "RACE-H",
    "nq_open": "NaturalQuestions",
}
"""The harness' task -> its name in the paper's Table 7. RACE-M, the eighth, is not among the harness' tasks."""
SET = "table7"
"""Label `tasks` of an average over all of `PAPER_TASKS`."""
_PLAIN = ("acc", "exact_match", "em")
_CHOICES = {"acc": _PLAIN, "acc_norm": ("acc_norm", *_PLAIN)}
"""Label `harness_metric` of an average -> the harness' metrics, of which each task's first counts."""


def missing(tasks: Collection[str]) -> dict[str, list[str]]:
    """{"table7": [tasks that the average lacks]} where some of the list were run; {} where all or none were."""
    left_out = [name for name in PAPER_TASKS if name not in tasks]
    return {SET: left_out} if 0 < len(left_out) < len(PAPER_TASKS) else {}


def average_rows(rows: Iterable[Mapping[str, Any]], labels: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Means over the list's tasks of one scale's `rows`, each a mean of shares with n = all samples; [] unless every
    task is there. `labels` are those that the rows share.

    A second mean that takes the same numbers as the first is left out. No interval where a task has none.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {name: [] for name in PAPER_TASKS}
    for row in rows:
        if row["task"] in by_task and row["unit"] == "share":
            by_task[row["task"]].append(row)
    taken: list[list[Mapping[str, Any]]] = []
    found: list[dict[str, Any]] = []
    for metric, wanted in _CHOICES.items():
        chosen = [one for own in by_task.values() for one in _first(own, wanted)]
        if len(chosen) < len(PAPER_TASKS) or chosen in taken:
            continue
        taken.append(chosen)
        value = sum(one["value"] for one in chosen) / len(chosen)
        about = {**labels, "task": "average", "tasks": SET, "average": "plain", "harness_metric": metric}
        about["averaged"] = ", ".join(f"{one['task']} {one['harness_metric']} {one['filter']}" for one in chosen)
        n, spread = sum(one["n"] for one in chosen), interval_fields(_interval(chosen))
        found.append(make_row("average", value, "share", n, **about, **spread))
    return found


def _first(rows: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> list[Mapping[str, Any]]:
    """The row of the first wanted metric that a task has (its first filter's), or none."""
    return [row for metric in wanted for row in rows if row["harness_metric"] == metric][:1]


def _interval(rows: Sequence[Mapping[str, Any]]) -> Interval | None:
    if any("low" not in row for row in rows):
        return None
    ends = [Interval(row["low"], row["high"]) for row in rows]
    return interval_of_average([row["value"] for row in rows], ends, [1 / len(rows)] * len(rows))
