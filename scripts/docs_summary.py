"""One table for many runs of a study: a row a recipe, its seeds together, each cell at the best scale.

Flows in: Records of kind study by run. Flows out: Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from e2llm.records import Record
from e2llm.report.formats import format_value, format_window

SEED = re.compile(r"-seed-\d+$")
"""End of a run's name that repeats another run with another seed."""


def counts(row: Mapping[str, Any], metric: str) -> bool:
    """Whether a row is of the weights that the recipe saves: those at other shares of the way stand with their run."""
    return bool(row["metric"] == metric and "depth" not in row and "interpolation" not in row)


def summary(found: Mapping[str, Record]) -> list[str]:
    """A table for each corpus, headed by its name where there are several. Keys are of the first corpus alone."""
    corpora = sorted({row["corpus"] for x in found.values() for row in x.rows if counts(row, "perplexity")})
    tables = [_table(found, corpus) for corpus in corpora]
    if len(corpora) == 1:
        return tables
    return [part for corpus, table in zip(corpora, tables, strict=True) for part in (f"On {corpus}:", table)]


def _table(found: Mapping[str, Record], corpus: str) -> str:
    groups: dict[str, list[Record]] = {}
    for name, record in found.items():
        groups.setdefault(SEED.sub("", name), []).append(record)
    windows = _windows(found, "perplexity", corpus)
    asked = _windows(found, "retrieval", corpus)
    first, last = windows[0], windows[-1]
    ratio = f"{format_window(last)} / {format_window(first)}"
    head = ["recipe", "seeds", *map(format_window, windows), ratio, *(f"keys {format_window(w)}" for w in asked)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, records in groups.items():
        values = [{w: _best(x, "perplexity", corpus, w) for w in windows} for x in records]
        keys = [[_best(x, "retrieval", corpus, w) for x in records] for w in asked]
        cells = [_cell("perplexity", [one[w] for one in values]) for w in windows]
        cells.append(_cell("ratio", [far / near for one in values if (far := one[last]) and (near := one[first])]))
        lines.append([f"`{name}`", str(len(records)), *cells, *(_cell("retrieval", shares) for shares in keys)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _windows(found: Mapping[str, Record], metric: str, corpus: str) -> list[int]:
    rows = [row for record in found.values() for row in record.rows if counts(row, metric)]
    return sorted({row["window"] for row in rows if row["corpus"] == corpus})


def _best(record: Record, metric: str, corpus: str, window: int) -> float | None:
    rows = [r for r in record.rows if counts(r, metric) and r["window"] == window and r["corpus"] == corpus]
    values = [r["value"] for r in rows]
    return None if not values else min(values) if metric == "perplexity" else max(values)


def _cell(metric: str, values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "–"
    mean = f"{fmean(there):.2f}" if metric == "ratio" else format_value(metric, fmean(there))
    return f"{mean} ± {stdev(there):.2f}" if len(there) > 1 else mean
