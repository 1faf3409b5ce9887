"""One evaluation from configuration to Record: corpus × protocol × window × scale, resumable, with a progress bar.

A finished part (one such combination) is kept in `OUT.partial.jsonl` under a key made of the weights, the text and
every setting that it depends on, and so is every answer and document of the part in progress; a rerun after a stop
computes what is missing. The file goes when the Record is written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from e2llm.evaluate.batched import check_batches
from e2llm.evaluate.config import LOSSES, EvaluateConfig
from e2llm.evaluate.context import Part
from e2llm.evaluate.documents import Document, document_files, load_documents
from e2llm.evaluate.loss_rows import check_key_model
from e2llm.evaluate.measure import Measurement
from e2llm.evaluate.partial import Finished, remove
from e2llm.evaluate.perplexity import sliding_steps
from e2llm.evaluate.progress import progress_bar
from e2llm.evaluate.protocols import further
from e2llm.evaluate.ranks import Ranks, launched
from e2llm.evaluate.retrieval import check_facts, prompt_maker
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.evaluate.tasks import TASKS
from e2llm.evaluate.trained import beyond_trained, check_windows_trained
from e2llm.infer import Engine
from e2llm.positions.choose import choose_scale
from e2llm.records import Record, check_out


def run(config: EvaluateConfig, *, progress: bool = True) -> Record:
    """Load what `config` names, measure, write the Record to `config.out`."""
    check_named(config)
    check_files(config)
    ranks = launched(config.device)
    engine = load_engine(config, ranks)
    if not config.scales:
        check_windows_trained(engine, config.windows)
    corpora = load_corpora(config, engine)
    partial = Path(f"{config.out}.partial.jsonl")
    record = evaluate(engine, corpora, config, partial=partial, progress=progress, ranks=ranks)
    finish(record, config.out, partial, ranks)
    return record


def finish(record: Record, out: str, partial: Path, ranks: Ranks) -> None:
    """The first process writes the Record; the files of finished parts go."""
    ranks.wait()
    if ranks.is_first:
        record.save(out)
        remove(partial)
    ranks.wait()


def check_named(config: EvaluateConfig) -> None:
    """Raise ValueError unless a model and a corpus are named."""
    if not config.model:
        raise ValueError("model = '': name a checkpoint folder, hub name or .gguf file")
    if not config.corpora:
        raise ValueError("corpora = {}: give at least one LABEL=PATH")


def check_files(config: EvaluateConfig) -> None:
    """What can be known of the named files before weights are read: that texts are there, that questions are well
    formed, that the key model's name is one, that the Record can be written. ValueError naming the field."""
    check_out(config.out)
    for label, path in config.corpora.items():
        try:
            document_files(path)
        except ValueError as error:
            raise ValueError(f"corpora.{label} = {error}") from error
    further(config)
    if config.key_model:
        check_key_model(config.key_model)


def load_engine(config: EvaluateConfig | SuiteConfig, ranks: Ranks = Ranks()) -> Engine:  # noqa: B008  a frozen value
    """The model that `config` names, with its method."""
    return Engine.load(
        config.model,
        method=config.method,
        neighbours=config.neighbours,
        dtype=config.dtype,
        device=ranks.device or config.device,
        attn_implementation=config.attn_implementation,
    )


def load_corpora(config: EvaluateConfig, engine: Engine) -> dict[str, list[Document]]:
    """Label -> documents, as long as the largest window."""
    return {
        label: load_documents(
            path, engine.tokenizer, num_tokens=max(config.windows), max_documents=config.max_documents
        )
        for label, path in config.corpora.items()
    }


