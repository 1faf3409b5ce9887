"""Does choosing the scale matter? The chosen scale against fixed ones, method by method, on the same inputs.

Flows in: a model, texts, windows of short and middle length. Flows out: one Record in which every row says whether its
scale was `chosen` for the window or `fixed`. A model is loaded once for each method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.ranks import launched
from e2llm.evaluate.run import check_named, evaluate, finish, load_corpora, load_engine, scale_of
from e2llm.evaluate.trained import check_windows_trained
from e2llm.records import Record

METHODS = ("linear", "yarn")
FIXED = (2.0, 4.0, 8.0, 16.0)


def choice(config: EvaluateConfig, *, methods: Sequence[str] = METHODS, progress: bool = True) -> Record:
    """Measure `config.protocols` at each window with the chosen scale and with each fixed one (`config.scales`, or
    2 to 16), for each method; writes `config.out`. Resumes as `evaluate` does, method by method.

    A fixed scale is measured at every window, also where it is smaller than the window needs. ValueError for a window
    above a checkpoint's trained range, unless `config.scales` names scales.
    """
    check_named(config)
    fixed = config.scales or FIXED
    rows: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    described: dict[str, Any] = {}
    partial = Path(f"{config.out}.partial.jsonl")
    ranks = launched(config.device)
    for method in methods:
        own = dataclasses.replace(config, method=method)
        engine = load_engine(own, ranks)
        if not config.scales:
            check_windows_trained(engine, config.windows)
        corpora = load_corpora(own, engine)
        for window in sorted(config.windows):
            chosen = float(scale_of(engine, window))
            # All windows stay in the config that decides which tokens are scored; one is measured at a time.
            part = dataclasses.replace(own, scales=tuple(sorted({chosen, *fixed})))
            record = evaluate(engine, corpora, part, windows=(window,), partial=partial, progress=progress, ranks=ranks)
            rows += [row | {"choice": "fixed"} for row in record.rows if row["scale"] in fixed]
            rows += [row | {"choice": "chosen"} for row in record.rows if row["scale"] == chosen]
            examples += record.examples
        described[method] = record.config
    record = Record(
        kind="choice",
        config={"methods": list(methods), "fixed": list(fixed), "evaluate": described},
        rows=rows,
        examples=examples,
    )
    finish(record, config.out, partial, ranks)
    return record
