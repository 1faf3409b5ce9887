"""One suite from samples to Record: every task × window × scale, asked through the engine that users run, resumable.

An answer is kept in `OUT.partial.jsonl` as soon as it is there, under a key made of the weights, the prompt's token
ids and the scale; a rerun after a stop asks what is missing. Scores are made from answers at the end, so they are
never stored apart from what they score. Of several processes each asks its share of every task.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from e2llm.evaluate.asking import Answered, Asker, Cell, Found
from e2llm.evaluate.batched import check_batches
from e2llm.evaluate.measure import described_model, model_labels
from e2llm.evaluate.partial import Finished
from e2llm.evaluate.progress import progress_bar
from e2llm.evaluate.prompting import Prompter
from e2llm.evaluate.ranks import Ranks, launched
from e2llm.evaluate.run import finish, load_engine, scale_of
from e2llm.evaluate.samples import Sample, Skipped
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.evaluate.task_suites import MOST_REASONS, SUITES, Data, Suite, load_data, warn_skipped
from e2llm.evaluate.trained import beyond_trained, has_range, largest_window
from e2llm.infer import Engine
from e2llm.intervals import DESCRIPTION, interval_fields, interval_of_mean
from e2llm.records import Record, check_out, make_row, portable

DEFAULT_WINDOWS = (8192,)


def run(config: SuiteConfig, *, progress: bool = True) -> Record:
    """Read the data, load the model, ask, write the Record to `config.out`."""
    check_out(config.out)
    suite = SUITES[config.suite]
    data = load_data(suite, config)
    ranks = launched(config.device)
    engine = load_engine(config, ranks)
    partial = Path(f"{config.out}.partial.jsonl")
    record = evaluate_suite(engine, suite, data, config, partial=partial, progress=progress, ranks=ranks)
    finish(record, config.out, partial, ranks)
    return record


def evaluate_suite(
    engine: Engine,
    suite: Suite,
    data: Data,
    config: SuiteConfig,
    *,
    partial: Path | None = None,
    progress: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008  a frozen value
) -> Record:
    """Ask a loaded model, `config.at_once` samples together. Rows: one a task, window and scale (n = samples scored),
    and averages of whole sets of tasks.

    Examples: every answer with its score. ValueError for a window outside the model's range, a missing chat template,
    and where no sample could be asked. With several `ranks` each process calls this and returns the whole Record.
    """
    cells = plan_cells(engine, config)
    meant_for_chat = any(sample.chat for samples in data.samples.values() for sample in samples)
    prompter = Prompter(engine.tokenizer, chat=config.chat is not False and meant_for_chat)
    if config.at_once > 1:
        check_batches(engine)
    asker = Asker(engine, prompter, Finished(partial, ranks.index), config.at_once)
    labels = model_labels(engine, config.model, base_model=config.base_model, checkpoint=config.checkpoint)
    labels |= {"suite": suite.name, "seed": config.seed}
    rows: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    skipped = list(data.skipped)
    passed = 0
    with progress_bar(progress and ranks.is_first) as bar:
        shown = bar.add_task(suite.name, total=data.num_samples * sum(cell.window for cell in cells))
        for cell in cells:
            own = labels | beyond_trained(engine, cell.window, cell.scale)
            scores: dict[str, list[float]] = {}
            for task, samples in data.samples.items():
                bar.update(shown, description=f"{task} {cell}")
                advance = functools.partial(bar.advance, shown, cell.window * ranks.count)
                found, refused = _asked(asker, samples, cell, ranks, advance)
                passed += len(samples) * cell.window
                bar.update(shown, completed=passed)  # exactly: shares are estimates
                skipped += refused
                left_out = sum(one.task == task for one in data.skipped) + len(refused)
                task_rows, task_examples, scores[task] = _scored(suite, task, cell, found, own, left_out)
                rows += task_rows
                examples += task_examples
            rows += _averages(suite, cell, scores, own)
    if not rows:
        raise ValueError(f"{suite.name}: no sample could be asked; first: {skipped[0].identity}: {skipped[0].reason}")
    if ranks.is_first:
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
    largest = largest_window(engine)
    # A foreign model under a method has no trained range.
    if (method == "none" or has_range(engine)) and windows[-1] > largest:
        raise ValueError(
            f"windows = {windows}: {windows[-1]} is above the model's range ({largest} tokens); leave it out, or name "
            "--scales to measure it all the same"
        )
    if config.scale_per_request:
        return [Cell(window, None) for window in windows]
    return [Cell(window, 1.0 if method == "none" else scale_of(engine, window)) for window in windows]


def _asked(
    asker: Asker, samples: Sequence[Sample], cell: Cell, ranks: Ranks, advance: Callable[[], None]
) -> tuple[list[Answered], list[Skipped]]:
    """Samples that were answered, and those that no prompt can be made for; each process asks its share."""

    def ask(own: list[Sample]) -> list[Found | str]:
        return asker(own, cell, advance)

    found: list[Answered] = []
    refused: list[Skipped] = []
    for sample, one in zip(samples, ranks.share(samples, ask), strict=True):
        if isinstance(one, str):
            refused.append(Skipped(sample.task, f"{sample.identity}, window {cell.window}", one))
        else:
            found.append(Answered(sample, *one))
    return found, refused


def _scored(
    suite: Suite, task: str, cell: Cell, answers: Sequence[Answered], labels: dict[str, Any], skipped: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[float]]:
    """Rows (none without an answer), examples and scores of one task."""
    about = suite.tasks[task]
    place = {"task": task, "language": about.language, "window": cell.window, "scale": cell.scale}
    scores = [suite.score(one.sample, one.answer) for one in answers]
    examples = [
        {
            "metric": about.metric, "suite": suite.name, **place, "scale": one.asked.scale, "id": one.sample.identity,
            "seed": labels["seed"], "prompt_tokens": one.asked.prompt_tokens, "cut_tokens": one.asked.cut_tokens,
            "prompt_sha256": one.asked.prompt_sha256, "chat": one.asked.through_template, "answer": one.answer,
            "new_tokens": one.new_tokens, "finish_reason": one.finish_reason, "score": score.value,
            "guessed": score.guessed,
        }
        for one, score in zip(answers, scores, strict=True)
    ]  # fmt: skip
    values = [score.value for score in scores]
    if not values:
        return [], [], []
    counts = {
        "skipped": skipped,
        "cut": sum(one.asked.cut_tokens > 0 for one in answers),
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
            task: {"count": len(reasons), "reasons": reasons[:MOST_REASONS]} for task, reasons in left_out.items()
        },
        "averages_left_out": suite.missing({task: [0.0] for task in data.samples}),
    }
