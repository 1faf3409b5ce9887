"""Short tasks through the EleutherAI harness: the E²-LLM paper's Table 7, a folder of YAML tasks, or any of its own.

Flows in: a `SuiteConfig`. Flows out: a Record with a row for each task, metric and scale, and every sample's score. A
task whose data is out of reach is named and left out, unless it was asked for by name. A finished (task, scale) is kept
in `OUT.partial.jsonl`. Of several processes each measures its share of the (task, scale)s: a task stays whole, so the
harness adds up as it always does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from e2llm.evaluate.measure import Results, described_model, fingerprint, model_labels
from e2llm.evaluate.paper_average import PAPER_TASKS, average_rows, missing
from e2llm.evaluate.partial import Finished
from e2llm.evaluate.ranks import Ranks, launched
from e2llm.evaluate.run import finish, load_engine
from e2llm.evaluate.short_texts import unwritable
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.evaluate.task_suites import MOST_REASONS, LeftOutWarning
from e2llm.evaluate.trained import beyond_trained
from e2llm.infer import Engine
from e2llm.intervals import DESCRIPTION, RESAMPLES, Interval, interval_fields, interval_of_mean, interval_of_statistic
from e2llm.records import SCORES, Record, check_out, make_row, portable
from e2llm.version import __version__

_METRICS = {"acc": "accuracy", "acc_norm": "accuracy", "exact_match": "accuracy", "em": "accuracy"}
"""The harness' metric -> ours; the row's label `harness_metric` tells them apart."""


_SLOW = ("bleu", "chrf", "chrfpp", "ter")
SLOW_RESAMPLES = 100
"""Resamples of metrics that compare whole corpora of text, as many as the harness itself takes of them."""


def run(config: SuiteConfig, *, progress: bool = True) -> Record:
    """Load tasks, then the model, measure at each scale, write the Record to `config.out`."""
    check_out(config.out)
    tasks, left_out = prepare(config)
    ranks = launched(config.device)
    engine = load_engine(config, ranks)
    partial = Path(f"{config.out}.partial.jsonl")
    record = evaluate_short(engine, tasks, config, left_out=left_out, partial=partial, progress=progress, ranks=ranks)
    finish(record, config.out, partial, ranks)
    return record


def prepare(config: SuiteConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """`load_tasks`, before weights are. ValueError where the harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"suite = 'short': {error.name} is not installed: pip install 'e2llm[lm-eval]'") from error
    return load_tasks(config)


