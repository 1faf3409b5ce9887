"""One set of weights, re-scaled for each window, beside the same weights held at fixed scales.

Flows in: rows. Flows out: the one checkpoint that a page shows this of first. Only rows of the same documents and
protocol are put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from e2llm.report.series import (
    HEROES,
    OTHER_DOCUMENTS,
    Row,
    Section,
    choice_sections,
    grid_rows,
    sections,
    series_of,
)

_METRIC = "perplexity"


@dataclass(frozen=True)
class Rescaled:
    """`served`: window (tokens) -> its row at the scale that serves it; `fixed`: scale -> window -> row, by scale, of
    the scales that were read at two windows or more."""

    section: Section
    checkpoint: str
    method: str
    label: str
    served: dict[int, Row]
    fixed: dict[float, dict[int, Row]]


def rescaled(rows: Sequence[Row]) -> Rescaled | None:
    """What the first figure shows; None where no checkpoint was read at two windows and two scales each.

    Of several: one of HEROES before others, a trained one before a base, results before calibrations and studies, then
    the one read furthest, at the most scales.
    """
    return min((*_evaluated(rows), *_chosen(rows)), key=_rank, default=None)


def _rank(found: Rescaled) -> tuple[bool, int, bool, int, int]:
    place = HEROES.index(found.checkpoint) if found.checkpoint in HEROES else len(HEROES)
    apart = found.section.labels.get("protocol") in OTHER_DOCUMENTS.values()
    return found.checkpoint == "base", place, apart, -max(found.served), -len(found.fixed)


def _evaluated(rows: Sequence[Row]) -> Iterator[Rescaled]:
    """Of evaluations at several scales: served is the smallest scale that covers the window."""
    for section in sections(rows, _METRIC):
        for series in series_of(section):
            grid = grid_rows(section, series)
            if all(row.get("native_window") for row in grid):  # else nobody knows which scale is served
                yield from _found(section, series.checkpoint, series.method, series.label, series.points, grid)


def _chosen(rows: Sequence[Row]) -> Iterator[Rescaled]:
    """Of comparisons of the chosen scale with fixed ones."""
    for section in choice_sections(rows, _METRIC):
        for key in dict.fromkeys(_owner(row) for row in section.rows):
            own = [row for row in section.rows if _owner(row) == key]
            chosen = {row["window"]: row for row in sorted(own, key=_window) if row["choice"] == "chosen"}
            fixed = [row for row in own if row["choice"] == "fixed"]
            checkpoint, method, _source = key
            label = " · ".join(part for part in (checkpoint, method) if part)
            yield from _found(section, checkpoint, method, label, chosen, fixed)


def _found(
    section: Section, checkpoint: str, method: str, label: str, served: dict[int, Row], rows: Sequence[Row]
) -> Iterator[Rescaled]:
    scales = sorted({row["scale"] for row in rows})
    fixed = {s: {row["window"]: row for row in sorted(rows, key=_window) if row["scale"] == s} for s in scales}
    fixed = {scale: points for scale, points in fixed.items() if len(points) > 1}
    if len(fixed) > 1 and len(served) > 1:
        yield Rescaled(section, checkpoint, method, label, served, fixed)


def _owner(row: Row) -> tuple[str, str, str]:
    return str(row.get("checkpoint") or ""), str(row.get("method") or ""), str(row.get("source") or "")


def _window(row: Row) -> int:
    return int(row["window"])
