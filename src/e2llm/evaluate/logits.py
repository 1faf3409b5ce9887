"""From hidden states to the loss of each token, without ever holding logits for all tokens.

A causal LM is a body, an output layer and, in some families, one more step (Gemma caps the logits, Granite divides
them, Cohere multiplies them). The steps known here are tried on a short sequence, and the one that gives the model's
own logits is used; when none does, the model's own forward is used with a warning, at the cost of logits for every
token. B = windows in a batch, T = tokens, C = tokens in a piece, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from e2llm.hf.rotary import unwrap
from e2llm.infer import Engine, hidden_chunks

ROWS = 2048
"""Tokens whose logits are held at once."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states (N, H) -> logits (N, V)."""


class FullLogitsWarning(UserWarning):
    """The model's output step is unknown: logits of all tokens are held."""


def _candidates(model: Any) -> Iterator[Head]:
    """The output layer alone and followed by each step that the config suggests."""
    project = model.get_output_embeddings()
    config = model.config.get_text_config()
    yield project
    for setting, steps in _STEPS.items():
        value = getattr(config, setting, None)
        if value:
            yield from (partial(step, project, float(value)) for step in steps)


def _capped(project: Head, cap: float, hidden: torch.Tensor) -> torch.Tensor:
    return cap * torch.tanh(project(hidden) / cap)


def _divided(project: Head, ratio: float, hidden: torch.Tensor) -> torch.Tensor:
    return project(hidden) / ratio


def _multiplied(project: Head, ratio: float, hidden: torch.Tensor) -> torch.Tensor:
    return project(hidden) * ratio


def _divided_before(project: Head, ratio: float, hidden: torch.Tensor) -> torch.Tensor:
    return project(hidden / ratio)


_STEPS = {
    "final_logit_softcapping": (_capped,),  # Gemma 2 and later, nanochat
    "logits_scaling": (_divided, _multiplied, _divided_before),  # Granite; HyperCLOVA X; MiniCPM3
    "logit_scale": (_multiplied,),  # Cohere
    "lm_head_multiplier": (_multiplied,),  # Falcon-H1
}
"""Setting of a model's config -> what its families do with it."""


class TokenScorer:
    """Loss of the tokens of a batch, by the cheapest way that gives this model's own logits."""

    def __init__(self, engine: Engine) -> None:
        self.model = engine.model
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
        for hidden in hidden_chunks(self.model, input_ids, self.chunk_tokens):
            # hidden position p predicts token p + 1; positions first-1 … T-2 are wanted
            low, high = max(first - 1 - start, 0), min(length - 1 - start, hidden.shape[1])
            if low < high:
                targets = input_ids[:, start + low + 1 : start + high + 1]
                pieces.append(_head_nats(self.head, hidden[:, low:high], targets))
            start += hidden.shape[1]
        return torch.cat(pieces, dim=1)


@torch.no_grad()
def find_head(model: Any) -> Head | None:
    """The output step of `model`, checked on 8 tokens; None (with a warning) when it is none of those known here."""
    model = unwrap(model)
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    expected = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    # One rounding of the model's own type apart at most: some models cast before and some after the output layer.
    tolerance = 4 * torch.finfo(hidden.dtype).eps * max(1.0, float(expected.abs().max()))
    best: tuple[float, Head | None] = (math.inf, None)
    for head in _candidates(model):
        logits = head(hidden).float()
        if logits.shape == expected.shape:
            error = float((logits - expected).abs().max())
            best = min(best, (error, head), key=lambda found: found[0])
    if best[0] <= tolerance:
        return best[1]
    vocabulary = expected.shape[-1]
    mebibytes = vocabulary * 6 / 2**20  # the model's own type and a float32 copy
    warnings.warn(
        f"{model.config.model_type}: the step from hidden states to logits is not a known one, so logits of all tokens "
        f"are held: {mebibytes:.2f} MiB per token of the window ({mebibytes * 32:.0f} GiB at 32768)",
        FullLogitsWarning,
        stacklevel=2,
    )
    return None


def _head_nats(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss (B, C) of hidden states (B, C, H) and targets (B, C), `ROWS` tokens at a time."""
    rows = hidden.reshape(-1, hidden.shape[-1]).split(ROWS)
    nats = [_nats(head(part), wanted) for part, wanted in zip(rows, targets.reshape(-1).split(ROWS), strict=True)]
    return torch.cat(nats).view(targets.shape)


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")