def load_tasks(config: SuiteConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The harness' task objects by name (a group by its members), and task -> why it is left out.

    Named tasks have to load (ValueError); of the paper's list those that do not are left out. ValueError where none is
    left.
    """
    from lm_eval.tasks import TaskManager

    folder = None if config.tasks_folder == "hub" else config.tasks_folder
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"tasks_folder = {folder!r}: no such folder of the harness' YAML tasks")
    if folder is not None:
        _check_yaml(Path(folder))
    own = TaskManager(include_path=folder, include_defaults=False).all_subtasks if folder else []
    if folder and not own:
        raise ValueError(f"tasks_folder = {folder!r}: no YAML task of the harness there")
    names = config.tasks or tuple(own) or tuple(PAPER_TASKS)
    # Reading the harness' thousands of files takes a while: only where one of them is asked for.
    manager = TaskManager(include_path=folder, include_defaults=not set(names) <= set(own))
    found: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            found |= manager.load([name])["tasks"]
        except Exception as error:  # the harness and datasets raise whatever their readers raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if config.tasks or own:
                raise ValueError(f"tasks: {name} cannot be loaded: {reason}") from error
            left_out[name] = reason
            warnings.warn(f"short: {name} left out: {reason}", LeftOutWarning, stacklevel=2)
    if not found:
        raise ValueError(
            f"short: the data of none of {', '.join(names)} is in reach (first: {next(iter(left_out.values()))}); "
            "connect to the hub once, or name a folder of YAML tasks with --tasks-folder"
        )
    return found, left_out


def _check_yaml(folder: Path) -> None:
    """ValueError for a file that is no YAML: the harness passes over it without a word."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Knows the harness' tags, such as !function, by not asking what they are."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    for path in sorted(folder.rglob("*.yaml")):
        try:
            yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = " ".join(str(error).split())[:200]
            raise ValueError(f"tasks_folder = {str(folder)!r}: {path.name} is no YAML ({where}); mend it") from error


def evaluate_short(
    engine: Engine,
    tasks: Mapping[str, Any],
    config: SuiteConfig,
    *,
    left_out: Mapping[str, str] | None = None,
    partial: Path | None = None,
    progress: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008  a frozen value
) -> Record:
    """Measure a loaded model on loaded harness tasks, at every scale of `config` (none: chosen by request).

    Rows: one a task, metric and scale, and means over the paper's list where all of it was run. Requests that the
    model's window cut and samples that the tokenizer cannot write, which are left out, are counted, in rows and config,
    and warned about. ValueError where no sample is left.
    """
    import lm_eval

    labels = model_labels(engine, config.model, base_model=config.base_model, checkpoint=config.checkpoint)
    labels |= {"suite": "short", "seed": config.seed}
    done = Finished(partial, ranks.index)
    weights = fingerprint(engine)
    used: dict[str, dict[str, int]] = {}
    cut: dict[str, int] = {}
    skipped: dict[str, dict[str, Any]] = {}
    averages: list[dict[str, Any]] = []
    settings = [config.max_examples, config.seed, bool(config.chat), config.at_once]

    def measured(scale: float | None, name: str) -> dict[str, Any]:
        asked = [__version__, lm_eval.__version__, weights, labels, name, _identity(tasks[name]), scale, settings]
        asked.append("cuts and skipped ones counted")  # what an earlier version kept says nothing of them
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        found: Any = done.get(key)
        if found is None:
            found = _measure(engine, name, tasks[name], scale, config, labels, progress)
            done.add(key, {"task": name, "scale": scale}, found)
        return found  # type: ignore[no-any-return]

    parts = [(scale, name) for scale in config.scales or (None,) for name in tasks]
    results = ranks.share(parts, lambda own: [measured(scale, name) for scale, name in own])
    for (scale, name), found in zip(parts, results, strict=True):
        part = part_name(name, scale)
        used[part], cut[part] = found["requests_by_scale"], found["requests_cut"]
        if found["skipped"]:  # the same at every scale
            skipped[name] = {"count": len(found["skipped"]), "reasons": found["skipped"][:MOST_REASONS]}
    for scale in config.scales or (None,):
        own = [row for row in (row for found in results for row in found["rows"]) if row["scale"] == scale]
        averages += average_rows(own, {**labels, "scale": scale})
    if not any(found["rows"] for found in results):
        name, about = next(iter(skipped.items()))
        raise ValueError(f"short: no sample could be asked; first: {name}, {about['reasons'][0]}")
    if ranks.is_first:
        _warn_skipped(skipped)
        _warn_cut(cut, used)
    described = {
        **dataclasses.asdict(config),
        **described_model(engine, config.model, labels),
        "out": portable(config.out),
        "tasks_folder": portable(config.tasks_folder),
        "tasks": list(tasks),
        "windows": [],
        "scales": list(config.scales),
        "chat": bool(config.chat),
        "lm_eval": lm_eval.__version__,
        "interval": DESCRIPTION,
        "requests_by_scale": used,
        "requests_cut": cut,
        "tasks_without_data": dict(left_out or {}),
        "skipped": skipped,
        "averages_left_out": missing({row["task"] for found in results for row in found["rows"]}),
    }
    rows, examples = ([row for found in results for row in found[name]] for name in ("rows", "examples"))
    # Longer requests are cut to the scale's window, so that the scale alone says what lies outside.
    rows = [row | beyond_trained(engine, 0, row["scale"]) for row in rows + averages]
    return Record(kind="evaluate", config=described, rows=rows, examples=examples)


def part_name(task: str, scale: float | None) -> str:
    """A task at a scale, as the counts of a Record's config are keyed; None: chosen by request."""
    return f"{task}, scale {'chosen' if scale is None else format(scale, 'g')}"


def _warn_skipped(skipped: Mapping[str, Mapping[str, Any]]) -> None:
    """One line a task, with its first complaint."""
    for name, about in skipped.items():
        warnings.warn(
            f"short {name}: {about['count']} left out, the Record says which; first: {about['reasons'][0]}",
            LeftOutWarning,
            stacklevel=3,
        )


def _warn_cut(cut: Mapping[str, int], used: Mapping[str, Mapping[str, int]]) -> None:
    """One line that names every part in which requests were cut."""
    some = [f"{part}: {count} of {sum(used[part].values())}" for part, count in cut.items() if count]
    if some:
        warnings.warn(
            f"short: requests longer than the model's window lost their beginning; {'; '.join(some)}",
            LeftOutWarning,
            stacklevel=3,
        )


def _identity(task: Any) -> str:
    """Hash of a task's settings and documents, the same in every process; measuring sets its num_fewshot."""
    settings = {name: value for name, value in task.dump_config().items() if name != "num_fewshot"}
    text = json.dumps(settings, default=str, sort_keys=True)
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode())
    for document in task.eval_docs:
        digest.update(json.dumps(document, default=str, sort_keys=True).encode())
    return digest.hexdigest()


