"""Tables: which value stands in which cell, once, and its Markdown and HTML.

Flows in: Records. Flows out: `Table`, rendered for docs (Markdown) or the page (HTML, everything escaped).
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from e2llm.intervals import BLOCKS
from e2llm.records import Record
from e2llm.report.beyond import beyond_mark, beyond_notes
from e2llm.report.formats import format_count, format_scale, format_value, format_window
from e2llm.report.native import MARK, failing_note, fails
from e2llm.report.series import APART, Row, Section, Series, all_rows, grid_rows, hero, sections, series_of, serving_row
from e2llm.report.shared_documents import comparable, comparison_notes, mark_beside, mark_of

DENSE = 7
"""Columns of a table, its row heads among them, above which it is set closer so that a page's width holds it."""
_WITHIN = (
    "Intervals of one document are over blocks of its tokens: how sure its own value is, and nothing about other "
    "documents."
)
UNITS = {"perplexity": "target tokens", "loss": "target tokens", "retrieval": "prompts"}


@dataclass(frozen=True)
class Cell:
    """One value as text. `share`: 0 … 1, how strongly it is shaded. `note`: more about it, shown on pointing.
    `interval`: the ends of its 95 % interval. `mark`: a sign that a note beneath the table explains."""

    text: str
    best: bool = False
    served: bool = False
    share: float | None = None
    note: str = ""
    interval: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """`head`: the corner and the column heads; `body`: (row head, cells); `foot`: the row that counts observations;
    `notes`: sentences beneath it."""

    caption: str
    head: list[str]
    body: list[tuple[str, list[Cell | None]]]
    foot: tuple[str, list[str]] | None = None
    strong: frozenset[int] = field(default_factory=frozenset)
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """GitHub's Markdown; the best value of a column in bold."""
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)]]
        for name, cells in self.body:
            lines.append([_plain(name), *(_bold(cell) for cell in cells)])
        if self.foot:
            lines.append([self.foot[0], *self.foot[1]])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        return table + "".join(f"\n{_plain(note)}\n" for note in self.notes)

    def html(self, *, kind: str = "") -> str:
        """A <table> with caption and scoped heads. `kind` becomes its class; many columns are set closer."""
        kind = " ".join(name for name in (kind, "dense" if len(self.head) > DENSE else "") if name)
        head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in self.head)
        rows = []
        for index, (name, cells) in enumerate(self.body):
            strong = ' class="hero"' if index in self.strong else ""
            rows.append(f'<tr{strong}><th scope="row">{breakable(name)}</th>{"".join(map(_html_cell, cells))}</tr>')
        foot = ""
        if self.foot:
            counts = "".join(f"<td>{breakable(text, '–')}</td>" for text in self.foot[1])
            if len(self.foot[1]) > 1 and len(set(self.foot[1])) == 1:
                text = self.foot[1][0]
                where = "each column" if "–" in text else "every cell"  # a range: rows differ, columns do not
                counts = f'<td class="every" colspan="{len(self.foot[1])}">{html.escape(text)} in {where}</td>'
            foot = f'<tfoot><tr><th scope="row">{html.escape(self.foot[0])}</th>{counts}</tr></tfoot>'
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(self.caption)}">'
            f'<table class="{kind}"><caption class="sr">{html.escape(self.caption)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>{foot}</table></div>"
            + "".join(f'<p class="quiet">{html.escape(note)}</p>' for note in self.notes)
        )


def perplexity_table(records: Sequence[Record], **labels: Any) -> str:
    """Markdown: one row a (checkpoint, method), one column a window. `labels` (corpus=…, …) choose the section."""
    return _only(records, "perplexity", labels, window_table)


def retrieval_table(records: Sequence[Record], **labels: Any) -> str:
    """Markdown: share of prompts answered, over all depths. `labels`: task=…, base_model=… choose the section."""
    return _only(records, "retrieval", labels, window_table)


