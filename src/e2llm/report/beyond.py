"""What was measured beyond a checkpoint's training: a mark in the cell and a sentence beneath the table.

Flows in: rows. Flows out: marks and notes. Knows no table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LABEL = "beyond_trained"
"""Label of a row whose window or scale is larger than any that its checkpoint was trained for."""
MARK = "#"
_NOTE = f"{MARK} beyond what the checkpoint was trained for: a larger window or scale."


def beyond_mark(row: Mapping[str, Any]) -> str:
    """The mark of a row; "" inside the trained range, and where the Record does not say."""
    return MARK if row.get(LABEL) else ""


def beyond_notes(columns: Iterable[Sequence[Mapping[str, Any]]]) -> tuple[str, ...]:
    """The sentence that a table of these columns needs beneath it, if any."""
    return (_NOTE,) if any(beyond_mark(row) for column in columns for row in column) else ()
