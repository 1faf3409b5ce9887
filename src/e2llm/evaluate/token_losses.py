"""The loss of every token of a document, by whole windows or by the sliding window, and what is made of it.

Flows in: documents, a window, a scale. Flows out: loss by position within the window (does context help?), and how far
whole windows read worse than the sliding window on the same tokens. One float32 a token is held, so a document may be
as long as its tokens can be mapped. W = window, T = tokens of a document.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from e2llm.evaluate.blocks import Blocks, array_blocks
from e2llm.evaluate.documents import Document
from e2llm.evaluate.logits import TokenScorer
from e2llm.evaluate.perplexity import batch_rows, sliding_groups, sliding_steps, token_rows
from e2llm.infer import Engine

BUCKETS_AN_OCTAVE = 2
"""Positions are put together in steps of a half octave: 1, 2, 3, 4, 6, 8, 11, 16 …"""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Reader:
    """What reads a document's windows."""

    engine: Engine
    scorer: TokenScorer
    first_token: int | None = None
    progress: Progress = lambda tokens: None


def whole_losses(reader: Reader, document: Document, *, length: int, window: int) -> np.ndarray:
    """(length / W, W) float32 nats of the first `length` tokens in windows of W; NaN for the first of each window.

    Call inside `engine.at_scale`.
    """
    found = np.full((length // window, window), np.nan, dtype=np.float32)
    rows = batch_rows(reader.engine, window)
    for start in range(0, length // window, rows):
        cut = document.tokens[start * window : min(length, (start + rows) * window)].reshape(-1, window)
        ids = token_rows(reader.engine, cut, reader.first_token)
        found[start : start + len(cut), 1:] = _finite(reader.scorer.nats(ids), document)
        reader.progress(ids.numel())
    return found


def sliding_losses(
    reader: Reader, document: Document, *, length: int, window: int, stride: int, max_strides: int | None
) -> np.ndarray:
    """(length,) float32 nats of each token with up to W - 1 tokens before it; NaN where none is scored.

    Call inside `engine.at_scale`.
    """
    found = np.full(length, np.nan, dtype=np.float32)
    steps = sliding_steps(window, length, stride, max_strides)
    for group in sliding_groups(steps, batch_rows(reader.engine, window)):
        cut = np.stack([document.tokens[step.start : step.end] for step in group])
        ids = token_rows(reader.engine, cut, reader.first_token)
        nats = _finite(reader.scorer.nats(ids, first=group[0].first), document)
        for step, values in zip(group, nats, strict=True):
            found[step.start + step.first : step.end] = values
        reader.progress(ids.numel())
    return found


def position_edges(window: int) -> list[int]:
    """Bounds of the buckets: positions edges[i] … edges[i + 1] - 1; from 1 (position 0 has no context) to W."""
    octaves = range(int(BUCKETS_AN_OCTAVE * np.log2(window)) + 1)
    edges = sorted({round(2 ** (step / BUCKETS_AN_OCTAVE)) for step in octaves} | {1, window})
    return [edge for edge in edges if edge <= window]


@dataclass(frozen=True)
class PositionLoss:
    """One document's loss in one bucket of positions."""

    position: int
    """Last position of the bucket: the most tokens that one in it has before it."""
    nats: float
    tokens: int
    blocks: Blocks = ()
    """By stretches of the document."""


def by_position(losses: np.ndarray) -> list[PositionLoss]:
    """(windows, W) nats, NaN not counted -> one sum a bucket."""
    found = []
    edges = position_edges(losses.shape[1])
    for low, high in itertools.pairwise(edges):
        values = losses[:, low:high]
        scored = values[~np.isnan(values)]
        total = float(scored.sum(dtype=np.float64))
        found.append(PositionLoss(high - 1, total, len(scored), array_blocks(scored)))
    return found


@dataclass(frozen=True)
class Compared:
    """One document read both ways: nats over the same tokens."""

    document: str
    whole_nats: float
    sliding_nats: float
    tokens: int
    blocks: Blocks = ()
    """Of the difference, whole less sliding."""


def compare(
    reader: Reader,
    document: Document,
    *,
    length: int,
    window: int,
    windows: tuple[int, ...],
    stride: int,
    max_strides: int | None,
) -> Compared:
    """Both protocols over the tokens that both score (those of the sliding window that begin no smallest window)."""
    sliding = sliding_losses(reader, document, length=length, window=window, stride=stride, max_strides=max_strides)
    first = (int(np.flatnonzero(~np.isnan(sliding))[0]) // window) * window
    tail = Document(document.name, document.tokens[first:length])
    whole = whole_losses(reader, tail, length=length - first, window=window).reshape(-1)
    both = ~np.isnan(sliding[first:]) & ~np.isnan(whole) & (np.arange(first, length) % min(windows) != 0)
    sums = [float(values[both].sum(dtype=np.float64)) for values in (whole, sliding[first:])]
    difference = (whole.astype(np.float64) - sliding[first:])[both]
    return Compared(document.name, sums[0], sums[1], int(both.sum()), array_blocks(difference))


def _finite(nats: torch.Tensor, document: Document) -> np.ndarray:
    """On the CPU; NaN is kept for "not scored", so a loss that is none is refused here."""
    values = nats.float().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{document.name}: a loss is not finite; try dtype = bfloat16 or float32")
    return values