def window_table(section: Section) -> Table:
    """One row a (checkpoint, method), one column a window, each cell at the scale that serves its window."""
    series = series_of(section)
    windows = sorted({window for one in series for window in one.points})
    columns = {window: [one.points[window] for one in series if window in one.points] for window in windows}
    body: list[tuple[str, list[Cell | None]]] = []
    for one in series:
        cells: list[Cell | None] = []
        for window in windows:
            row = one.points.get(window)
            cells.append(
                None
                if row is None
                else Cell(
                    _text(row),
                    best=_is_best(row, columns[window]),
                    note=_note(row),
                    interval=interval_text(row),
                    mark=mark_beside(row, columns[window]) + beyond_mark(row),
                )
            )
        body.append((one.label + (MARK if section.metric == "retrieval" and fails(one) else ""), cells))
    main = hero(series)
    failing = failing_note(section)
    return Table(
        caption=section.title,
        head=["checkpoint · method", *map(format_window, windows)],
        body=body,
        foot=count_foot(UNITS.get(section.metric, "n"), list(columns.values())),
        notes=(*table_notes(list(columns.values())), *([failing] if failing else []), *scales_note(series)),
        strong=frozenset(index for index, one in enumerate(series) if one is main),
    )


def scales_note(series: Sequence[Series]) -> tuple[str, ...]:
    """A sentence that says at which scale each window was read, for all at once where they agree; none where no scale
    is known or all are 1."""
    of = {one.label: {w: row["scale"] for w, row in one.points.items() if row.get("scale")} for one in series}
    at = [(window, scale) for scales in of.values() for window, scale in scales.items()]
    if all(scale == 1 for _, scale in at):
        return ()
    if len(set(at)) == len({window for window, _ in at}):
        return (f"Scales other than 1: {_scales(dict(at))}.",)
    groups: dict[str, list[str]] = {}
    for label, scales in of.items():
        groups.setdefault(_scales(scales), []).append(label)
    lines = (f"{', '.join(labels)}: {text}" for text, labels in groups.items() if text)
    return (f"Scales other than 1: {'; '.join(lines)}.",)


def _scales(of: dict[int, float]) -> str:
    """Those above 1."""
    some = sorted((window, scale) for window, scale in of.items() if scale != 1)
    return ", ".join(f"{format_scale(scale)} at {format_window(window)}" for window, scale in some)


def scale_table(section: Section, series: Series) -> Table | None:
    """Window × scale of one series, shaded by what a scale costs over the best at its window; None without a grid."""
    rows = grid_rows(section, series)
    if not rows:
        return None
    windows, scales = sorted({row["window"] for row in rows}), sorted({row["scale"] for row in rows})
    at = {(row["scale"], row["window"]): row for row in rows}
    columns = {window: [row for row in rows if row["window"] == window] for window in windows}
    body: list[tuple[str, list[Cell | None]]] = []
    for scale in scales:
        cells = [_scale_cell(at.get((scale, window)), columns[window]) for window in windows]
        body.append((format_scale(scale), cells))
    return Table(
        caption=f"{series.label}: {section.title}",
        head=["scale", *map(format_window, windows)],
        body=body,
        foot=count_foot(UNITS.get(section.metric, "n"), [columns[window] for window in windows]),
        notes=table_notes([columns[window] for window in windows]),
    )


def _scale_cell(row: Row | None, column: Sequence[Row]) -> Cell | None:
    if row is None:
        return None
    lowest = min(other["value"] for other in column if mark_of(other) == mark_of(row))
    cost = row["value"] / lowest - 1 if lowest > 0 else 0.0
    served = row.get("native_window") is not None and row is serving_row(column)
    note = f"{cost:+.1%} over the best scale at {format_window(row['window'])}, {_note(row)}"
    # Twice the best is as dark as it gets: beyond that nobody would serve it.
    share = min(1.0, math.log2(1 + cost)) if row["metric"] != "retrieval" else 1 - row["value"]
    mark, ends = mark_beside(row, column) + beyond_mark(row), interval_text(row)
    best = _is_best(row, column)
    return Cell(_text(row), best=best, served=served, share=share, note=note, interval=ends, mark=mark)


