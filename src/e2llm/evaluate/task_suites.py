"""Suites of tasks that are asked in text: one table row each, and where their data comes from.

Flows in: a suite's name, tasks, a folder or the hub. Flows out: `Data`: samples by task, what was left out and why.
A row here is all that a new suite needs besides its module.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from e2llm.evaluate import leval
from e2llm.evaluate.longbench import averages as longbench_averages
from e2llm.evaluate.longbench import tasks as longbench
from e2llm.evaluate.samples import Sample, Score, Skipped, open_source, read_samples
from e2llm.evaluate.suite_config import SuiteConfig

MOST_REASONS = 20
"""Reasons a task that are written out in a Record; all are counted."""


class LeftOutWarning(UserWarning):
    """Rows, samples or tasks were left out; the Record counts them."""


class TaskLabels(Protocol):
    """What a suite's table says of a task."""

    @property
    def metric(self) -> str: ...
    @property
    def language(self) -> str: ...


@dataclass(frozen=True)
class Suite:
    """One suite."""

    name: str
    tasks: Mapping[str, TaskLabels]
    make_samples: Callable[[str, Mapping[str, Any], str], Sequence[Sample]]
    score: Callable[[Sample, str], Score]
    prepare: Callable[[list[str]], None]
    """Raises where scoring these tasks needs a package that is missing."""
    hub: str
    """Dataset on the hub."""
    hub_file: Callable[[str], str]
    """File of that dataset that holds a task."""
    averages: Callable[[Mapping[str, Sequence[float]]], list[longbench_averages.Average]] = lambda scores: []
    missing: Callable[[Mapping[str, Sequence[float]]], dict[str, list[str]]] = lambda scores: {}


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "longbench",
            longbench.TASKS,
            longbench.make_samples,
            longbench.score,
            longbench.prepare,
            hub="THUDM/LongBench",
            hub_file=lambda task: "data.zip",
            averages=longbench_averages.averages,
            missing=longbench_averages.missing,
        ),
        Suite(
            "leval",
            leval.TASKS,
            leval.make_samples,
            leval.score,
            leval.prepare,
            hub="L4NLP/LEval",
            hub_file=lambda task: f"LEval/Exam/{task}.jsonl",
        ),
    )
}


@dataclass(frozen=True)
class Data:
    """Samples of a run."""

    source: str
    samples: Mapping[str, Sequence[Sample]]
    """Task -> samples; only tasks that have some."""
    skipped: Sequence[Skipped]
    absent: Sequence[str]
    """Tasks of the suite that the source does not have, or has no row of."""

    @property
    def num_samples(self) -> int:
        return sum(map(len, self.samples.values()))


def load_data(suite: Suite, config: SuiteConfig) -> Data:
    """Read the tasks that `config` names (all that are there, where it names none).

    ValueError for a task that does not exist or was named and is not there, and where nothing usable is found. Rows
    left out are warned about and kept.
    """
    _check_names(suite, config.tasks)
    source = open_source(config.tasks_folder, lambda task: _from_hub(suite, task), lambda task: f"{task}.jsonl")
    samples: dict[str, Sequence[Sample]] = {}
    skipped: list[Skipped] = []
    absent: list[str] = []
    for task in config.tasks or suite.tasks:
        found = read_samples(source, task, suite.make_samples)
        if found is None or found == ([], []):  # an empty file has as little to ask as a missing one
            absent.append(task)
            continue
        if found[0]:
            samples[task] = _drawn(found[0], config)
        skipped += found[1]
    if config.tasks and absent:
        files = ", ".join(f"{task}.jsonl" for task in absent)
        raise ValueError(f"tasks_folder = {source.name!r}: no {files} there, or no row in it")
    if not samples:
        reason = f"; files such as {next(iter(suite.tasks))}.jsonl are expected in it, or in its folder data"
        if skipped:
            reason = f"; first complaint: {skipped[0].task}, {skipped[0].identity}: {skipped[0].reason}"
        raise ValueError(f"tasks_folder = {source.name!r}: no usable sample of {suite.name} there{reason}")
    suite.prepare(list(samples))
    if absent:
        warnings.warn(f"{suite.name}: no data for {', '.join(absent)}", LeftOutWarning, stacklevel=2)
    warn_skipped(suite.name, skipped)
    return Data(source.name, samples, skipped, absent)


def warn_skipped(suite: str, skipped: Sequence[Skipped]) -> None:
    """One warning a task, with its first complaint."""
    for task in dict.fromkeys(one.task for one in skipped):
        own = [one for one in skipped if one.task == task]
        warnings.warn(
            f"{suite} {task}: {len(own)} left out, the Record says which; first: {own[0].identity}: {own[0].reason}",
            LeftOutWarning,
            stacklevel=3,
        )


def _check_names(suite: Suite, tasks: Sequence[str]) -> None:
    for task in tasks:
        if task not in suite.tasks:
            close = difflib.get_close_matches(task, suite.tasks, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"its tasks: {', '.join(suite.tasks)}"
            raise ValueError(f"tasks: {suite.name} has no {task!r}; {hint}")


def _drawn(samples: Sequence[Sample], config: SuiteConfig) -> Sequence[Sample]:
    """`max_examples` of the samples, in their order."""
    if config.max_examples is None or config.max_examples >= len(samples):
        return samples
    chosen = np.random.default_rng([config.seed, len(samples)]).permutation(len(samples))[: config.max_examples]
    return [samples[index] for index in sorted(chosen.tolist())]


def _from_hub(suite: Suite, task: str) -> Path:
    from huggingface_hub import hf_hub_download

    name = suite.hub_file(task)
    try:
        return Path(hf_hub_download(suite.hub, name, repo_type="dataset"))
    except (OSError, ValueError) as error:  # no connection, offline mode, no such file
        raise ValueError(
            f"tasks_folder = 'hub': {name} of {suite.hub} cannot be had ({type(error).__name__}); download it "
            "elsewhere and give the folder"
        ) from error
