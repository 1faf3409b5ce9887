"""How many keys of a whole window each earlier key of a training window stands for.

A training window of R tokens that is spread over W positions holds R of the W keys that a served window has: a softmax
over it sees the near tokens at their full number and the far ones thinned out W / R times. Served, the far keys are
all there, and together they draw attention from the near ones as no training step has shown. Counting a far key as
the positions it stands for makes the sums of a training window those of a whole one. Flows in: positions of a window's
tokens. Flows out: the segment of each, and the logarithm of that number. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FarKeys:
    """What a window's tokens add to their scores with keys of earlier segments."""

    segments: np.ndarray
    """(R,) int64, from 0: tokens whose positions follow one another without a gap."""
    bias: np.ndarray
    """(R,) float32 >= 0: added to every score of this query with a key of an earlier segment; none is added to scores
    with the leading tokens."""
    leading_tokens: int
    """Tokens at the start that each stand for themselves: a served window has no more of them."""
    most_segments: int
    """Segments that a window drawn like this can have."""


def far_keys(positions: np.ndarray, *, leading_tokens: int, weight: float, most_segments: int) -> FarKeys:
    """The bias `weight` * ln(positions / tokens) that stand before the segment of each token, leading tokens left out.

    positions: (R,) int64, strictly increasing. weight: 0 counts every key once, 1 as all the positions it stands for.
    """
    begins = np.concatenate([[True], np.diff(positions) != 1])
    segments = np.cumsum(begins) - 1
    first = np.flatnonzero(begins)[segments]  # of each token's segment
    tokens = np.maximum(first - leading_tokens, 1)
    spread = np.maximum(positions[first] - leading_tokens, 1)
    bias = (weight * np.log(np.maximum(spread / tokens, 1.0))).astype(np.float32)
    return FarKeys(segments, bias, leading_tokens, most_segments)
