"""From hidden states to the loss of each token, without ever holding logits for all tokens.

Where the step from hidden states to logits is not a known one (`hf.head`), the model's own forward is used with a
warning, at the cost of logits for every token. B = windows in a batch, T = tokens, C = tokens in a piece, H = hidden
size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from e2llm.hf.compiled import layers_compiled
from e2llm.hf.head import Head, find_head
from e2llm.infer import Engine, hidden_chunks

ROWS = 2048
"""Tokens whose logits are held at once."""


class TokenScorer:
    """Loss of the tokens of a batch, by the cheapest way that gives this model's own logits."""

    def __init__(self, engine: Engine, *, compiled: bool = False) -> None:
        """`compiled`: decoder layers under torch.compile while tokens are scored; sums are rounded in another order."""
        self.model = engine.model
        self._compiled: dict[nn.Module, Any] | None = {} if compiled else None
        self.chunk_tokens = engine.chunk_tokens
        with engine.at_scale(1.0):  # without dropout
            self.head = find_head(engine.model)

    def nats(self, input_ids: torch.Tensor, *, first: int = 1) -> torch.Tensor:
        """Loss in nats, float32 (B, T - first), of tokens `first`…T-1 given all tokens before them in their row.

        Nothing is read back from the device here.
        """
        length = input_ids.shape[1]
        if not 1 <= first < length:
            raise ValueError(f"first = {first}: a scored token has one before it, so use 1 to {length - 1}")
        if self.head is None:
            logits = self.model(input_ids=input_ids, use_cache=False).logits[:, first - 1 : -1]
            return _nats(logits.flatten(0, 1), input_ids[:, first:].flatten()).view(len(input_ids), -1)
        pieces: list[torch.Tensor] = []
        start = 0
        for hidden in self._hidden(input_ids):
            # hidden position p predicts token p + 1; positions first-1 … T-2 are wanted
            low, high = max(first - 1 - start, 0), min(length - 1 - start, hidden.shape[1])
            if low < high:
                targets = input_ids[:, start + low + 1 : start + high + 1]
                pieces.append(_head_nats(self.head, hidden[:, low:high], targets))
            start += hidden.shape[1]
        return torch.cat(pieces, dim=1)

    def _hidden(self, input_ids: torch.Tensor) -> Iterator[torch.Tensor]:
        chunks = hidden_chunks(self.model, input_ids, self.chunk_tokens)
        if self._compiled is None:
            yield from chunks
            return
        with layers_compiled(self.model, self._compiled):
            yield from chunks


def _head_nats(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss (B, C) of hidden states (B, C, H) and targets (B, C), `ROWS` tokens at a time."""
    rows = hidden.reshape(-1, hidden.shape[-1]).split(ROWS)
    nats = [_nats(head(part), wanted) for part, wanted in zip(rows, targets.reshape(-1).split(ROWS), strict=True)]
    return torch.cat(nats).view(targets.shape)


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")
