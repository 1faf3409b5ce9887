"""Where the answer looks: attention of the generated tokens over a long prompt with hidden key-value pairs.

E2-LLM (arXiv 2401.06951) Fig. 6: three UUID pairs in a long text, one asked for; the answer's attention should peak at
the asked value. Each generated token's weights on all tokens before it are read as it is made, layer by layer and head
by head, and only sums are kept: over stretches of the prompt, on the asked value, on the other pairs' values. Also a
retrieval score for each head (Wu et al. 2024, arXiv 2404.15574, Sect. 2): the share of the asked value's tokens that
the head copied, which is to look most at one of them just when that very token is written.
T = tokens of the prompt, Y = layers, H = heads, S = stretches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from e2llm.evaluate.retrieval import RetrievalPrompt
from e2llm.hf.observed import observing
from e2llm.infer import Engine, end_tokens

STRETCHES = 64
"""Parts of equal length that a prompt is divided into on the map."""
RETRIEVAL_HEAD = 0.1
"""A head with at least this mean score is called a retrieval head (Wu et al. 2024)."""


@dataclass(frozen=True)
class Looked:
    """What one answer looked at: means over its tokens."""

    prompt: RetrievalPrompt
    """Without its tokens."""
    token_ids: tuple[int, ...]
    """The answer."""
    on_span: np.ndarray
    """(Y, H) share of attention on the asked value."""
    on_others: np.ndarray
    """(Y, H) share on the other pairs' values."""
    by_stretch: np.ndarray
    """(Y, S) share on each stretch of the prompt, mean over heads."""
    head_score: np.ndarray
    """(Y, H) share of the asked value's tokens that the head copied."""


class _Sums:
    """Adds up the weights of a decoding step as the layers make them."""

    def __init__(self, prompt: Sequence[int], span: range, others: Sequence[range]) -> None:
        self.prompt, self.span, self.others = prompt, span, others
        self.on_span: dict[int, torch.Tensor] = {}
        self.on_others: dict[int, torch.Tensor] = {}
        self.by_stretch: dict[int, torch.Tensor] = {}
        self.top: dict[int, torch.Tensor] = {}
        """Layer -> (H,) place that each head looks at most, in the last step."""
        self.copied: dict[tuple[int, int], set[int]] = {}
        self.steps = 0

    def __call__(self, layer: int, weights: torch.Tensor) -> None:
        size = len(self.prompt)
        # A layer with a sliding window may keep the last keys only: the places before them get nothing.
        weights = torch.nn.functional.pad(weights, (size + self.steps - weights.shape[1], 0))
        on_span = weights[:, self.span.start : self.span.stop].sum(-1)
        others = torch.stack([weights[:, r.start : r.stop].sum(-1) for r in self.others] or [on_span * 0]).sum(0)
        mean = torch.zeros(STRETCHES, device=weights.device)
        known = weights[:, :size].mean(0)  # what was generated so far stands behind the prompt
        mean.index_add_(0, torch.arange(len(known), device=weights.device) * STRETCHES // size, known)
        for sums, value in ((self.on_span, on_span), (self.on_others, others), (self.by_stretch, mean)):
            sums[layer] = sums.get(layer, 0) + value
        self.top[layer] = weights.argmax(-1)

    def written(self, token: int) -> None:
        """A step is over and wrote `token`."""
        self.steps += 1
        for layer, places in self.top.items():
            for head, place in enumerate(places.tolist()):
                if place in self.span and self.prompt[place] == token:
                    self.copied.setdefault((layer, head), set()).add(place)

    def mean(self, sums: dict[int, torch.Tensor]) -> np.ndarray:
        return torch.stack([sums[layer] for layer in sorted(sums)]).cpu().numpy() / self.steps

    def scores(self) -> np.ndarray:
        layers = sorted(self.top)
        heads = len(self.top[layers[0]])
        found = np.zeros((len(layers), heads))
        for (layer, head), places in self.copied.items():
            found[layers.index(layer), head] = len(places) / len(self.span)
        return found


def look(engine: Engine, prompt: RetrievalPrompt, *, scale: float) -> Looked:
    """Answer `prompt` greedily at `scale` and watch.

    Raises ValueError for a model whose attention cannot be watched, or for a prompt without the places of its values.
    """
    if not prompt.spans:
        raise ValueError(f"task of {prompt.document}: this prompt does not know where its values stand")
    ids = list(prompt.token_ids)
    sums = _Sums(ids, prompt.spans[0], prompt.spans[1:])
    with engine.at_scale(scale):
        _, cache = engine.prefill(ids[:-1])
        tokens = _answer(engine, cache, ids[-1], prompt.answer_tokens, sums)
    layers = engine.model.config.get_text_config().num_hidden_layers
    if len(sums.top) != layers:
        kind = engine.model.config.model_type
        raise ValueError(
            f"model type {kind!r}: {len(sums.top)} of its {layers} layers take their attention from transformers' "
            "interface; the others cannot be watched"
        )
    return Looked(
        prompt=prompt.without_tokens(),
        token_ids=tuple(tokens),
        on_span=sums.mean(sums.on_span),
        on_others=sums.mean(sums.on_others),
        by_stretch=sums.mean(sums.by_stretch),
        head_score=sums.scores(),
    )


def _answer(engine: Engine, cache: Any, token: int, most: int, sums: _Sums) -> list[int]:
    """Greedy tokens after `token`; its own step writes the first of them."""
    ends = end_tokens(engine.model, engine.tokenizer)
    found: list[int] = []
    with observing(engine.model, sums):
        while len(found) < most and not (found and found[-1] in ends):
            logits, cache = engine.step(token, cache)
            token = int(logits.argmax())
            found.append(token)
            sums.written(token)
    return found
