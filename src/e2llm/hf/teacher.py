"""The base model as it was, kept beside the one that is trained: it says what the next tokens were before.

Flows in: a causal LM before training. Flows out: hidden states of the frozen copy for the same token ids at positions
0, 1, 2, … (scale 1, no offset), and its step to logits. A model that is trained to give the same answers at other
scales and offsets keeps what it knew of short text, and learns to find at a distance what it found nearby.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from e2llm.hf.extension import get_extension
from e2llm.hf.head import find_head
from e2llm.hf.rotary import unwrap


class Teacher:
    """A frozen copy of a model.

    dtype: type of the copy's weights; None keeps the model's. Takes the memory of one more set of weights. Raises
    ValueError where the step from hidden states to logits is not known (`hf.head`).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.model: Any = copy.deepcopy(unwrap(model)).eval().requires_grad_(False)
        extension = get_extension(self.model)
        if extension is not None:
            extension.remove()
        if dtype is not None:
            self.model.to(dtype)
        head = find_head(self.model)
        if head is None:
            kind = unwrap(model).config.model_type  # type: ignore[union-attr]
            raise ValueError(
                f"train.distill: model type {kind!r}: its step from hidden states to logits is "
                "not known; use train.distill = 0"
            )
        self.head = head
        """Hidden states (N, H) -> logits (N, V)."""

    @torch.no_grad()
    def hidden(self, input_ids: torch.Tensor | None, **options: Any) -> torch.Tensor:
        """(B, T, H) hidden states of token ids (B, T); options as to the model's own body (masks)."""
        found = self.model.base_model(input_ids=input_ids, **{"use_cache": False, **options})
        hidden: torch.Tensor = found.last_hidden_state
        return hidden
