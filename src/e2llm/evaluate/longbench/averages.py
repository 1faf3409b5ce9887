"""LongBench's overall figures: means over fixed sets of tasks, plain and over groups.

Flows in: scores by task. Flows out: averages with their confidence intervals. An average is made only of a whole set:
a mean over other tasks is another quantity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from e2llm.evaluate.longbench.tasks import TASKS, Task
from e2llm.intervals import Interval, interval_of_average, interval_of_mean


def _choose(*languages: str, synthetic: bool) -> tuple[str, ...]:
    return tuple(t.name for t in TASKS.values() if t.language in languages and (synthetic or t.group != "synthetic"))


_CODE = tuple(task.name for task in TASKS.values() if task.group == "code")
SETS: dict[str, tuple[str, ...]] = {
    "en14": _choose("en", synthetic=False),
    "zh4": _choose("zh", synthetic=False),
    "all18": _choose("en", "zh", synthetic=False),
    "en16": _choose("en", synthetic=True),
    "zh7": (*_choose("zh", synthetic=True), *_CODE),
    "all21": tuple(TASKS),
}
"""Name -> tasks. en14, zh4, all18: the E²-LLM paper's tables (code counted as English, nothing synthetic). en16, zh7:
LongBench's own tables, whose Chinese average holds the code tasks too. all21: everything."""
AVERAGES = ("plain", "macro")
"""plain: mean over tasks (what the E²-LLM paper prints); macro: mean over groups of the mean in each (LongBench)."""


@dataclass(frozen=True)
class Average:
    """One overall figure."""

    tasks: str
    """Key of SETS."""
    average: str
    """plain or macro."""
    value: float
    n: int
    """Samples of all its tasks together."""
    interval: Interval


def averages(scores: Mapping[str, Sequence[float]]) -> list[Average]:
    """Averages of every set whose tasks all have scores; `scores`: task -> a score a sample, 0 to 1."""
    found = []
    for name, tasks in SETS.items():
        if not all(scores.get(task) for task in tasks):
            continue
        groups = [scores[task] for task in tasks]
        means = [sum(group) / len(group) for group in groups]
        spread = [one for group in groups if (one := interval_of_mean(group)) is not None]
        for average in AVERAGES:
            weights = [_weight(TASKS[task], tasks, average) for task in tasks]
            value = sum(w * mean for w, mean in zip(weights, means, strict=True))
            n = sum(map(len, groups))
            # Weights sum to 1 up to rounding: no mean may leave the range of its scores by that.
            found.append(Average(name, average, min(1.0, value), n, interval_of_average(means, spread, weights)))
    return found


def missing(scores: Mapping[str, Sequence[float]]) -> dict[str, list[str]]:
    """Set -> its tasks without scores, of the sets that get no average."""
    lacking: dict[str, list[str]] = defaultdict(list)
    for name, tasks in SETS.items():
        lacking[name] += [task for task in tasks if not scores.get(task)]
    return {name: tasks for name, tasks in lacking.items() if tasks}


def _weight(task: Task, tasks: Sequence[str], average: str) -> float:
    if average == "plain":
        return 1 / len(tasks)
    groups = [TASKS[name].group for name in tasks]
    return 1 / (len(set(groups)) * groups.count(task.group))