def _only(records: Sequence[Record], metric: str, labels: dict[str, Any], build: Callable[[Section], Table]) -> str:
    unknown = sorted(set(labels) - set(APART))
    if unknown:
        raise ValueError(f"labels = {unknown}: a table is chosen by {', '.join(APART)}")
    found = [s for s in sections(all_rows(records), metric) if all(s.labels[k] == v for k, v in labels.items())]
    if not found:
        raise ValueError(f"no {metric} rows with {labels}: the Records hold none")
    if len(found) > 1:
        differing = sorted(k for k in APART if len({s.labels[k] for s in found}) > 1)
        values = {k: sorted({str(s.labels[k]) for s in found}) for k in differing}
        raise ValueError(f"{metric} rows of several {' and '.join(differing)}: choose one of {values}")
    return build(found[0]).markdown()


def _is_best(row: Row, column: Sequence[Row]) -> bool:
    """Whether a row has the best value of those it may be compared with; False where there is nothing to choose
    between."""
    values = {other["value"] for other in comparable(column)}
    if len(values) < 2 or mark_beside(row, column):
        return False
    return bool(row["value"] == (max(values) if row["metric"] == "retrieval" else min(values)))


def _text(row: Row) -> str:
    return format_value(row["metric"], row["value"])


def _note(row: Row) -> str:
    scale = "" if row.get("scale") is None else f"scale {format_scale(row['scale'])}, "
    ends, over = interval_text(row), "within the document " if row.get("interval") == BLOCKS else ""
    return f"{scale}n = {format_count(row['n'])}" + (f", 95 % interval {over}{ends}" if ends else "")


def interval_text(row: Row, form: Callable[[float], str] | None = None) -> str:
    """The ends of a row's interval as its value is written (by `form`, or as its metric usually is); "" without one."""
    if row.get("low") is None:
        return ""
    write = form or (lambda value: format_value(row["metric"], value))
    return f"{write(row['low'])}–{write(row['high'])}"


def table_notes(columns: Sequence[Sequence[Row]]) -> tuple[str, ...]:
    """Sentences beneath a table of these columns (rows of one window each): what its marks say, and which intervals say
    nothing about other documents."""
    within = any(row.get("interval") == BLOCKS for column in columns for row in column)
    return comparison_notes(columns) + beyond_notes(columns) + ((_WITHIN,) if within else ())


def count_foot(unit: str, columns: Sequence[Sequence[Row]]) -> tuple[str, list[str]]:
    """The row that counts observations: `unit`, and for each column's rows their n."""
    return unit, [_count_range([row["n"] for row in rows]) for rows in columns]


def _count_range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return format_count(low) if low == high else f"{format_count(low)}–{format_count(high)}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no cell ends, emphasis or tags."""
    for mark in "\\`*_|<[":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def _bold(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = (f"**{cell.text}**" if cell.best else cell.text) + cell.mark
    return f"{text} ({cell.interval})" if cell.interval else text


def breakable(text: str, after: str = "_+/") -> str:
    """HTML that may begin a new line after these signs, so that no line has to end inside a word; not at "n = 2"."""
    return re.sub(f"([{after}])", r"\1<wbr>", html.escape(text)).replace(" = ", "\u00a0=\u00a0")


def _html_cell(cell: Cell | None) -> str:
    if cell is None:
        return '<td class="none"><span aria-label="not measured">–</span></td>'
    kinds = " ".join(name for name, on in (("served", cell.served), ("shaded", cell.share is not None)) if on)
    style = "" if cell.share is None else f' style="--share:{cell.share:.3f}"'
    text = html.escape(cell.text)
    text = f"<strong>{text}</strong>" if cell.best else text
    text += f"<sup>{html.escape(cell.mark)}</sup>" if cell.mark else ""
    text += f' <span class="interval">{html.escape(cell.interval)}</span>' if cell.interval else ""
    title = f' title="{html.escape(cell.note)}"' if cell.note else ""
    return f'<td class="{kinds}"{style}{title}>{text}</td>'
