"""Where documents begin in rows that hold several, read off their position ids.

Flows in: the position ids of a batch. Flows out: lengths in tokens. Knows no scale and no placement.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch


def document_lengths(position_ids: torch.Tensor | None, batch: int) -> list[list[int]] | None:
    """Tokens of each document in each row, where position ids (B or 1, T) start again inside a row; None where none
    does, or ids are of 3 dimensions (multimodal sections). A document of one token counts with the next one, and so
    does padding with a constant id. Waits for the device that holds the ids."""
    if position_ids is None or position_ids.dim() != 2:
        return None
    ids = position_ids.expand(batch, -1).cpu().numpy()
    starts = np.diff(ids, axis=1) < 0
    if not starts.any():
        return None
    edges = [[0, *(np.flatnonzero(row) + 1), ids.shape[1]] for row in starts]
    return [[int(end - start) for start, end in itertools.pairwise(row)] for row in edges]
