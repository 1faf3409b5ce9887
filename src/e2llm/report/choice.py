"""The chosen scale against fixed ones: one table a metric and text, equal or not.

Flows in: rows with a label `choice` (chosen, fixed). Flows out: `Table`s.
"""

from __future__ import annotations

from collections.abc import Sequence

from e2llm.report.beyond import beyond_mark
from e2llm.report.formats import format_value, format_window, join_words
from e2llm.report.series import Row, Section, choice_sections
from e2llm.report.shared_documents import mark_beside
from e2llm.report.tables import UNITS, Cell, Table, count_foot, interval_text, table_notes


def choice_tables(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """(title, one row a method and scale, one column a window); the best of a method and column in bold."""
    return [
        (join_words(section.title, section.base_model), _table(section))
        for metric in ("perplexity", "retrieval", "string_match")
        for section in choice_sections(rows, metric)
    ]


def _table(section: Section) -> Table:
    rows = [row for row in section.rows if row.get("depth") is None]
    windows = sorted({row["window"] for row in rows})
    columns = {w: [row for row in rows if row["window"] == w] for w in windows}
    best = max if section.metric != "perplexity" else min
    body: list[tuple[str, list[Cell | None]]] = []
    for checkpoint, method in dict.fromkeys((row["checkpoint"], row["method"]) for row in rows):
        own = [row for row in rows if (row["checkpoint"], row["method"]) == (checkpoint, method)]
        top = {w: best(row["value"] for row in own if row["window"] == w) for w in windows}
        fixed = sorted({row["scale"] for row in own if row["choice"] == "fixed"})
        lines = [("chosen", [row for row in own if row["choice"] == "chosen"])]
        lines += [
            (f"fixed {s:g}", [row for row in own if row["choice"] == "fixed" and row["scale"] == s]) for s in fixed
        ]
        for name, found in lines:
            at = {row["window"]: row for row in found}
            cells = [_cell(section.metric, at.get(w), top[w], columns[w]) for w in windows]
            body.append((f"{checkpoint} · {method}, {name}", cells))
    foot = count_foot(UNITS.get(section.metric, "prompts"), list(columns.values()))
    head, notes = ["scale", *map(format_window, windows)], table_notes(list(columns.values()))
    return Table(f"Chosen and fixed scales, {section.title}", head, body, foot, notes=notes)


def _cell(metric: str, row: Row | None, best: float, column: Sequence[Row]) -> Cell | None:
    if row is None:
        return None

    def form(value: float) -> str:
        return format_value(metric, value) if metric != "string_match" else f"{value:.2f}"

    note = f"scale {row['scale']:g}, n = {row['n']:,}"
    ends, mark = interval_text(row, form), mark_beside(row, column) + beyond_mark(row)
    return Cell(form(row["value"]), best=row["value"] == best, note=note, interval=ends, mark=mark)
