"""Channels that make keys of earlier segments count for more, as tensors of a batch.

The bias of a score (`positions.far`) depends on its query, and on whether query and key share a segment. A softmax
stays the same when all scores of a query grow alike, so the bias of the far keys is taken off the near ones instead;
and a product of one-hot vectors of segments says which those are. Flows in: what placements say of a batch's rows.
Flows out: channels for queries and keys. Knows no model.

B = batch, T = tokens, E = added channels
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from e2llm.hf.row_tables import sent
from e2llm.positions.far import FarKeys

CHANNELS = 16
"""Added channels are a multiple of this: kernels want head dims that are."""

FarTables = tuple[torch.Tensor, torch.Tensor]
"""Of queries and of keys, (B, 1, T, E) float32 each; their product is minus the bias where both share a segment or the
key is a leading token, else 0."""


def far_tables(rows: Sequence[Sequence[FarKeys]], device: torch.device) -> FarTables:
    """Tables of rows that each hold one document or several; all rows have one length. On `device` without a wait."""
    segments = np.stack([np.concatenate([far.segments for far in row]) for row in rows])
    bias = np.stack([np.concatenate([far.bias for far in row]) for row in rows])
    leading = np.stack([np.concatenate([_leading(far) for far in row]) for row in rows])
    channels = added_channels(max(far.most_segments for row in rows for far in row))
    at = sent(torch.from_numpy(segments), device)[..., None] == torch.arange(channels, device=device)
    query = -sent(torch.from_numpy(bias), device)[..., None] * at
    key = (at | sent(torch.from_numpy(leading), device)[..., None]).float()
    return query[:, None], key[:, None]


def added_channels(most_segments: int) -> int:
    """E of windows that fall into so many segments at most."""
    return -(-most_segments // CHANNELS) * CHANNELS


def _leading(far: FarKeys) -> np.ndarray:
    return np.arange(len(far.segments)) < far.leading_tokens
