"""The chosen scale against fixed ones: one table a metric and text, and one of short tasks; equal or not.

Flows in: rows with a label `choice` (chosen, fixed). Flows out: `Table`s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from e2llm.report.beyond import beyond_mark
from e2llm.report.formats import format_value, format_window, join_words
from e2llm.report.native import MARK, failing_sentence, fails
from e2llm.report.series import Row, Section, Series, choice_sections
from e2llm.report.shared_documents import mark_beside
from e2llm.report.tables import UNITS, Cell, Table, count_foot, interval_text, table_notes
from e2llm.report.task_tables import task_cell, task_name


def choice_tables(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """(title, one row a method and scale, one column a window or short task); the best of a method and column in
    bold."""
    found = [
        (join_words(section.title, section.base_model), _table(section))
        for metric in ("perplexity", "retrieval", "string_match")
        for section in choice_sections(rows, metric)
    ]
    short: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("choice") is not None and row.get("suite") is not None:
            short.setdefault(str(row.get("base_model") or ""), []).append(row)
    return found + [(join_words("short tasks", model), _short_table(own)) for model, own in short.items()]


def _table(section: Section) -> Table:
    rows = [row for row in section.rows if row.get("depth") is None]
    windows = sorted({row["window"] for row in rows})
    columns = {w: [row for row in rows if row["window"] == w] for w in windows}
    best = max if section.metric != "perplexity" else min
    shares = section.metric != "perplexity"
    served = {method: _as_served(own) for method, own in _by_method(rows) if shares}
    body: list[tuple[str, list[Cell | None]]] = []
    for method, own in _by_method(rows):
        mark = MARK if shares and fails(served[method]) else ""
        top = {w: _top([row for row in own if row["window"] == w], best) for w in windows}
        for name, found in _lines(own):
            at = {row["window"]: row for row in found}
            cells = [_cell(section.metric, at.get(w), top[w], columns[w]) for w in windows]
            body.append((f"{method}, {name}{mark}", cells))
    foot = count_foot(UNITS.get(section.metric, "prompts"), list(columns.values()))
    head, failing = ["scale", *map(format_window, windows)], failing_sentence(list(served.values()))
    notes = (*table_notes(list(columns.values())), *([failing] if failing else []))
    return Table(f"Chosen and fixed scales, {section.title}", head, body, foot, notes=notes)


def _as_served(rows: Sequence[Row]) -> Series:
    """One method's rows at the chosen scale: whether it can do the task at all is seen there."""
    key = {"checkpoint": rows[0]["checkpoint"], "method": rows[0]["method"]}
    return Series(key, {row["window"]: row for row in rows if row["choice"] == "chosen"})


def _short_table(rows: Sequence[Row]) -> Table:
    columns: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        columns.setdefault(_measured(row), []).append(row)
    names = [name for name, _ in columns]
    head = [join_words(name, str(filter or "") if names.count(name) > 1 else "") for name, filter in columns]
    body: list[tuple[str, list[Cell | None]]] = []
    for method, own in _by_method(rows):
        shares = [row for row in own if row["unit"] == "share"]  # of other scores nobody said which end is better
        top = {at: _top([row for row in shares if _measured(row) == at], max) for at in columns}
        for line, found in _lines(own):
            by_column = {_measured(row): row for row in found}
            body.append((f"{method}, {line}", [_short_cell(by_column.get(at), top[at]) for at in columns]))
    foot = count_foot("samples", list(columns.values()))
    return Table("Chosen and fixed scales, short tasks, shares in percent", ["scale", *head], body, foot)


def _measured(row: Row) -> tuple[str, Any]:
    return task_name(row), row.get("filter")


def _short_cell(row: Row | None, best: float | None) -> Cell | None:
    if row is None:
        return None
    cell = task_cell(row, best=row["value"] == best)
    scale = "own scales" if row["scale"] is None else f"scale {row['scale']:g}"
    return dataclasses.replace(cell, note=f"{scale}, {cell.note}")


def _top(rows: Sequence[Row], best: Callable[[set[float]], float]) -> float | None:
    """The best of a method's values in a column; None where its scales make no difference there."""
    values = {row["value"] for row in rows}
    return best(values) if len(values) > 1 else None


def _by_method(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(checkpoint · method, its rows), in order of first appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row['checkpoint']} · {row['method']}", []).append(row)
    return list(found.items())


def _lines(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """One method's rows by how their scale came about: the chosen one, then each fixed one."""
    fixed = sorted({row["scale"] for row in rows if row["choice"] == "fixed"})
    lines = [("chosen", [row for row in rows if row["choice"] == "chosen"])]
    return lines + [
        (f"fixed {s:g}", [row for row in rows if row["choice"] == "fixed" and row["scale"] == s]) for s in fixed
    ]


def _cell(metric: str, row: Row | None, best: float | None, column: Sequence[Row]) -> Cell | None:
    if row is None:
        return None

    def form(value: float) -> str:
        return format_value(metric, value) if metric != "string_match" else f"{value:.2f}"

    note = f"scale {row['scale']:g}, n = {row['n']:,}"
    ends, mark = interval_text(row, form), mark_beside(row, column) + beyond_mark(row)
    return Cell(form(row["value"]), best=row["value"] == best, note=note, interval=ends, mark=mark)
