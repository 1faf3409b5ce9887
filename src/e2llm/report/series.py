"""Rows of many Records -> sections that may be compared, and in them one series a (checkpoint, method).

Flows in: Records. Flows out: `Section` and `Series`; tables and figures are drawn from these and from nothing else.
Knows which labels may stand side by side: never two base models, corpora, protocols or tasks in one table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from e2llm.intervals import interval_fields, wilson
from e2llm.records import INTERVAL_FIELDS, Record, labels_of, merge, source_names
from e2llm.report.beyond import LABEL as BEYOND
from e2llm.report.formats import PROTOCOL_NAMES, TASK_NAMES, format_scale, join_words
from e2llm.report.shared_documents import COMPARISON, documents_by_row, on_shared_documents

Row = dict[str, Any]

APART = ("base_model", "corpus", "protocol", "task", "language")
"""Labels that divide rows into sections: values across them are not comparable."""

HEROES = ("recommended", "extended")
"""Checkpoints a report is about, first choice first."""

_METHOD_ORDER = ("", "none", "self_extend", "linear", "ntk", "dynamic_ntk", "yarn", "longrope")
_AXES = {"checkpoint", "method", "window", "scale", "depth", "native_window", BEYOND, COMPARISON, *APART}


@dataclass(frozen=True)
class Series:
    """One line of a figure, one row of a table: `points` maps a window (tokens) to the row measured there.

    `key`: the labels that make the series, at least checkpoint and method.
    """

    key: dict[str, Any]
    points: dict[int, Row]

    @property
    def checkpoint(self) -> str:
        return str(self.key["checkpoint"] or "")

    @property
    def method(self) -> str:
        return str(self.key["method"] or "")

    @property
    def extra(self) -> str:
        return join_words(
            *(_extra(name, value) for name, value in self.key.items() if name not in ("checkpoint", "method"))
        )

    @property
    def label(self) -> str:
        return " · ".join(part for part in (self.checkpoint, self.method, self.extra) if part)

    @property
    def is_base(self) -> bool:
        """Nothing trained it: `base`, or `base-METHOD` in comparisons whose contestants have one name each."""
        return self.checkpoint == "base" or self.checkpoint.startswith("base-")

    def owns(self, row: Row) -> bool:
        """Whether a row belongs to this series, at whatever window, scale and depth."""
        return all(row.get(name) == value for name, value in self.key.items() if name != "scale")


@dataclass(frozen=True)
class Section:
    """Rows of one metric that may be compared with each other, and what they share."""

    metric: str
    labels: dict[str, Any]
    rows: list[Row]

    @property
    def title(self) -> str:
        corpus, task = str(self.labels.get("corpus") or ""), str(self.labels.get("task") or "")
        protocol = str(self.labels.get("protocol") or "")
        return join_words(
            TASK_NAMES.get(task, task),
            corpus,
            PROTOCOL_NAMES.get(protocol, protocol),
            str(self.labels.get("language") or ""),
        )

    @property
    def base_model(self) -> str:
        return str(self.labels.get("base_model") or "")


OTHER_DOCUMENTS = {"calibrate": "calibration", "study": "study"}
"""Kind of a Record -> protocol of its rows, where they are of other documents than results are."""


def all_rows(records: Sequence[Record]) -> list[Row]:
    """Rows of all Records, with `source`, and with `native_window` where only the Record's config gives it.

    Those of a calibration and of a study get a protocol of that name: they read documents that results must not be
    compared with. Perplexities that will stand in one table are of the same documents, or marked
    (`shared_documents`).
    """
    names = source_names(records)
    natives = dict(zip(names, (config_number(r.config, "native_window") for r in records), strict=True))
    apart = {name: OTHER_DOCUMENTS.get(r.kind) for name, r in zip(names, records, strict=True)}
    rows = merge(records)
    for row in rows:
        if apart[row["source"]]:
            row["protocol"] = apart[row["source"]]
        native = natives[row["source"]]
        if row.get("native_window") is None and native is not None:
            row["native_window"] = native
        row |= _answers_interval(row)
    documents = [own for record in records for own in documents_by_row(record)]
    return on_shared_documents(rows, documents, [_table_of(row) for row in rows])


def _answers_interval(row: Row) -> dict[str, float]:
    """Wilson's interval of a retrieval row that was written without one: share and n of right or wrong answers say it
    all. {} for other rows."""
    right = row["value"] * row["n"]
    if row["metric"] != "retrieval" or row.get("low") is not None or abs(right - round(right)) > 1e-6:
        return {}
    return interval_fields(wilson(row["value"], row["n"]))


def _table_of(row: Row) -> tuple[Any, ...] | None:
    """What perplexities of one table have in common; None for rows of other tables."""
    if row["metric"] != "perplexity" or row.get("window") is None:
        return None
    return row.get("choice") is None, *(row.get(label) for label in APART)


def sections(rows: Iterable[Row], metric: str) -> list[Section]:
    """The comparable groups of a metric's rows that have a window, in order of first appearance; rows that compare a
    chosen scale with fixed ones stand apart (`choice_sections`)."""
    return _grouped((row for row in rows if row.get("choice") is None), metric)


def choice_sections(rows: Iterable[Row], metric: str) -> list[Section]:
    """As `sections`, of the rows that compare a chosen scale with fixed ones."""
    return _grouped((row for row in rows if row.get("choice") is not None), metric)


def _grouped(rows: Iterable[Row], metric: str) -> list[Section]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["metric"] == metric and row.get("window") is not None:
            groups[tuple(row.get(label) for label in APART)].append(row)
    return [Section(metric, dict(zip(APART, key, strict=True)), group) for key, group in groups.items()]


def series_of(section: Section) -> list[Series]:
    """One series a (checkpoint, method), the base first; each point is at the scale that serves its window.

    Where that leaves two rows for one point, the labels they differ in become part of those series' names, so that
    nothing is averaged or dropped: seeds, or files when the same was measured twice.
    """
    found = _apart(over_depths(section.rows), ("checkpoint", "method"))
    return sorted(found, key=_order)  # stable: other checkpoints keep the order of the files


def _apart(rows: Sequence[Row], names: tuple[str, ...]) -> list[Series]:
    """Series by the labels `names`; a group that holds two rows of one point by what these differ in too, it alone."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row.get(name) for name in names)].append(row)
    found = []
    for key, group in groups.items():
        more = tuple(sorted(_colliding(group) - set(names)))
        found += _apart(group, names + more) if more else [_series(dict(zip(names, key, strict=True)), group)]
    return found


