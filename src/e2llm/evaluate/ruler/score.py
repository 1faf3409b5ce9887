"""How RULER scores: the share of the expected strings that occur in the answer, or whether any of them does.

Both are the definitions of arXiv 2404.06654 (Sect. 3, "recall-based accuracy"). Case does not count; control
characters count as line breaks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def match_all(answer: str, expected: Sequence[str]) -> float:
    """Share of `expected` found in `answer`."""
    text = _plain(answer)
    return sum(_plain(one) in text for one in expected) / len(expected)


def match_part(answer: str, expected: Sequence[str]) -> float:
    """1 if any of `expected` is found in `answer`, else 0 (the questions over documents: several spellings of one
    answer)."""
    text = _plain(answer)
    return float(any(_plain(one) in text for one in expected))


def _plain(text: str) -> str:
    return _CONTROL.sub("\n", text).strip().lower()
