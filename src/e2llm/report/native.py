"""What a checkpoint cannot do inside its native window: there a longer window says nothing about the extension.

Flows in: series of shares by window. Flows out: which of them fail. The one rule for RULER and retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence

from e2llm.report.series import Row, Section, Series, series_of

FAILED = 0.25
"""A share below this at the native window counts as something that the model cannot do at all."""
MARK = "\u00a0†"
"""After a name, on its line."""
NOT_KNOWN = "No window at or below the native one was measured, so what the base cannot do at all is not known."


def native_row(series: Series) -> Row | None:
    """The row at the longest window measured up to the native one, or at the smallest window where the native one is
    not known; None where only longer windows were measured."""
    windows = sorted(series.points)
    natives = [row["native_window"] for row in series.points.values() if row.get("native_window")]
    inside = [w for w in windows if w <= max(natives)] if natives else windows[:1]
    return series.points[inside[-1]] if inside else None


def fails(series: Series) -> bool:
    """Whether its share at the native window is below FAILED."""
    row = native_row(series)
    return row is not None and row["value"] < FAILED


def cannot(series: Sequence[Series]) -> tuple[bool, bool]:
    """Whether the base (else every checkpoint) fails by all of its methods; whether that is known."""
    judged = [one for one in series if one.is_base] or list(series)
    known = [one for one in judged if native_row(one) is not None]
    return bool(known) and all(map(fails, known)), bool(known)


def failing_note(section: Section) -> str:
    """The sentence beneath a retrieval table: what in it fails, or that nothing is known of that; "" where nothing
    fails."""
    if section.metric != "retrieval":
        return ""
    series = series_of(section)
    return failing_sentence(series) or ("" if cannot(series)[1] else NOT_KNOWN)


def failing_sentence(series: Sequence[Series]) -> str:
    """Which of them fail inside their native window; "" where none does."""
    names = [one.label for one in series if fails(one)]
    more = ": longer windows say nothing about the extension" if cannot(series)[0] else ""
    where = f"inside its native window (share there below {FAILED:g})"
    sentence = f"{MARK.strip()} fails {where}{more}: {', '.join(names)}."
    return sentence if names else ""
