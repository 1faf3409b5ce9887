"""Does choosing the scale matter? The chosen scale against fixed ones, method by method, on the same inputs.

Flows in: a model, texts, windows of short and middle length, and the harness' short tasks where a folder of them is
named. Flows out: one Record in which every row says whether its scale was `chosen` for the window or request, or
`fixed`. A model is loaded once for each method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.measure import Results
from e2llm.evaluate.ranks import Ranks, launched
from e2llm.evaluate.run import check_files, check_named, evaluate, finish, load_corpora, load_engine, scale_of
from e2llm.evaluate.short import evaluate_short, part_name, prepare
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.evaluate.trained import check_windows_trained
from e2llm.infer import Engine
from e2llm.records import Record

METHODS = ("linear", "yarn")
FIXED = (2.0, 4.0, 8.0, 16.0)


def choice(
    config: EvaluateConfig,
    *,
    short: SuiteConfig | None = None,
    methods: Sequence[str] = METHODS,
    progress: bool = True,
) -> Record:
    """Measure `config.protocols` at each window, and `short`'s tasks, with the chosen scale and with each fixed one
    (`config.scales`, or 2 to 16), for each method; writes `config.out`. Resumes as `evaluate` does, method by method.

    A fixed scale is measured at every window, also where it is smaller than the window needs. A short task's chosen
    scale is that of each request, as in serving: 1 inside the native window unless calibrated otherwise. `short` says
    tasks and samples; model, methods and scales are those of `config`. ValueError where a method is named, for a window
    above a checkpoint's trained range unless `config.scales` names scales, and without texts or short tasks.
    """
    if config.method is not None:
        raise ValueError(f"method = {config.method!r}: choice compares {' and '.join(methods)}; leave method out")
    if short is None or config.corpora:
        check_named(config)
    check_files(config)
    tasks, left_out = prepare(short) if short else ({}, {})
    fixed = config.scales or FIXED
    found: Results = {"rows": [], "examples": []}
    described: dict[str, dict[str, Any]] = {"evaluate": {}, "short": {}}
    partial = Path(f"{config.out}.partial.jsonl")
    ranks = launched(config.device)
    for method in methods:
        own = dataclasses.replace(config, method=method, scales=fixed)
        engine = load_engine(own, ranks)
        if config.corpora:
            if not config.scales:
                check_windows_trained(engine, config.windows)
            described["evaluate"][method] = _texts(engine, own, found, partial, progress, ranks)
        if short is not None:
            asked = dataclasses.replace(short, model=config.model, method=method, scales=fixed)
            described["short"][method] = _short(engine, tasks, left_out, asked, found, partial, progress, ranks)
    about = {"methods": list(methods), "fixed": list(fixed), **{name: one for name, one in described.items() if one}}
    record = Record(kind="choice", config=about, rows=found["rows"], examples=found["examples"])
    finish(record, config.out, partial, ranks)
    return record


def _texts(
    engine: Engine, config: EvaluateConfig, found: Results, partial: Path, progress: bool, ranks: Ranks
) -> dict[str, Any]:
    """Adds to `found` what one method reads at `config.scales` and at each window's own; returns what was run."""
    corpora, fixed = load_corpora(config, engine), config.scales
    described: dict[str, Any] = {}
    for window in sorted(config.windows):
        chosen = float(scale_of(engine, window))
        # All windows stay in the config that decides which tokens are scored; one is measured at a time.
        part = dataclasses.replace(config, scales=tuple(sorted({chosen, *fixed})))
        record = evaluate(engine, corpora, part, windows=(window,), partial=partial, progress=progress, ranks=ranks)
        found["rows"] += [row | {"choice": "fixed"} for row in record.rows if row["scale"] in fixed]
        found["rows"] += [row | {"choice": "chosen"} for row in record.rows if row["scale"] == chosen]
        found["examples"] += record.examples
        described = record.config
    return described


def _short(
    engine: Engine,
    tasks: Mapping[str, Any],
    left_out: Mapping[str, str],
    config: SuiteConfig,
    found: Results,
    partial: Path,
    progress: bool,
    ranks: Ranks,
) -> dict[str, Any]:
    """Adds to `found` the short tasks at `config.scales` and at the scale of each request; returns what was run."""
    described: dict[str, Any] = {}
    for which, scales in (("chosen", ()), ("fixed", config.scales)):
        asked = dataclasses.replace(config, scales=scales)
        record = evaluate_short(
            engine, tasks, asked, left_out=left_out, partial=partial, progress=progress, ranks=ranks
        )
        for row in record.rows:
            own = {"choice": which}
            found["rows"].append(row | own | _scale_of(row, record.config["requests_by_scale"]))
        found["examples"] += record.examples
        described[which] = record.config
    return described


def _scale_of(row: Mapping[str, Any], used: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The one scale that a row's requests chose; none where they chose several, or were told."""
    names = [part_name(row["task"], None)] if row["task"] != "average" else list(used)
    chosen = {float(scale) for name in names for scale in used[name]} if row["scale"] is None else set()
    return {"scale": chosen.pop()} if len(chosen) == 1 else {}
