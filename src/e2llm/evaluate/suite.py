"""One suite from samples to Record: every task × window × scale, asked through the engine that users run, resumable.

An answer is kept in `OUT.partial.jsonl` as soon as it is there, under a key made of the weights, the prompt's token
ids and the scale; a rerun after a stop asks what is missing. Scores are made from answers at the end, so they are
never stored apart from what they score.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2llm.evaluate.measure import described_model, fingerprint, model_labels
from e2llm.evaluate.partial import Finished
from e2llm.evaluate.progress import progress_bar
from e2llm.evaluate.prompting import Prompt, Prompter
from e2llm.evaluate.run import scale_of
from e2llm.evaluate.samples import Sample, Skipped
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.evaluate.task_suites import SUITES, Data, Suite, load_data, warn_skipped
from e2llm.infer import Engine, RequestPlan
from e2llm.intervals import DESCRIPTION, interval_fields, interval_of_mean
from e2llm.records import Record, make_row, portable
from e2llm.version import __version__

DEFAULT_WINDOWS = (8192,)
_MOST_REASONS = 20
"""Reasons a task that are written out in a Record; all are counted."""


@dataclass(frozen=True)
class Cell:
    """One column of a table: a window read at a scale; None: each prompt at its own."""

    window: int
    scale: float | None

    def __str__(self) -> str:
        return f"window {self.window} " + ("each at its own scale" if self.scale is None else f"scale {self.scale:g}")


@dataclass(frozen=True)
class Answered:
    """One sample with what the model wrote."""

    sample: Sample
    prompt: Prompt
    scale: float
    answer: str
    new_tokens: int
    finish_reason: str


def run(config: SuiteConfig, *, progress: bool = True) -> Record:
    """Read the data, load the model, ask, write the Record to `config.out`."""
    suite = SUITES[config.suite]
    data = load_data(suite, config)
    engine = Engine.load(
        config.model,
        method=config.method,
        dtype=config.dtype,
        device=config.device,
        attn_implementation=config.attn_implementation,
    )
    partial = Path(f"{config.out}.partial.jsonl")
    record = evaluate_suite(engine, suite, data, config, partial=partial, progress=progress)
    record.save(config.out)
    partial.unlink(missing_ok=True)
    return record


def evaluate_suite(
    engine: Engine,
    suite: Suite,
    data: Data,
    config: SuiteConfig,
    *,
    partial: Path | None = None,
    progress: bool = False,
) -> Record:
    """Ask a loaded model. Rows: one a task, window and scale (n = samples scored), and averages of whole sets of tasks.

    Examples: every answer with its score. ValueError for a window outside the model's range, a missing chat template,
    and where no sample could be asked.
    """
    cells = plan_cells(engine, config)
    meant_for_chat = any(sample.chat for samples in data.samples.values() for sample in samples)
    prompter = Prompter(engine.tokenizer, chat=config.chat is not False and meant_for_chat)
    asker = _Asker(engine, prompter, Finished(partial))
    labels = model_labels(engine, config.model, base_model=config.base_model, checkpoint=config.checkpoint)
    labels |= {"suite": suite.name, "seed": config.seed}
    num_samples = sum(map(len, data.samples.values()))
    rows: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    skipped = list(data.skipped)
    with progress_bar(progress) as bar:
        shown = bar.add_task(suite.name, total=num_samples * sum(cell.window for cell in cells))
        for cell in cells:
            scores: dict[str, list[float]] = {}
            for task, samples in data.samples.items():
                bar.update(shown, description=f"{task} {cell}")
                found: list[Answered] = []
                left_out = sum(one.task == task for one in data.skipped)
                for sample in samples:
                    try:
                        found.append(asker(sample, cell))
                    except Unaskable as error:
                        left_out += 1
                        skipped.append(Skipped(task, f"{sample.identity}, window {cell.window}", str(error)))
                    bar.advance(shown, cell.window)
                task_rows, task_examples, scores[task] = _scored(suite, task, cell, found, labels, left_out)
                rows += task_rows
                examples += task_examples
            rows += _averages(suite, cell, scores, labels)
    if not rows:
        raise ValueError(f"{suite.name}: no sample could be asked; first: {skipped[0].identity}: {skipped[0].reason}")
    warn_skipped(suite.name, skipped[len(data.skipped) :])
    described = _described(engine, suite, data, config, cells, skipped, labels)
    return Record(kind="evaluate", config=described, rows=rows, examples=examples)


def plan_cells(engine: Engine, config: SuiteConfig) -> list[Cell]:
    """Windows and scales to measure. ValueError for a scale that the method does not have, and for a window outside
    what the checkpoint was trained for unless its scale is named: a score there should be asked for on purpose."""
    method = engine.extension.method
    if method == "none" and any(scale != 1 for scale in config.scales):
        raise ValueError(f"scales = {list(config.scales)}: method none has no scale but 1; leave scales out")
    windows = sorted(config.windows or DEFAULT_WINDOWS)
    if config.scales:
        return [Cell(window, float(scale)) for window in windows for scale in config.scales]
    largest = engine.native_window if method == "none" else int(engine.native_window * engine.max_scale)
    known = method == "none" or engine.info is not None  # a foreign model under a method has no trained range
    if known and windows[-1] > largest:
        raise ValueError(
            f"windows = {windows}: {windows[-1]} is above the model's range ({largest} tokens); leave it out, or name "
            "--scales to measure it all the same"
        )
    if config.scale_per_request:
        return [Cell(window, None) for window in windows]
    return [Cell(window, 1.0 if method == "none" else scale_of(engine, window)) for window in windows]


class Unaskable(ValueError):
    """A sample for which no prompt can be made."""


class _Asker:
    """Asks one sample at a time and remembers answers in the file of finished parts."""

    def __init__(self, engine: Engine, prompter: Prompter, done: Finished) -> None:
        self.engine, self.prompter, self.done = engine, prompter, done
        self._weights = fingerprint(engine)

    def __call__(self, sample: Sample, cell: Cell) -> Answered:
        try:
            prompt = self.prompter.prompt(sample, cell.window - sample.max_new_tokens)
        except ValueError as error:
            raise Unaskable(str(error)) from error
        length = len(prompt.token_ids)
        if cell.scale is None:
            plan = self.engine.plan(length, max_new_tokens=sample.max_new_tokens)
        else:
            plan = RequestPlan(cell.scale, cell.window, sample.max_new_tokens)
        asked = [__version__, self._weights, plan.scale, plan.max_new_tokens, prompt.token_ids]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        result = self.done.get(key)
        if result is None:
            completion = self.engine.complete(prompt.token_ids, plan)
            result = {
                "answer": completion.text,
                "new_tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            self.done.add(key, {"task": sample.task, "sample": sample.identity, "window": cell.window}, result)
        return Answered(sample, prompt, plan.scale, **result)


def _scored(
    suite: Suite, task: str, cell: Cell, answers: Sequence[Answered], labels: dict[str, Any], skipped: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[float]]:
    """Rows (none without an answer), examples and scores of one task."""
    about = suite.tasks[task]
    place = {"task": task, "language": about.language, "window": cell.window, "scale": cell.scale}
    scores = [suite.score(one.sample, one.answer) for one in answers]
    examples = [
        {
            "metric": about.metric, "suite": suite.name, **place, "scale": one.scale, "id": one.sample.identity,
            "seed": labels["seed"], "prompt_tokens": len(one.prompt.token_ids), "cut_tokens": one.prompt.cut_tokens,
            "prompt_sha256": hashlib.sha256(json.dumps(one.prompt.token_ids).encode()).hexdigest()[:16],
            "chat": one.prompt.through_template, "answer": one.answer, "new_tokens": one.new_tokens,
            "finish_reason": one.finish_reason, "score": score.value, "guessed": score.guessed,
        }
        for one, score in zip(answers, scores, strict=True)
    ]  # fmt: skip
    values = [score.value for score in scores]
    if not values:
        return [], [], []
    counts = {
        "skipped": skipped,
        "cut": sum(one.prompt.cut_tokens > 0 for one in answers),
        "guessed": sum(score.guessed for score in scores),
    }
    spread = interval_fields(interval_of_mean(values))
    mean = sum(values) / len(values)
    row = make_row(about.metric, mean, "share", len(values), **labels, **place, **counts, **spread)
    return [row], examples, values


def _averages(suite: Suite, cell: Cell, scores: dict[str, list[float]], labels: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        make_row(
            "average", one.value, "share", one.n, **labels, window=cell.window, scale=cell.scale, tasks=one.tasks,
            average=one.average, **interval_fields(one.interval),
        )
        for one in suite.averages(scores)
    ]  # fmt: skip


def _described(
    engine: Engine,
    suite: Suite,
    data: Data,
    config: SuiteConfig,
    cells: Sequence[Cell],
    skipped: Sequence[Skipped],
    labels: dict[str, Any],
) -> dict[str, Any]:
    """The resolved configuration as it is written down: paths shortened, defaults filled in, what was left out."""
    left_out: dict[str, list[str]] = defaultdict(list)
    for one in skipped:
        left_out[one.task].append(f"{one.identity}: {one.reason}")
    return {
        **dataclasses.asdict(config),
        **described_model(engine, config.model, labels),
        "out": portable(config.out),
        "tasks_folder": portable(config.tasks_folder) if data.source == "hub" else data.source,
        "windows": sorted({cell.window for cell in cells}),
        "scales": list(config.scales),
        "tasks": list(data.samples),
        "chat_template": getattr(engine.tokenizer, "chat_template", None) is not None,
        "interval": DESCRIPTION,
        "tasks_without_data": list(data.absent),
        "skipped": {
            task: {"count": len(reasons), "reasons": reasons[:_MOST_REASONS]} for task, reasons in left_out.items()
        },
        "averages_left_out": suite.missing({task: [0.0] for task in data.samples}),
    }
