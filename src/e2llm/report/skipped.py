"""What a suite of tasks left out, under its table: also of tasks that have no row, since nothing of them could be used.

Flows in: one suite's rows and the Records that they come from. Flows out: sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from e2llm.records import Record, source_names
from e2llm.report.formats import format_count, format_window, join_words
from e2llm.report.series import Row

_LONGEST = 120
"""Characters of a reason; the Record has the rest."""


def skipped_notes(rows: Sequence[Row], records: Sequence[Record]) -> tuple[str, ...]:
    """A line for each Record that left something out: "Skipped, NAME: qasper 12 of 12 (first reason)"; and one for the
    tasks that its folder has no data of."""
    lines: dict[str, None] = {}
    for name, record in zip(source_names(records), records, strict=True):
        own = [row for row in rows if row["source"] == name]
        skipped, absent = record.config.get("skipped"), record.config.get("tasks_without_data")
        if not own:
            continue
        who = " · ".join(str(own[0][key]) for key in ("checkpoint", "method") if own[0].get(key))
        if isinstance(skipped, dict) and skipped:
            tasks = [_task(task, about, own) for task, about in skipped.items()]
            lines[f"{join_words('Skipped', who)}: {'; '.join(tasks)}."] = None
        if absent:
            why = absent if isinstance(absent, dict) else dict.fromkeys(absent, "")
            tasks = [f"{task}{_why(str(reason))}" for task, reason in why.items()]
            lines[f"{join_words('No data', who)}: {'; '.join(tasks)}."] = None
    return tuple(lines)


def _task(task: str, about: Any, rows: Sequence[Row]) -> str:
    """One task: how many of how many, by window where windows differ, and the first reason."""
    about = about if isinstance(about, dict) else {}
    own = {_cell(row): row for row in rows if row.get("task") == task}
    reasons = about.get("reasons") or []
    # An entry is "which sample: why"; the count says which, the sentence says why.
    reason = str(reasons[0]).partition(": ")[2] or str(reasons[0]) if reasons else ""
    if not own:
        count = format_count(int(about.get("count") or 0))
        return f"{task} {count} of {count}{_why(reason)}"
    cells = dict.fromkeys(_cell(row) for row in rows if "task" in row)
    texts = {cell: _count(own.get(cell)) for cell in cells}
    if len(set(texts.values())) == 1:
        return f"{task} {next(iter(texts.values()))}{_why(reason)}"
    by_cell = (f"{text} at {format_window(window)}" for (window, _scale), text in texts.items())
    return f"{task} {', '.join(by_cell)}{_why(reason)}"


def _count(row: Row | None) -> str:
    if row is None:
        return "all"
    left = int(row.get("skipped") or 0)
    return f"{format_count(left)} of {format_count(left + row['n'])}"


def _cell(row: Row) -> tuple[int, float | None]:
    return row.get("window") or 0, row.get("scale")


def _why(reason: str) -> str:
    short = reason if len(reason) <= _LONGEST else reason[: _LONGEST - 1].rstrip() + "…"
    return f" ({short})" if short else ""
