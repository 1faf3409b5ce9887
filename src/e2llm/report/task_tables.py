"""Tables of suites of tasks: scores in percent with confidence intervals, overall figures, the paper's own beside.

Flows in: rows of Records that have a `suite`. Flows out: `TaskSection`s of `Table`s, the same for Markdown and page.
Never two base models in one table. One column is one (checkpoint, method, window, scale).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from e2llm.records import Record
from e2llm.report.beyond import beyond_mark, beyond_notes
from e2llm.report.formats import format_count, format_scale, format_window, join_words
from e2llm.report.quoted import LONGBENCH, MARK, SHORT, SHORT_AVERAGED, SHORT_COLUMNS, SHORT_TASKS, Quoted
from e2llm.report.quoted_tables import printed
from e2llm.report.series import Row
from e2llm.report.skipped import skipped_notes
from e2llm.report.tables import Cell, Table, interval_text

SUITE_NAMES = {"longbench": "LongBench", "leval": "L-Eval, closed tasks", "short": "Short tasks"}
SET_NAMES = {
    "en14": "14 EN",
    "zh4": "4 ZH",
    "all18": "all 18",
    "en16": "EN 16",
    "zh7": "ZH 5 + 2 code",
    "all21": "all 21",
}
_AVERAGES = {"plain": "plain means over tasks", "macro": "macro-averages over groups of tasks"}
_OURS = f"average of {len(SHORT_AVERAGED)}"
"""Ours of the paper's short tasks: all but one."""
_NOTE = (
    "Percent, with 95 % intervals over samples; higher is better. n: samples scored. What was cut, left out or guessed "
    "is counted in the files."
)
_QUOTED = {
    "longbench": f"Rows marked “{MARK}” are printed in the E²-LLM paper: other models, the same 18 tasks. "
    "*: printed so, against its own cells.",
    "short": f"“{MARK}”: printed in the E²-LLM paper, Table 7, for other models, by an accuracy that it does not name.",
}


@dataclass(frozen=True)
class TaskSection:
    """One suite on one base model."""

    title: str
    note: str
    tables: list[Table]


def task_sections(rows: Iterable[Row], records: Sequence[Record] = ()) -> list[TaskSection]:
    """Sections in order of first appearance; rows that compare a chosen scale with fixed ones stand apart
    (`choice`). `records`: where the rows come from, which say what was left out."""
    groups: dict[tuple[Any, Any], list[Row]] = {}
    for row in rows:
        if row.get("suite") is not None and row.get("choice") is None:
            groups.setdefault((row["suite"], row.get("base_model")), []).append(row)
    return [
        _section(str(suite), str(model or ""), group, skipped_notes(group, records))
        for (suite, model), group in groups.items()
    ]


def _section(suite: str, base_model: str, rows: Sequence[Row], skipped: tuple[str, ...]) -> TaskSection:
    title = join_words(SUITE_NAMES.get(suite, suite), base_model)
    columns = _columns(rows)
    tables = [_task_table(title, [row for row in rows if "task" in row], columns, skipped)]
    overall = [row for row in rows if row["metric"] == "average" and "task" not in row]
    quoted = LONGBENCH if suite == "longbench" else ()
    for average, name in _AVERAGES.items():
        some = [row for row in overall if row["average"] == average]
        if some:  # the paper prints plain means alone
            tables.append(_overall_table(f"{title}: {name}", some, columns, quoted if average == "plain" else ()))
    in_table_7 = suite == "short" and any(row.get("task") in SHORT_TASKS for row in rows)
    if in_table_7:
        tables.append(_quoted_table(title, rows, columns))
    about = _QUOTED.get(suite, "") if overall or in_table_7 else ""
    if in_table_7:
        about += _about_average(rows)
    return TaskSection(title, " ".join(part for part in (_NOTE, about) if part), tables)


@dataclass(frozen=True)
class _Column:
    names: tuple[str, ...]
    key: tuple[Any, ...]

    def owns(self, row: Row) -> bool:
        return tuple(row.get(name) for name in self.names) == self.key

    @property
    def label(self) -> str:
        has = dict(zip(self.names, self.key, strict=True))
        parts = [" · ".join(str(has[name]) for name in ("checkpoint", "method") if has[name])]
        if has["window"] is not None:
            parts.append(format_window(has["window"]))
        parts.append("own scales" if has["scale"] is None else f"scale {format_scale(has['scale'])}")
        return join_words(*parts, str(has.get("source") or ""))


def _columns(rows: Sequence[Row]) -> list[_Column]:
    """One for each (checkpoint, method, window, scale), a checkpoint's by window and scale; where two files hold the
    same, one for each file."""
    names: tuple[str, ...] = ("checkpoint", "method", "window", "scale")
    places = [(_place(row), tuple(row.get(name) for name in names)) for row in rows]
    if len(set(places)) < len(places):
        names += ("source",)
    keys = dict.fromkeys(tuple(row.get(name) for name in names) for row in rows)
    whose = list(dict.fromkeys(key[:2] for key in keys))

    def order(key: tuple[Any, ...]) -> tuple[Any, ...]:
        window, scale = key[2:4]
        return whose.index(key[:2]), window or 0, scale is None, scale or 0.0

    return [_Column(names, key) for key in sorted(keys, key=order)]


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("metric", "task", "tasks", "average", "harness_metric", "filter"))


