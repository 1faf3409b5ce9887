"""Losses of one document summed over contiguous blocks of its tokens: what an interval within a document is made of.

Flows in: nats of tokens in the document's order. Flows out: (nats, tokens) of each block. Neighbouring tokens are
alike, so that blocks are drawn again and not tokens: the block bootstrap (Künsch 1989) with blocks that do not
overlap (Carlstein 1986).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch

BLOCKS = 64
LEAST_TOKENS = 16
"""A document too short for 64 such blocks has fewer; one that is too short for two has none."""

Blocks = tuple[tuple[float, int], ...]
"""(nats, tokens) of each block, in the document's order."""


def array_blocks(nats: np.ndarray) -> Blocks:
    """Blocks of (T,) nats, in order; NaN is not counted."""
    values = nats[~np.isnan(nats)]
    return tuple((float(values[own].sum(dtype=np.float64)), own.stop - own.start) for own in block_slices(len(values)))


def block_slices(tokens: int) -> list[slice]:
    """The blocks of so many tokens."""
    return [slice(low, high) for low, high in itertools.pairwise(_edges(0, tokens))]


class BlockSums:
    """Blocks of the tokens first … end - 1, added up piece by piece on the model's device without waiting for it."""

    def __init__(self, first: int, end: int) -> None:
        self._edges = _edges(first, end)
        self._sums: list[torch.Tensor | float] = [0.0] * (len(self._edges) - 1)

    def add(self, start: int, nats: torch.Tensor) -> None:
        """`nats` (T,) of the tokens start … start + T - 1; what is not counted is 0."""
        edges = self._edges
        first = max(0, int(np.searchsorted(edges, start, side="right")) - 1)
        for block in range(first, len(self._sums)):
            low, high = max(edges[block] - start, 0), min(edges[block + 1] - start, len(nats))
            if low >= len(nats):
                break
            self._sums[block] = self._sums[block] + nats[low:high].sum(dtype=torch.float64)

    def blocks(self, count: Callable[[int, int], int]) -> Blocks:
        """`count`: tokens counted among low … high - 1."""
        tokens = [count(low, high) for low, high in itertools.pairwise(self._edges)]
        return tuple((float(nats), n) for nats, n in zip(self._sums, tokens, strict=True))


def _edges(first: int, end: int) -> list[int]:
    blocks = min(BLOCKS, (end - first) // LEAST_TOKENS)
    return np.linspace(first, end, blocks + 1).round().astype(int).tolist() if blocks > 1 else [first]
