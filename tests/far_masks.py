"""The mask that `placement.far_weight` amounts to, written out."""

from __future__ import annotations

import torch

from e2llm.positions.placement import Placement


def written_out(placement: Placement, leading: int) -> torch.Tensor:
    """(T, T) float32 added to the scores of one row, token by token: the bias of far keys, -inf after the query."""
    assert placement.far is not None
    far, tokens = placement.far, len(placement.positions)
    mask = torch.full((tokens, tokens), float("-inf"))
    for query in range(tokens):
        for key in range(query + 1):
            is_far = far.segments[key] < far.segments[query] and key >= leading
            mask[query, key] = float(far.bias[query]) if is_far else 0.0
    return mask