def over_depths(rows: Sequence[Row]) -> list[Row]:
    """Rows without a depth; where only single depths were saved, their mean weighted by n."""
    whole = [row for row in rows if row.get("depth") is None]
    have = {_identity(row) for row in whole}
    parts: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("depth") is not None and _identity(row) not in have:
            parts[_identity(row)].append(row)
    for group in parts.values():
        n = sum(row["n"] for row in group)
        mean = sum(row["value"] * row["n"] for row in group) / n
        kept = {k: v for k, v in group[0].items() if k not in ("depth", *INTERVAL_FIELDS)}
        mean_row = {**kept, "value": mean, "n": n}
        whole.append(mean_row | _answers_interval(mean_row))
    return whole


def serving_row(rows: Sequence[Row]) -> Row:
    """Of one window's rows at several scales, the one served: the smallest scale that covers the window.

    The largest scale if none covers it. The rows have to know their native window.
    """
    need = rows[0]["window"] / rows[0]["native_window"] if len(rows) > 1 else 0.0
    enough = [row for row in rows if row.get("scale", 1.0) >= need * (1 - 1e-9)]
    return min(enough, key=_scale) if enough else max(rows, key=_scale)


def grid_rows(section: Section, series: Series) -> list[Row]:
    """A series' rows over all scales and depths together; none where fewer than two windows have several scales."""
    rows = [row for row in section.rows if series.owns(row)]
    rows = [row for row in rows if row.get("scale") is not None and row.get("depth") is None]
    several = {row["window"] for row in rows if any(o["window"] == row["window"] and o is not row for o in rows)}
    return rows if len(several) > 1 else []


def hero(series: Sequence[Series]) -> Series | None:
    """The series that the report is about: a checkpoint of HEROES, else the one reaching furthest, best value there."""
    trained = [one for one in series if not one.is_base and one.points]
    for name in HEROES:
        named = [one for one in trained if one.checkpoint == name]
        if named:
            trained = named
            break
    sign = {"retrieval": -1}.get(next(iter(trained[0].points.values()))["metric"], 1) if trained else 1
    return min(trained, key=lambda s: (-max(s.points), sign * s.points[max(s.points)]["value"]), default=None)


def rival(series: Sequence[Series]) -> Series | None:
    """What the hero is compared with: the base as it comes, without a method, else the first base series."""
    base = [one for one in series if one.is_base]
    return next((one for one in base if one.method in ("", "none")), base[0] if base else None)


def config_number(config: Any, name: str) -> float | None:
    """The one positive number that a config has under a name, at any depth; None if it has none or several."""
    found: set[float] = set()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            number = value.get(name)
            if isinstance(number, int | float) and number > 0:
                found.add(number)
            for inner in value.values():
                visit(inner)
        elif isinstance(value, list):
            for inner in value:
                visit(inner)

    visit(config)
    return found.pop() if len(found) == 1 else None


def _series(key: dict[str, Any], rows: Sequence[Row]) -> Series:
    points = {w: serving_row([r for r in rows if r["window"] == w]) for w in sorted({r["window"] for r in rows})}
    return Series(key, points)


def _extra(name: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{name} {format_scale(value) if isinstance(value, float) else value}"


def _colliding(group: Sequence[Row]) -> set[str]:
    """Labels that tell apart the rows of a group which would stand in the same place."""
    places: dict[Any, list[Row]] = defaultdict(list)
    for row in group:
        known = row.get("native_window") is not None
        places[row["window"], row.get("scale") if known else None].append(row)
    for rows in places.values():
        if len(rows) < 2:
            continue
        free = {name for row in rows for name in labels_of(row)} - (_AXES - {"scale", "native_window"})
        differing = {name for name in free if len({row.get(name) for row in rows}) > 1}
        return differing - {"source"} or differing
    return set()


def _identity(row: Row) -> frozenset[tuple[str, Any]]:
    return frozenset((k, v) for k, v in labels_of(row).items() if k != "depth")


def _scale(row: Row) -> float:
    return float(row.get("scale") or 1.0)


def _order(series: Series) -> tuple[int, int]:
    method = _METHOD_ORDER.index(series.method) if series.method in _METHOD_ORDER else len(_METHOD_ORDER)
    return (0, method) if series.is_base else (1, 0)