def _task_table(title: str, rows: Sequence[Row], columns: Sequence[_Column], notes: tuple[str, ...]) -> Table:
    places = dict.fromkeys(_place(row) for row in rows)
    body: list[tuple[str, list[Cell | None]]] = []
    for place in places:
        own = [row for row in rows if _place(row) == place]
        name = join_words(task_name(own[0]), _counts(own))
        body.append((name, _cells(own, columns)))
    notes = (*notes, *beyond_notes([rows]))
    return Table(title, ["task", *(column.label for column in columns)], body, notes=notes)


def _counts(rows: Sequence[Row]) -> str:
    low, high = min(row["n"] for row in rows), max(row["n"] for row in rows)
    return f"n = {format_count(low)}" + ("" if low == high else f"–{format_count(high)}")


def _overall_table(title: str, rows: Sequence[Row], columns: Sequence[_Column], quoted: Sequence[Quoted]) -> Table:
    """One row a column of the task table, then the quoted rows; one column a set of tasks. `rows`: of one average."""
    sets = [name for name in SET_NAMES if any(row["tasks"] == name for row in rows)]
    by_set = [[row for row in rows if row["tasks"] == name] for name in sets]
    ours = list(zip(*(_cells(own, columns) for own in by_set), strict=True))
    body: list[tuple[str, list[Cell | None]]] = [
        (f"{column.label}, {_counts([row for row in rows if column.owns(row)])}", list(cells))
        for column, cells in zip(columns, ours, strict=True)
        if any(cells)
    ]
    for one in quoted:
        cells = [printed(one, name) for name in sets]
        if any(cells):
            body.append((f"{MARK} · {one.name}, {one.where}", cells))
    head = [title.rpartition(": ")[2], *(SET_NAMES[name] for name in sets)]
    return Table(title, head, body, notes=beyond_notes(by_set))


def _quoted_table(title: str, rows: Sequence[Row], columns: Sequence[_Column]) -> Table:
    """Our averages, one line a column of the task table and accuracy, then the printed ones: never in one column."""
    ours = [row for row in rows if row["metric"] == "average"]
    head = (_OURS, *SHORT_COLUMNS) if ours else SHORT_COLUMNS
    title += f": average, ours and {MARK} from the paper" if ours else f": {MARK} from the paper"
    body: list[tuple[str, list[Cell | None]]] = [
        (join_words(column.label, str(row["harness_metric"]), _counts([row])), [task_cell(row), None, None])
        for column in columns
        for row in ours
        if column.owns(row)
    ]
    body += [(f"{MARK} · {one.name}, {one.where}", [printed(one, name) for name in head]) for one in SHORT]
    return Table(title, ["model", *head], body)


def _about_average(rows: Sequence[Row]) -> str:
    """What our average is of, or which tasks it lacks."""
    if any(row["metric"] == "average" for row in rows):
        return f" Our {_OURS}: the paper's tasks without RACE-M, by plain or, where a task has it, normalized accuracy."
    run = {row.get("task") for row in rows}
    lacking = [name for name in SHORT_AVERAGED if name not in run]
    return f" No average of ours: without {', '.join(lacking)}." if lacking else " No average of ours in these files."


def _cells(rows: Sequence[Row], columns: Sequence[_Column]) -> list[Cell | None]:
    """One cell a column; the best of several in bold."""
    values = {row["value"] for row in rows}
    best = max(values) if len(values) > 1 else None
    found: list[Cell | None] = []
    for column in columns:
        row = next((row for row in rows if column.owns(row)), None)
        found.append(
            None if row is None else task_cell(row, best=row["value"] == best)
        )
    return found


def task_name(row: Row) -> str:
    """A task with what it was measured by."""
    task = _OURS if row["task"] == "average" else str(row["task"])
    return join_words(task, str(row.get("harness_metric") or row["metric"]))


def task_cell(row: Row, *, best: bool = False) -> Cell:
    """A score in percent, or with its unit where it is no share."""
    ends = interval_text(row, _percent)
    return Cell(_text(row), best=best, note=_note(row), interval=ends, mark=beyond_mark(row))


def _text(row: Row) -> str:
    if row["unit"] != "share":
        return f"{row['value']:.4g} {row['unit']}"
    return _percent(row["value"])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _note(row: Row) -> str:
    counts = ("skipped", "left out"), ("cut", "prompts cut"), ("guessed", "answers guessed")
    more = (f"{format_count(row[name])} {what}" for name, what in counts if row.get(name))
    return join_words(f"n = {format_count(row['n'])}", *more)
