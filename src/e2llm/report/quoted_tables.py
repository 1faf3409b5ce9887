"""Tables of what the paper prints, and beside which of our rows they stand.

Flows in: rows and Records. Flows out: a `Table` or a sentence, None or "" where nothing of ours can stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from e2llm.records import Record, source_names
from e2llm.report.formats import format_scale, format_window
from e2llm.report.quoted import FIGURE_5, MARK, TABLE_3, TABLE_3_NOTE, TABLE_3_WINDOWS, Quoted
from e2llm.report.series import Row, config_number
from e2llm.report.tables import Cell, Table

_FEWEST_WINDOWS = 2
"""Of the paper's that ours have to have: one window has no shape to compare."""


def quoted_table(
    title: str, corner: str, rows: Sequence[Quoted], columns: Sequence[str], notes: tuple[str, ...] = ()
) -> Table:
    """One row a printed one, marked as quoted with its table."""
    body: list[tuple[str, list[Cell | None]]] = [
        (f"{MARK} · {one.name}, {one.where}", [printed(one, name) for name in columns]) for one in rows
    ]
    return Table(title, [corner, *columns], body, notes=notes)


def printed(quoted: Quoted, name: str) -> Cell | None:
    value = quoted.values.get(name)
    return None if value is None else Cell(value)


def quoted_perplexity(rows: Sequence[Row]) -> Table | None:
    """Table 3, where perplexity was measured at two of its windows or more."""
    measured = {row["window"] for row in rows if row["metric"] == "perplexity" and row.get("window") is not None}
    if len(measured & set(TABLE_3_WINDOWS)) < _FEWEST_WINDOWS:
        return None
    columns = [format_window(window) for window in TABLE_3_WINDOWS]
    return quoted_table(f"Perplexity: {MARK} from the paper", "model", TABLE_3, columns, (TABLE_3_NOTE,))


def quoted_unseen_scales(rows: Sequence[Row], records: Sequence[Record]) -> str:
    """What the paper says of scales never trained, and which of ours are such; "" where all were trained."""
    scales = (config_number(record.config, "max_scale") for record in records)
    trained = dict(zip(source_names(records), scales, strict=True))
    unseen: dict[str, set[float]] = {}
    for row in rows:
        largest = trained.get(row["source"]) or 1.0  # a base, at 1, was trained at no scale
        if row["metric"] == "perplexity" and 1 < largest < (row.get("scale") or 0):
            name = " · ".join(str(row[key]) for key in ("checkpoint", "method") if row.get(key))
            unseen.setdefault(f"{name}, trained up to {format_scale(largest)}", set()).add(row["scale"])
    if not unseen:
        return ""
    ours = "; ".join(f"{name}: {', '.join(map(format_scale, sorted(scales)))}" for name, scales in unseen.items())
    return f"Scales never trained: {ours}. {FIGURE_5}"
