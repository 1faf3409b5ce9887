"""Which scale reads a window best: measured on text, written into the checkpoint's e2llm.json.

Flows in: a loaded checkpoint, long documents that no result is reported on. Flows out: a Record of perplexity and pass
keys over (window, scale) and the schedule made of each window's best. The ladder's g = window / L is the smallest scale
at which no position lies outside what training drew. Perplexity alone misleads: most tokens need nothing from far
away, and a smaller scale, at which far keys are lost, often has the lowest loss. Hence both are asked, keys only where
the answer could decide (`scale_rule`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.documents import Document, load_documents
from e2llm.evaluate.ranks import Ranks, launched
from e2llm.evaluate.run import check_files, evaluate, finish, plan_parts
from e2llm.evaluate.scale_rule import best_scale, next_scale, rounded
from e2llm.infer import Engine
from e2llm.positions.choose import Schedule, Step, ladder
from e2llm.records import Record

RATIOS = (0.5, 0.625, 0.75, 0.875, 1.0, 1.25)
"""Scales tried for a window, as shares of window / L."""


@dataclass(frozen=True)
class Calibration:
    """What was found."""

    schedule: Schedule
    record: Record
    """kind `calibrate`: perplexity by window, scale and corpus; pass keys of the first corpus by window and scale,
    where they were asked. Its config says what was chosen."""


def calibrate(
    engine: Engine,
    corpora: Mapping[str, Sequence[Document]],
    config: EvaluateConfig,
    *,
    windows: Sequence[int] = (),
    ratios: Sequence[float] = RATIOS,
    prompts: int = 0,
    partial: Path | None = None,
    progress: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008  a frozen value
) -> Calibration:
    """Measure every window at every ratio * window / L and keep the best: the scale that finds the most pass keys of
    those that cover the window, by the lowest nats a token over all corpora together where several find as many; a
    smaller one where it finds clearly more, or where nothing is found (`scale_rule.best_scale`).

    `prompts`: pass keys asked at a scale, the same ones at each, in the first corpus's documents. They are asked at
    scales that cover the window first, at others where those miss some. 0 goes by perplexity alone, which often
    chooses a scale that loses what stands far away.

    `windows`: longer than the native one, which keeps scale 1 (the model as it was); () for the ladder's up to
    max_scale * L that the documents reach. The ladder's windows between those that were measured get scales between
    theirs (`between`). `config` carries labels and what is written into the Record. With several `ranks` each process
    calls this and goes by the first one's questions. Raises ValueError for windows that are not longer than L, ratios
    that are not positive, documents that are too short, and keys that cannot be asked.
    """
    windows = sorted(windows) or _ladder_windows(engine, corpora)
    _check(engine, corpora, windows, ratios, prompts)
    first = dict(list(corpora.items())[:1])
    readings = {window: _reading(engine, config, window, ratios) for window in windows}
    asking = {
        window: dataclasses.replace(reading, protocols=("pass_key",), prompts=prompts)
        for window, reading in readings.items()
        if prompts
    }
    for window in asking:  # keys that cannot be asked are refused before anything is read
        plan_parts(engine, _cut(first, window), asking[window])
    common: dict[str, Any] = {"partial": partial, "progress": progress, "ranks": ranks}
    records: list[Record] = []
    for window in windows:
        read = evaluate(engine, _cut(corpora, window), readings[window], **common)
        records.append(read)
        while prompts and (scale := ranks.from_first(next_scale(_rows(records), window, engine.native_window))):
            keys = dataclasses.replace(asking[window], scales=(scale,))
            records.append(evaluate(engine, _cut(first, window), keys, **common))
    rows = _rows(records)
    best = [Step(window, best_scale(rows, window, engine.native_window)) for window in windows]
    schedule = between((Step(engine.native_window, 1.0), *best), engine.max_scale)
    about = {
        "protocols": ["whole", "pass_key"] if prompts else ["whole"],
        "prompt": records[-1].config["prompt"],
        "prompts": prompts,
        "windows": list(windows),
        "ratios": list(ratios),
        "scales": [],
        "chosen": [dataclasses.asdict(step) for step in schedule],
    }
    examples = [example for record in records for example in record.examples]
    return Calibration(schedule, Record(kind="calibrate", config=read.config | about, rows=rows, examples=examples))


def _reading(engine: Engine, config: EvaluateConfig, window: int, ratios: Sequence[float]) -> EvaluateConfig:
    """Perplexity of one window at every scale tried."""
    scales = _candidates(window / engine.native_window, ratios)
    return dataclasses.replace(config, windows=(window,), scales=scales, protocols=("whole",))


def _cut(corpora: Mapping[str, Sequence[Document]], window: int) -> dict[str, list[Document]]:
    return {
        label: [dataclasses.replace(document, tokens=document.tokens[:window]) for document in documents]
        for label, documents in corpora.items()
    }


def _rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [row for record in records for row in record.rows]


def between(schedule: Schedule, max_scale: float) -> Schedule:
    """`schedule`, whose first step is the native window, with the ladder's windows that lie between its own.

    A request that is a little longer than one step would else be read at the next one's scale, which may be made for a
    window four times as long. The logarithm of an added step's scale lies on the line between its neighbours' over the
    logarithm of the window.
    """
    native, steps = schedule[0].window, list(schedule[:1])
    for low, high in itertools.pairwise(schedule):
        for window in (int(native * rung) for rung in ladder(max_scale)):
            if low.window < window < high.window:
                way = math.log(window / low.window) / math.log(high.window / low.window)
                steps.append(Step(window, float(f"{low.scale ** (1 - way) * high.scale**way:.3g}")))
        steps.append(high)
    return tuple(steps)


def _ladder_windows(engine: Engine, corpora: Mapping[str, Sequence[Document]]) -> list[int]:
    shortest = min((len(d.tokens) for documents in corpora.values() for d in documents), default=0)
    steps = [int(scale * engine.native_window) for scale in ladder(engine.max_scale) if scale > 1]
    return [window for window in steps if window <= shortest]


def _check(
    engine: Engine,
    corpora: Mapping[str, Sequence[Document]],
    windows: Sequence[int],
    ratios: Sequence[float],
    prompts: int,
) -> None:
    if engine.extension.method == "none":
        raise ValueError("method = 'none': it has no scale to calibrate; name another method")
    if not windows:
        largest = int(engine.native_window * engine.max_scale)
        raise ValueError(
            f"windows = []: nothing between the native window ({engine.native_window}) and the largest trained one "
            f"({largest}) that the documents reach; give longer documents, or windows"
        )
    if min(windows) <= engine.native_window:
        raise ValueError(
            f"windows = {list(windows)}: calibrate windows longer than the native one ({engine.native_window}); "
            "that one keeps scale 1"
        )
    if not ratios or any(not math.isfinite(ratio) or ratio <= 0 for ratio in ratios):
        raise ValueError(f"ratios = {list(ratios)}: use positive numbers, such as 0.5 to 1.25")
    if prompts < 0:
        raise ValueError(f"prompts = {prompts}: ask 24 or more pass keys a scale, or 0 for none")
    for label, documents in corpora.items():
        short = [d.name for d in documents if len(d.tokens) < max(windows)]
        if short or not documents:
            raise ValueError(f"corpora.{label}: {short or 'no documents'} shorter than the window {max(windows)}")


def _candidates(adequate: float, ratios: Sequence[float]) -> tuple[float, ...]:
    """Scales to try, rounded to three digits so that they print as what they are; never below 1."""
    return tuple(sorted({max(1.0, rounded(adequate * ratio)) for ratio in ratios}))


def run(
    config: EvaluateConfig,
    *,
    windows: Sequence[int] = (),
    ratios: Sequence[float] = RATIOS,
    prompts: int = 0,
    progress: bool = True,
) -> Calibration:
    """Calibrate the checkpoint folder `config.model`: writes its e2llm.json and the Record `config.out`."""
    folder = Path(config.model)
    if not folder.is_dir():
        raise ValueError(f"model = {config.model!r}: a schedule is written into a checkpoint folder; save one first")
    if not config.corpora:
        raise ValueError("corpora = {}: give at least one LABEL=PATH of long texts that no result is reported on")
    check_files(config)
    ranks = launched(config.device)
    device = ranks.device or config.device
    engine = Engine.load(
        config.model, dtype=config.dtype, device=device, attn_implementation=config.attn_implementation
    )
    if engine.info is None:
        raise ValueError(f"model = {config.model!r}: it has no e2llm.json to write a schedule into; train it first")
    longest = max(windows) if windows else int(engine.native_window * engine.max_scale)
    corpora = {
        label: load_documents(path, engine.tokenizer, num_tokens=longest, max_documents=config.max_documents)
        for label, path in config.corpora.items()
    }
    partial = Path(f"{config.out}.partial.jsonl")
    common: dict[str, Any] = {"partial": partial, "progress": progress, "ranks": ranks}
    found = calibrate(engine, corpora, config, windows=windows, ratios=ratios, prompts=prompts, **common)
    schedule = [dataclasses.asdict(step) for step in found.schedule]
    ranks.wait()  # all have read the folder
    if ranks.is_first:
        dataclasses.replace(engine.info, schedule=schedule).save(folder)
    finish(found.record, config.out, partial, ranks)
    return found
