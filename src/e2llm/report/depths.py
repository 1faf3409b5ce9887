"""Retrieval by depth: what a map of depth × window holds, for its figure and, with every interval, as tables.

Flows in: a section of retrieval rows. Flows out: maps and tables. A map's colours say nothing to a reader who hears the
page, and have no room for intervals: the tables say both.
"""

from __future__ import annotations

from dataclasses import dataclass

from e2llm.report.beyond import beyond_mark
from e2llm.report.formats import format_value, format_window, join_words
from e2llm.report.native import MARK, failing_note, fails
from e2llm.report.series import Row, Section, series_of, serving_row
from e2llm.report.tables import Cell, Table, count_foot, interval_text, table_notes


@dataclass(frozen=True)
class DepthMap:
    """One (checkpoint, method): (depth, window) -> its row at the scale that serves the window."""

    label: str
    cells: dict[tuple[float, int], Row]


def depth_maps(section: Section) -> list[DepthMap]:
    """Maps of a section; none where no row has a depth or fewer than four cells were measured."""
    rows = [row for row in section.rows if row.get("depth") is not None]
    if len({row["depth"] for row in rows}) * len({row["window"] for row in rows}) < 4:
        return []
    failing = [one.key for one in series_of(section) if fails(one)]
    found = []
    for one in series_of(Section(section.metric, section.labels, rows)):
        mine = [row for row in rows if one.owns(row)]
        cells = {
            place: serving_row([row for row in mine if (row["depth"], row["window"]) == place])
            for place in {(row["depth"], row["window"]) for row in mine}
        }
        found.append(DepthMap(one.label + (MARK if one.key in failing else ""), cells))
    return found


def depth_table(section: Section, one: DepthMap) -> Table:
    """One row a depth, one column a window, each cell with its interval."""
    depths, windows = sorted({depth for depth, _ in one.cells}), sorted({window for _, window in one.cells})
    columns = [[row for (_, window), row in one.cells.items() if window == wanted] for wanted in windows]
    body = [(f"{depth:.0%}", [_cell(one.cells.get((depth, window))) for window in windows]) for depth in depths]
    return Table(
        caption=join_words("By depth", one.label, section.title),
        head=["depth", *map(format_window, windows)],
        body=body,
        foot=count_foot("prompts", columns),
        notes=(*table_notes(columns), *([failing_note(section)] if one.label.endswith(MARK) else [])),
    )


def _cell(row: Row | None) -> Cell | None:
    if row is None:
        return None
    return Cell(format_value(row["metric"], row["value"]), interval=interval_text(row), mark=beyond_mark(row))
