"""A long text as a sequence of its words: one string and where each word begins.

Strings of their own would take ten times the text's size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import overload

import numpy as np

_WORD = re.compile(r"\S+\s*")


class RunningWords(Sequence[str]):
    """Words of a text, each with the space after it; space before the first one is left out. A slice is a list."""

    def __init__(self, text: str) -> None:
        self._text = text
        starts = np.fromiter((found.start() for found in _WORD.finditer(text)), dtype=np.int64)
        self._bounds = np.append(starts, len(text))
        """Where each word begins, and the text's end."""

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, which: int) -> str: ...
    @overload
    def __getitem__(self, which: slice) -> list[str]: ...
    def __getitem__(self, which: int | slice) -> str | list[str]:
        if isinstance(which, slice):
            starts, ends = self._bounds[:-1][which].tolist(), self._bounds[1:][which].tolist()
            return [self._text[start:end] for start, end in zip(starts, ends, strict=True)]
        return self._text[self._bounds[:-1][which] : self._bounds[1:][which]]

    def beginning(self, count: int) -> str:
        """The first `count` words, or all, as one text."""
        return self._text[self._bounds[0] : self._bounds[min(count, len(self))]]
