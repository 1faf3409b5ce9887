"""What training and reading took: tokens a second, seconds, GPU hours, memory; one row a run.

Flows in: rows of costs. Flows out: `Table`s, never two models in one. Costs of serving belong to its own benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from e2llm.records import INTERVAL_FIELDS, LABELS, Record, labels_of, source_names
from e2llm.report.formats import format_count, format_number, format_quantity, format_window, join_words
from e2llm.report.series import Row
from e2llm.report.tables import Cell, Table, count_foot, interval_text

COLUMNS = {
    "tokens_per_second": "tokens/s",
    "seconds_per_step": "seconds a step",
    "seconds_per_window": "seconds a window",
    "seconds_per_million_tokens": "seconds a million tokens",
    "train_seconds": "seconds",
    "gpu_hours": "GPU hours",
    "peak_memory_bytes": "peak memory a GPU",
    "model_flops_utilization": "share of the peak FLOPS",
}
"""Metric -> column, in this order; `gpu_hours` is made from `train_seconds`."""
_MODEL = ("base_model", "shape")
"""Labels that say what was run: across them costs are not comparable."""
_RUN = ("checkpoint", "trainer")
"""Labels that name a run, also where all runs of a table share them."""
_BARE = (*_RUN, *_MODEL, "protocol")
"""Labels whose values need no name before them."""
_HOURS = "GPU hours: seconds times GPUs, where the Record says how many were used or the machine had one; else none."


@dataclass(frozen=True)
class CostTable:
    """One model: what was done to it, and a row a run."""

    title: str
    table: Table


def is_cost_row(row: Row) -> bool:
    """Whether a row stands in these tables."""
    return row["metric"] in COLUMNS and row.get("engine") is None


def cost_tables(rows: Sequence[Row], records: Sequence[Record]) -> list[CostTable]:
    """Training, then evaluation, of each model; what all rows of a table share stands in its title."""
    found = [row for row in rows if is_cost_row(row)]
    gpus = dict(zip(source_names(records), (record.environment.get("gpus") for record in records), strict=True))
    found += [hours for row in found if (hours := _hours(row, gpus.get(row["source"])))]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault((_kind(row), *(row.get(name) for name in _MODEL)), []).append(row)
    order = sorted(groups, key=lambda key: key[0] != "Training")  # stable: models as the files have them
    return [_table(str(key[0]), groups[key]) for key in order]


def _kind(row: Row) -> str:
    return "Evaluation" if row.get("protocol") else "Training"


def _hours(row: Row, gpus_there: Any) -> Row | None:
    """GPU hours of a training; None where more GPUs than one are there and nobody says how many it used."""
    used = row.get("gpus") or (1 if gpus_there == 1 else None)
    if row["metric"] != "train_seconds" or not isinstance(used, int):
        return None
    kept = {name: value for name, value in row.items() if name not in INTERVAL_FIELDS}
    return kept | {"metric": "gpu_hours", "value": row["value"] * used / 3600, "unit": "h"}


def _table(kind: str, rows: Sequence[Row]) -> CostTable:
    runs: dict[frozenset[tuple[str, Any]], dict[str, Row]] = {}
    for row in rows:
        runs.setdefault(frozenset(labels_of(row).items()), {})[row["metric"]] = row
    labels = [dict(run) for run in runs]
    names = dict.fromkeys(name for name in (*LABELS, *(n for run in labels for n in sorted(run))) if name != "source")
    varying = [n for n in names if len({run.get(n) for run in labels}) > 1 or n in _RUN]
    texts = [_words(run, [*_RUN, *varying]) or str(run["source"]) for run in labels]
    if len(set(texts)) < len(texts):
        texts = [join_words(text, str(run["source"])) for text, run in zip(texts, labels, strict=True)]
    metrics = [metric for metric in COLUMNS if any(metric in run for run in runs.values())]
    body: list[tuple[str, list[Cell | None]]] = [
        (text, [_cell(run.get(metric)) for metric in metrics]) for text, run in zip(texts, runs.values(), strict=True)
    ]
    shared = [name for name in names if name not in varying and labels[0].get(name) not in (None, "none")]
    title = join_words(kind, _words(labels[0], [*_MODEL, *shared]))
    notes = (_HOURS,) if "train_seconds" in metrics else ()
    head = ["run", *(COLUMNS[metric] for metric in metrics)]
    foot = count_foot("n", [[run[metric] for run in runs.values() if metric in run] for metric in metrics])
    return CostTable(title, Table(f"Cost: {title}", head, body, foot, notes=notes))


def _words(labels: dict[str, Any], names: Sequence[str]) -> str:
    """The labels' values, each once, with their names where a value alone would not say what it is."""
    return join_words(*(_word(name, labels[name]) for name in dict.fromkeys(names) if labels.get(name) is not None))


def _word(name: str, value: Any) -> str:
    if name in _BARE:
        return str(value)
    if isinstance(value, bool):
        return name.replace("_", " ") if value else f"no {name.replace('_', ' ')}"
    return f"{name.replace('_', ' ')} {format_window(value) if name == 'window' else value}"


def _cell(row: Row | None) -> Cell | None:
    if row is None:
        return None

    def form(value: float) -> str:
        if row["unit"] == "bytes":
            return format_quantity(value, "bytes")
        if row["unit"] == "share":
            return f"{value:.1%}"
        return format_number(value) if value >= 1 else f"{value:.3g}"

    return Cell(form(row["value"]), note=f"n = {format_count(row['n'])}", interval=interval_text(row, form))
