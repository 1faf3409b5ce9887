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
from e2llm.report.series import Row, Section, Series, hero, rival, sections, series_of
from e2llm.report.shared_documents import mark_of


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
        before, after = rival(series), hero(series)
        shared = _windows(before, after) if before and after else set()
        if before and after and shared and (best is None or max(shared) > best.window):
            best = _Pair(section, before, after, max(shared))
    return best


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