def _measure(
    engine: Engine,
    name: str,
    task: Any,
    scale: float | None,
    config: SuiteConfig,
    labels: Mapping[str, Any],
    shown: bool,
) -> dict[str, Any]:
    """Rows and examples of one task at one scale, and how many requests were read at which scale."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from e2llm.evaluate.harness import E2LM

    if shown:
        import sys

        print(part_name(name, scale), file=sys.stderr)
    lost = unwritable(task, engine.tokenizer, limit=config.max_examples, seed=config.seed)
    asked = [number for number in range(len(task.eval_docs))[: config.max_examples] if number not in lost]
    skipped = [f"sample {number}: {why}" for number, why in lost.items()]
    none: dict[str, Any] = {"requests_by_scale": {}, "requests_cut": 0, "skipped": skipped}
    if not asked:
        return {"rows": [], "examples": [], **none}
    model = E2LM(engine, scale=scale, batch_size=config.at_once)
    with _as_one_process():
        results = simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),  # by itself it would read thousands of task files again
            **({"samples": {name: asked}} if lost else {"limit": config.max_examples}),
            bootstrap_iters=0,
            apply_chat_template=bool(config.chat),
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
        )
    place = {**labels, "task": name, "scale": scale}
    counted = {"cut": model.requests_cut, "skipped": len(skipped)}
    found = _rows(results["results"][name], results["samples"][name], place, counted, task.aggregation())
    if not found["rows"]:
        raise ValueError(f"tasks: {name} gave no number: {results['results'][name]}")
    by_scale = {format(used, "g"): count for used, count in sorted(model.requests_by_scale.items())}
    counts = {"requests_by_scale": by_scale, "requests_cut": model.requests_cut}
    return {**found, **none, **counts}


@contextlib.contextmanager
def _as_one_process() -> Iterator[None]:
    """The harness without the launcher's variable: by LOCAL_RANK it returns a task's results in one process alone."""
    given = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if given is not None:
            os.environ["LOCAL_RANK"] = given


def _rows(
    values: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    place: Mapping[str, Any],
    counted: Mapping[str, int],
    aggregation: Mapping[str, Callable[[list[Any]], float]],
) -> Results:
    """One row a metric and filter, with what was `counted`; `values` is the harness' {"acc,none": 0.5,
    "acc_stderr,none": …}, `aggregation` what makes each of them of its samples."""
    rows: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    for key, value in values.items():
        name, _, kind = key.partition(",")
        if not kind or name.endswith("_stderr") or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        own = [sample for sample in samples if sample.get("filter", kind) == kind and name in sample]
        scores = [sample[name] for sample in own]
        metric = _METRICS.get(name, re.sub(r"[^a-z0-9_]+", "_", name.lower()).strip("_"))
        is_share = all(isinstance(score, int | float) and 0 <= score <= 1 for score in scores)
        is_mean = bool(scores) and is_share and abs(sum(scores) / len(scores) - value) < 1e-9
        if is_mean:
            spread = interval_fields(interval_of_mean(scores))
        else:
            spread = interval_fields(_interval_of_aggregate(aggregation.get(name), scores, value))
        unit = "share" if is_mean or metric in SCORES else "score"
        about = {**place, "harness_metric": name, "filter": kind}
        rows.append(make_row(metric, value, unit, max(1, len(scores)), **about, **counted, **spread))
        examples += [
            {
                "metric": metric,
                **about,
                "id": sample["doc_id"],
                "score": sample[name],
                "doc_hash": sample.get("doc_hash"),
            }
            for sample in own
        ]
    return {"rows": rows, "examples": examples}


def _interval_of_aggregate(
    aggregate: Callable[[list[Any]], float] | None, scores: Sequence[Any], value: float
) -> Interval | None:
    """The bootstrap over samples of a metric that is no mean of them (perplexity, F1), by the harness' own function;
    None where that does not give the harness' value. The harness has a standard error for some of these only."""
    if aggregate is None or len(scores) < 2 or not math.isclose(aggregate(list(scores)), value, rel_tol=1e-9):
        return None
    name = getattr(aggregate, "__name__", "")
    resamples = SLOW_RESAMPLES if name in _SLOW else RESAMPLES
    found = interval_of_statistic(
        len(scores), lambda drawn: aggregate([scores[i] for i in drawn]), resamples=resamples
    )
    # A draw may have no value, such as a correlation of answers that are all alike.
    return found if found is not None and math.isfinite(found.low) and math.isfinite(found.high) else None

