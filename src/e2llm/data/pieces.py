"""Text that jumps where positions do: a training window made of pieces instead of one row of tokens.

Flows in: the places and widths of a sample's jumps. Flows out: which tokens of a document stand where. Knows neither
what draws the jumps nor what holds the tokens. R = window, J = jumps of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Jumps:
    """Where one sample's positions jump, and where its text goes on then."""

    places: np.ndarray
    """(J,) int64, the first token after each jump, ascending, in 1…R-1."""
    steps: np.ndarray
    """(J,) int64, positions that each leaves out, at least 1."""
    other_documents: bool
    """Each piece is from elsewhere; else further on in the same document, as far as the positions say where the
    document is long enough, and all nearer in proportion where it is not."""

    @staticmethod
    def of(positions: np.ndarray, *, other_documents: bool) -> Jumps:
        """Those of strictly increasing positions (R,)."""
        skipped = np.diff(positions) - 1
        places = np.flatnonzero(skipped)
        return Jumps(places + 1, skipped[places].astype(np.int64), other_documents)

    def __len__(self) -> int:
        return len(self.places)


def piece_offsets(jumps: Jumps, window: int, room: int) -> np.ndarray:
    """Tokens (R,) int64 that a document leaves out before each token of the window, for a document that goes on for
    `room` tokens after R of its tokens: the positions' own steps where they fit in, else all of the room by their
    shares."""
    passed = np.cumsum(jumps.steps)
    if passed[-1] > room:
        passed = passed * room // passed[-1]
    offsets = np.zeros(window, dtype=np.int64)
    for place, total in zip(jumps.places, passed, strict=True):
        offsets[place:] = total
    return offsets
