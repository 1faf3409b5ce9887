"""Is the context used? Loss against position, perplexity on the tokens that need it, whole windows against sliding.

Flows in: rows of `loss` with a `position`, `key_perplexity`, `whole_over_sliding`. Flows out: a figure and tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from e2llm.report.beyond import beyond_mark
from e2llm.report.canvas import Drawing
from e2llm.report.formats import format_number, format_window, join_words, slug
from e2llm.report.lines import DASHES, MARKERS, Line, draw_lines
from e2llm.report.palette import Palette
from e2llm.report.series import Row, Section, sections
from e2llm.report.tables import Cell, Table, count_foot, interval_text, table_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHERS = {
    "key_perplexity": "Perplexity on the tokens that need the context; lower is better.",
    "whole_over_sliding": "Perplexity in whole windows over that of the sliding window, same tokens; 1 is equal.",
}
"""Metrics with a table of their own and what they say."""


def position_sections(rows: Sequence[Row]) -> list[Section]:
    return sections([row for row in rows if row.get("position") is not None], "loss")


def _curves(section: Section) -> dict[str, list[Row]]:
    """Label -> rows by position, of the largest window that a (checkpoint, method, scale) was read in."""
    found: dict[tuple[str, float], dict[int, list[Row]]] = {}
    for row in section.rows:
        name = " · ".join(str(row[k]) for k in ("checkpoint", "method") if row.get(k))
        found.setdefault((name, 0.0), {}).setdefault(row["window"], []).append(row)
    curves = {}
    for (name, _), windows in found.items():
        # One (checkpoint, method) alone shows every window; several show the largest that each was read in.
        shown = sorted(windows) if len(found) == 1 else [max(windows)]
        for window in shown:
            for scale in sorted({row["scale"] for row in windows[window]}):
                rows = sorted((r for r in windows[window] if r["scale"] == scale), key=lambda r: r["position"])
                curves[f"{name}, {format_window(window)} at {scale:g}"] = rows
    return curves


def position_figure(section: Section, *, name: str = "position") -> Drawing | None:
    """Loss against the position in the window, log x; None where no curve has two points."""
    curves = {label: rows for label, rows in _curves(section).items() if len(rows) > 1}
    if not curves:
        return None
    lines = [
        Line(
            label,
            tuple(row["position"] + 1 for row in rows),
            tuple(row["value"] for row in rows),
            ("hues", index % 6),
            DASHES[index % 5],
            MARKERS[index % 6],
            False,
        )
        for index, (label, rows) in enumerate(curves.items())
    ]
    longest = max(line.x[-1] for line in lines)
    ticks = [4**power for power in range(1, 12) if 4**power <= longest]

    def draw(palette: Palette, width: int) -> Figure:
        return draw_lines(
            lines, palette, width, y_name="Loss, nats a token", x_name="Position in the window, tokens", ticks=ticks
        )

    ends = "; ".join(f"{line.label}: {line.y[0]:.2f} first, {line.y[-1]:.2f} last" for line in lines)
    return Drawing(slug(name), f"Loss by position in the window, {section.title}", f"One line each: {ends}.", draw)


def position_table(section: Section) -> Table:
    """One row a curve, one column a power of four, and each window's end."""
    curves = _curves(section)
    ends = {rows[-1]["position"] + 1 for rows in curves.values()}
    bounds = sorted({4**power for power in range(1, 12)} | ends)
    shown = [b for b in bounds if any(row["position"] + 1 == b for rows in curves.values() for row in rows)]
    body: list[tuple[str, list[Cell | None]]] = []
    for label, rows in curves.items():
        at = {row["position"] + 1: row for row in rows}
        body.append((label, [_loss_cell(at[b]) if b in at else None for b in shown]))
    columns = [[row for rows in curves.values() for row in rows if row["position"] + 1 == bound] for bound in shown]
    head = ["up to position", *map(format_window, shown)]
    foot, notes = count_foot("target tokens", columns), table_notes(columns)
    return Table(f"Loss by position, {section.title}", head, body, foot, notes=notes)


def _loss_cell(row: Row) -> Cell:
    ends, mark = interval_text(row, "{:.2f}".format), beyond_mark(row)
    return Cell(f"{row['value']:.2f}", note=f"n = {row['n']:,}", interval=ends, mark=mark)


def metric_tables(rows: Sequence[Row], metric: str) -> list[tuple[str, Table]]:
    """(title, one row a (checkpoint, method) and scale, one column a window)."""
    found = []
    for section in sections(rows, metric):
        windows = sorted({row["window"] for row in section.rows})
        names = list(dict.fromkeys(_name(row) for row in section.rows))
        body: list[tuple[str, list[Cell | None]]] = []
        for name in names:
            at = {row["window"]: row for row in section.rows if _name(row) == name}
            body.append((name, [_metric_cell(metric, at[w]) if w in at else None for w in windows]))
        title = join_words(section.title, section.base_model)
        columns = [[row for row in section.rows if row["window"] == w] for w in windows]
        foot, notes = count_foot("target tokens", columns), table_notes(columns)
        head = ["checkpoint · method", *map(format_window, windows)]
        found.append((title, Table(f"{metric}, {title}", head, body, foot, notes=notes)))
    return found


def _metric_cell(metric: str, row: Row) -> Cell:
    form = "{:.4f}".format if metric == "whole_over_sliding" else format_number
    note = f"scale {row['scale']:g}, n = {row['n']:,}"
    return Cell(form(row["value"]), note=note, interval=interval_text(row, form), mark=beyond_mark(row))


def _name(row: Row) -> str:
    extra = f", keys by {row['key_model']}" if row.get("key_model") not in (None, "itself") else ""
    return " · ".join(str(row[k]) for k in ("checkpoint", "method") if row.get(k)) + extra
