"""What the page says first: one sentence and up to three figures, made from the rows.

Flows in: rows. Flows out: `Headline`. States what was measured, better or worse; it never chooses words by the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from e2llm.report.formats import (
    METRIC_NAMES,
    TASK_NAMES,
    format_count,
    format_scale,
    format_value,
    format_window,
    join_words,
    sentence_case,
)
from e2llm.report.native import FAILED, fails
from e2llm.report.series import HEROES, Row, Section, Series, hero, rival, sections, series_of
from e2llm.report.shared_documents import mark_of
from e2llm.report.task_tables import SET_NAMES

SETS = ("all18", "all21", "en14", "zh4")
"""Sets of LongBench's tasks that a headline may be about, first choice first."""


@dataclass(frozen=True)
class Headline:
    """`tiles`: (figure, what it is). In figures and sentence "→" stands between before and after."""

    sentence: str
    detail: str = ""
    tiles: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Pair:
    """The checkpoint a section is about beside its base, at the longest window measured for both."""

    section: Section
    before: Series
    after: Series
    window: int

    def values(self, window: int) -> str:
        rows = (self.before.points[window], self.after.points[window])
        return " → ".join(format_value(row["metric"], row["value"]) for row in rows)


def headline(rows: Sequence[Row], num_files: int) -> Headline:
    """The longest window at which a base and an extended checkpoint meet; less where the rows hold less."""
    pairs = {metric: _pair(sections(rows, metric)) for metric in ("perplexity", "retrieval")}
    for metric, pair in pairs.items():
        if pair is not None:
            return Headline(
                f"At {format_count(pair.window)} tokens, {_name(pair.section)} {pair.values(pair.window)}",
                f"From {pair.before.label} to {pair.after.label}. {sentence_case(pair.section.title)}.",
                _tiles(pair, pairs["retrieval"] if metric == "perplexity" else None),
            )
    for metric in pairs:
        alone = _alone(sections(rows, metric))
        if alone is not None:
            return alone
    found = _longbench(rows)
    if found is not None:
        return found
    steps = sorted(
        (row for row in rows if row["metric"] == "loss" and row.get("step") is not None), key=lambda r: r["step"]
    )
    steps = [row for row in steps if row.get("split") in (None, "train")]
    if len(steps) > 1:
        values = " → ".join(format_value("loss", row["value"]) for row in (steps[0], steps[-1]))
        return Headline(f"Training loss {values} at step {format_count(steps[-1]['step'])}")
    files = "one file" if num_files == 1 else f"{num_files} files"
    measurements = "1 measurement" if len(rows) == 1 else f"{format_count(len(rows))} measurements"
    return Headline(f"{measurements} in {files}")


def _pair(found: Sequence[Section]) -> _Pair | None:
    best: _Pair | None = None
    for section in found:
        series = series_of(section)
        after = hero(series)
        bases = [one for one in series if one.is_base]
        first = rival(series)
        # The rival, and another base only where that one was measured on other documents.
        meeting = [(one, _windows(one, after)) for one in sorted(bases, key=lambda one: one is not first) if after]
        before, shared = next(((one, windows) for one, windows in meeting if windows), (None, set()))
        if before and after and (best is None or max(shared) > best.window):
            best = _Pair(section, before, after, max(shared))
    return best


def _longbench(rows: Sequence[Row]) -> Headline | None:
    """LongBench's plain mean over the first of SETS that there is: the base's at its longest window, and that of the
    checkpoint a report is about."""
    own = [row for row in rows if row.get("suite") == "longbench" and row.get("average") == "plain"]
    own = [row for row in own if row.get("choice") is None]
    for name in SETS:
        some = sorted((row for row in own if row["tasks"] == name), key=lambda row: row["window"])
        if not some:
            continue
        some = [row for row in some if row.get("base_model") == some[-1].get("base_model")]
        trained = [row for row in some if row.get("checkpoint") != "base"]
        named = [row for wanted in reversed(HEROES) for row in trained if row.get("checkpoint") == wanted]
        before = next((row for row in reversed(some) if row.get("checkpoint") == "base"), None)
        after = named[-1] if named else trained[-1] if trained else None
        pair = [row for row in (before, after) if row is not None]
        values = " → ".join(f"{100 * row['value']:.1f}" for row in pair)
        which = " to ".join(f"{_whose(row)} at {format_window(row['window'])}" for row in pair)
        detail = f"{sentence_case(which)}, mean over {SET_NAMES[name]} tasks, in percent."
        return Headline(f"LongBench {values}", detail)
    return None


def _whose(row: Row) -> str:
    return " · ".join(str(row[key]) for key in ("checkpoint", "method") if row.get(key))


def _windows(before: Series, after: Series) -> set[int]:
    """Windows at which both were measured, on the same documents."""
    both = set(before.points) & set(after.points)
    return {window for window in both if mark_of(before.points[window]) == mark_of(after.points[window])}


def _alone(found: Sequence[Section]) -> Headline | None:
    for section in found:
        series = series_of(section)
        one = hero(series) or rival(series)
        if one is not None:
            window = max(one.points)
            value = format_value(section.metric, one.points[window]["value"])
            name = _name(section)
            return Headline(
                f"{sentence_case(name)} {value} at {format_count(window)} tokens",
                join_words(one.label, section.title, section.base_model),
            )
    return None


def _tiles(pair: _Pair, retrieval: _Pair | None) -> list[tuple[str, str]]:
    tiles = []
    longest = max(pair.after.points)
    native = pair.after.points[longest].get("native_window")
    if native:
        reach = f"{format_scale(longest / native)}×"
        tiles.append((reach, f"the native window: {format_window(native)}, measured to {format_window(longest)}"))
        if native in _windows(pair.before, pair.after):
            tiles.append((pair.values(native), f"{_name(pair.section)} at {format_window(native)}, the native window"))
    if longest > pair.window:
        value = format_value(pair.section.metric, pair.after.points[longest]["value"])
        tiles.append((value, f"{_name(pair.section)} at {format_window(longest)}, {pair.after.label}"))
    if retrieval is not None:
        n = format_count(retrieval.after.points[retrieval.window]["n"])
        what = f"{_name(retrieval.section)} at {format_window(retrieval.window)}, share of {n} prompts"
        failing = [one.label for one in (retrieval.before, retrieval.after) if fails(one)]
        what += f"; {' and '.join(failing)} below {FAILED:g} at the native window already" if failing else ""
        tiles.append((retrieval.values(retrieval.window), what))
    return tiles


def _name(section: Section) -> str:
    task = str(section.labels.get("task") or "")
    name = METRIC_NAMES.get(section.metric, section.metric).lower()
    return f"{TASK_NAMES.get(task, task.replace('_', ' '))} {name}" if task else name
