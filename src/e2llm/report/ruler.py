"""RULER's tables: every kind by window, and the mean over kinds, with what the base cannot do at its own window marked.

Flows in: rows of `string_match`. Flows out: `Table`s. A kind that the base fails inside its native window says nothing
about a longer one: it is marked, and a second mean leaves it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from e2llm.intervals import Interval, interval_fields, interval_of_average
from e2llm.report.beyond import LABEL as BEYOND
from e2llm.report.beyond import beyond_mark, beyond_notes
from e2llm.report.formats import format_window, join_words
from e2llm.report.native import FAILED, MARK, NOT_KNOWN, cannot
from e2llm.report.series import Row, Section, sections, series_of
from e2llm.report.tables import Cell, Table, count_foot, interval_text

ORDER = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip


@dataclass(frozen=True)
class RulerTables:
    """One base model and corpus."""

    title: str
    means: Table
    """One row a (checkpoint, method)."""
    kinds: list[tuple[str, Table]]
    """For each (checkpoint, method) one row a kind."""
    note: str
    """Which kinds are marked, and why; or why none could be."""


def ruler_tables(rows: Sequence[Row]) -> list[RulerTables]:
    """Tables of every base model and corpus that has rows."""
    groups: dict[tuple[object, ...], list[Section]] = {}
    for section in sections(rows, "string_match"):
        key = tuple(section.labels.get(name) for name in ("base_model", "corpus", "language"))
        groups.setdefault(key, []).append(section)
    return [_tables(found) for found in groups.values()]


def _tables(found: Sequence[Section]) -> RulerTables:
    names = sorted({str(s.labels["task"]) for s in found}, key=lambda n: (ORDER.index(n) if n in ORDER else 99, n))
    by_kind = {str(section.labels["task"]): series_of(section) for section in found}
    labels = list(dict.fromkeys(one.label for name in names for one in by_kind[name]))
    judged = {name: cannot(series) for name, series in by_kind.items()}
    failed, known = {name for name in names if judged[name][0]}, any(is_known for _, is_known in judged.values())
    scores = {
        label: {name: one.points for name in names for one in by_kind[name] if one.label == label} for label in labels
    }
    first = found[0]
    title = join_words(str(first.labels.get("corpus") or ""), first.base_model)
    kinds = [(label, _kind_table(label, scores[label], failed)) for label in labels]
    note = (
        NOT_KNOWN
        if not known
        else f"{MARK.strip()} fails inside its native window already (score there below {FAILED:g}): "
        + ", ".join(name for name in names if name in failed)
        if failed
        else f"Every kind reaches {FAILED:g} at the native window."
    )
    return RulerTables(title, _mean_table(title, scores, failed), kinds, note)


def _kind_table(label: str, points: dict[str, dict[int, Row]], failed: set[str]) -> Table:
    windows = sorted({window for row in points.values() for window in row})
    body: list[tuple[str, list[Cell | None]]] = []
    for name, row in points.items():
        cells = [None if w not in row else _cell(row[w], f"n = {row[w]['n']}") for w in windows]
        body.append((name + (MARK if name in failed else ""), cells))
    columns = [[row[w] for row in points.values() if w in row] for w in windows]
    head, foot = ["kind", *map(format_window, windows)], count_foot("prompts", columns)
    return Table(f"RULER, {label}", head, body, foot, notes=beyond_notes(columns))


def _mean_table(title: str, scores: dict[str, dict[str, dict[int, Row]]], failed: set[str]) -> Table:
    """Means over kinds, of those that a checkpoint has at all of its windows; a second row without the marked ones."""
    windows = sorted({w for kinds in scores.values() for row in kinds.values() for w in row})
    body: list[tuple[str, list[Cell | None]]] = []
    for label, kinds in scores.items():
        own = sorted({w for row in kinds.values() for w in row})
        complete = [name for name, row in kinds.items() if set(own) <= set(row)]
        able = [name for name in complete if name not in failed]
        for names, what in ((complete, f"{len(complete)} kinds"), (able, f"{len(able)} unmarked")):
            if names and (names is complete or len(able) < len(complete)):
                cells = [None if w not in own else _cell(_mean([kinds[n][w] for n in names]), what) for w in windows]
                body.append((f"{label}, {what}", cells))
    rows = [points for kinds in scores.values() for points in kinds.values()]
    columns = [[points[window] for points in rows if window in points] for window in windows]
    head, foot = ["mean over kinds", *map(format_window, windows)], count_foot("prompts a kind", columns)
    return Table(f"RULER, means, {title}", head, body, foot, notes=beyond_notes(columns))


def _mean(rows: Sequence[Row]) -> Row:
    """Mean over kinds; its interval from theirs, where all have one, and beyond training if they are."""
    values = [row["value"] for row in rows]
    mean: Row = {"value": sum(values) / len(values), BEYOND: any(row.get(BEYOND) for row in rows)}
    if all(row.get("low") is not None for row in rows):
        ends = [Interval(row["low"], row["high"]) for row in rows]
        mean |= interval_fields(interval_of_average(values, ends, [1 / len(values)] * len(values)))
    return mean


def _cell(row: Row, note: str) -> Cell:
    ends, mark = interval_text(row, "{:.2f}".format), beyond_mark(row)
    return Cell(f"{row['value']:.2f}", share=1 - row["value"], note=note, interval=ends, mark=mark)
