"""Perplexity on the tokens that need a long context: LongPPL, Fang et al. 2024 (arXiv 2410.23771).

A token is a key token when the key model predicts it far better with the long context than with a short one, and well
with the long one (Eqs. 2-4). The key model is the measured one or another that shares its tokenizer. Keys are found
once a document, at the largest window, and are the same tokens at every window: what a shorter window costs is what
they needed from further back. Deviations: contexts are whole windows of the document, the short one a window of
`short_context` tokens that slides by half of itself, so a token has half to all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from e2llm.evaluate.blocks import block_slices
from e2llm.evaluate.documents import Document
from e2llm.evaluate.token_losses import Reader, sliding_losses, whole_losses

GAIN = 2.0
"""alpha (Eq. 4), nats: log probability with the long context less that with the short one, at the least."""
LEAST_LOG_PROBABILITY = -2.0
"""beta (Eq. 4), nats: log probability with the long context, at the least."""


@dataclass(frozen=True)
class KeyLoss:
    """One document's loss on its key tokens."""

    document: str
    nats: float
    tokens: int
    """Key tokens."""
    scored: int
    """Tokens that keys were looked for among."""
    blocks: tuple[tuple[float, int, int], ...] = ()
    """(nats, key tokens, scored tokens) of contiguous blocks of the document."""


def key_tokens(
    reader: Reader, documents: Sequence[Document], *, length: int, short_context: int, scale: float, smallest: int
) -> list[np.ndarray]:
    """For each document (length,) bool: its key tokens, read by `reader`'s model at `scale` in one window.

    Tokens at multiples of `smallest` are none: they begin a window of some size, where nothing precedes them.
    """
    found = []
    for document in documents:
        with reader.engine.at_scale(scale):
            long = whole_losses(reader, document, length=length, window=length).reshape(-1)
        with reader.engine.at_scale(1.0):
            short = sliding_losses(
                reader,
                document,
                length=length,
                window=short_context,
                stride=short_context // 2,
                max_strides=None,
            )
        with np.errstate(invalid="ignore"):  # NaN: not scored
            keys = (short - long > GAIN) & (-long > LEAST_LOG_PROBABILITY)
        found.append(keys & (np.arange(length) % smallest != 0))
    return found


def key_losses(
    reader: Reader, documents: Sequence[Document], keys: Sequence[np.ndarray], *, window: int, scale: float
) -> list[KeyLoss]:
    """Loss of each document's key tokens, read in windows of `window` at `scale`."""
    found = []
    with reader.engine.at_scale(scale):
        for document, mask in zip(documents, keys, strict=True):
            losses = whole_losses(reader, document, length=len(mask), window=window).reshape(-1)
            scored = ~np.isnan(losses)
            nats = float(losses[mask].sum(dtype=np.float64))
            blocks = tuple(
                (float(losses[own][mask[own]].sum(dtype=np.float64)), int(mask[own].sum()), int(scored[own].sum()))
                for own in block_slices(len(losses))
            )
            found.append(KeyLoss(document.name, nats, int(mask.sum()), int(scored.sum()), blocks))
    return found