def evaluate(
    engine: Engine,
    corpora: Mapping[str, Sequence[Document]],
    config: EvaluateConfig,
    *,
    windows: Sequence[int] = (),
    partial: Path | None = None,
    progress: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008  a frozen value
) -> Record:
    """Measure a loaded model on loaded documents. Of `config`, what names files or loads the model is only reported.
    `windows`: those of `config.windows` that are measured now; () is all.

    Documents must reach max(config.windows) tokens. Rows: perplexity (n = tokens scored) and retrieval (n = prompts;
    over all depths, and by depth); those outside the checkpoint's trained range have the label `beyond_trained`.
    Examples: nats and tokens of every document, every pass-key prompt with its answer. With several `ranks` each
    process calls this, measures its share and returns the whole Record.
    """
    parts = plan_parts(engine, corpora, config, windows=windows)
    done = Finished(partial, ranks.index)
    measure = Measurement(engine, corpora, config, ranks, done)
    bar = progress_bar(progress and ranks.is_first)
    rows: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    passed = 0.0
    with bar:
        task = bar.add_task("evaluate", total=sum(_cost(part, corpora, config) for part in parts))
        for part in parts:
            bar.update(task, description=str(part))
            key = measure.key(part)
            found = ranks.from_first(done.get(key))
            if found is None:
                weight = _cost_per_token(part.window) * ranks.count
                found = measure(part, functools.partial(_advance, bar, task, weight))
                if ranks.is_first:
                    done.add(key, dataclasses.asdict(part), found)
            passed += _cost(part, corpora, config)
            bar.update(task, completed=passed)  # exactly: shares are estimates
            rows += [row | beyond_trained(engine, part.window, part.scale) for row in found["rows"]]
            examples += found["examples"]
    return Record(kind="evaluate", config=measure.described(), rows=rows, examples=examples)


def _advance(bar: Progress, task: TaskID, weight: float, tokens: int) -> None:
    bar.advance(task, tokens * weight)


def plan_parts(
    engine: Engine,
    corpora: Mapping[str, Sequence[Document]],
    config: EvaluateConfig,
    *,
    windows: Sequence[int] = (),
) -> list[Part]:
    """Every combination to measure, checked before the first forward pass: text long enough, prompts that fit, windows
    that the checkpoint was trained for unless `config.scales` names their scale. `windows`: as in `evaluate`."""
    if not corpora:
        raise ValueError("corpora = {}: give at least one")
    method = engine.extension.method
    if method == "none" and any(scale != 1 for scale in config.scales):
        raise ValueError(f"scales = {list(config.scales)}: method none has no scale but 1; leave scales out")
    measured = [window for window in sorted(config.windows) if not windows or window in windows]
    if measured and not config.scales:
        check_windows_trained(engine, measured)
    for label, documents in corpora.items():
        short = [d.name for d in documents if len(d.tokens) < max(config.windows)]
        if short or not documents:
            raise ValueError(
                f"corpora.{label}: {short or 'no documents'} shorter than the largest window {max(config.windows)}"
            )
    for name in TASKS.keys() & set(config.protocols):
        documents = next(iter(corpora.values()))
        asked: dict[str, Any] = {"seed": config.seed, "chat": config.chat, "task": TASKS[name]}
        prompt_maker(engine.tokenizer, documents, window=min(config.windows), **asked)(0)
        for window in config.windows:
            check_facts(engine.tokenizer, window=window, num_prompts=config.prompts, **asked)
    if config.batch_size > 1 and set(config.protocols) - {*LOSSES, "attention"}:
        check_batches(engine)
    known = further(config)
    for name in [name for name in config.protocols if name in known]:
        for documents in corpora.values():
            known[name].check(engine, documents, config)
    if "sliding" in config.protocols and config.stride >= min(config.windows):
        raise ValueError(f"stride = {config.stride}: use less than the smallest window ({min(config.windows)})")
    return [
        Part(label, protocol, window, float(scale))
        for label in corpora
        for protocol in config.protocols
        for window in measured
        for scale in ((1.0,) if method == "none" else config.scales or (scale_of(engine, window),))
    ]


def scale_of(engine: Engine, window: int) -> float:
    """Scale at which a window is measured when none is named: the calibrated one, else max(1, window / L)."""
    if not engine.extension.schedule:
        return max(1.0, window / engine.native_window)
    schedule = engine.extension.schedule
    return choose_scale(window, engine.native_window, max_scale=engine.max_scale, schedule=schedule).scale


def _cost_per_token(window: int) -> float:
    """Work a token, relative: attention grows with the window and passes the rest near 16k on a small model."""
    return 1 + window / 16_384


def _cost(part: Part, corpora: Mapping[str, Sequence[Document]], config: EvaluateConfig) -> float:
    """Work of a part in the unit of `_cost_per_token` times tokens."""
    documents, length = len(corpora[part.corpus]), max(config.windows)
    if part.protocol in TASKS:
        tokens = config.prompts * part.window
    elif part.protocol in (known := further(config)):
        tokens = known[part.protocol].tokens(config, documents, part.window)
    elif part.protocol == "whole":
        tokens = documents * length
    else:
        steps = sliding_steps(part.window, length, config.stride, config.max_strides)
        tokens = documents * sum(step.end - step.start for step in steps)
    return tokens * _cost_per_token(part.window)
