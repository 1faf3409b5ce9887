"""Attention that can be watched: one token's weights on every key before it, layer by layer and head by head.

Flows in: a transformers model and, for each decoding step, whoever looks on (`Onlooker`). Flows out: the same answer
as the model's own attention, and the weights (H, K) of each layer as they are made. Only single tokens over a cache are
read this way, so that no T × T matrix exists; the prompt is read by the model's own attention. The function is
registered with transformers' AttentionInterface under a name of ours; `observing` puts the model's own back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, cast

import torch
from transformers import AttentionInterface

from e2llm.hf.group_tables import GroupTables
from e2llm.hf.paged import HARMLESS
from e2llm.hf.rotary import unwrap
from e2llm.hf.self_extend import in_groups

# H = query heads, G = key-value heads, K = keys, D = head dim

ATTENTION = "e2llm_observed"
"""Name in transformers' registry."""

Onlooker = Callable[[int, torch.Tensor], None]
"""(layer, weights (H, K) float32, which sum to 1 over keys and sinks) -> None."""

_CURRENT: ContextVar[Onlooker | None] = ContextVar("e2llm_observed", default=None)


@contextlib.contextmanager
def observing(model: Any, onlooker: Onlooker) -> Iterator[None]:
    """Within it the model reads one token at a time over a cache, and every layer's weights go to `onlooker`.

    Raises ValueError, naming the model type, for a model whose layers do not take their attention from transformers'
    interface.
    """
    inner = cast(Any, unwrap(model))
    own = inner.config._attn_implementation
    AttentionInterface.register(ATTENTION, observed_attention)
    token = _CURRENT.set(onlooker)
    try:
        inner.set_attn_implementation(ATTENTION)
        if inner.config._attn_implementation != ATTENTION:
            raise ValueError(
                f"model type {inner.config.model_type!r}: its attention cannot be exchanged for one that is watched"
            )
        yield
    finally:
        inner.set_attn_implementation(own)
        _CURRENT.reset(token)


def observed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    group_tables: GroupTables | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature for one token: query (1, H, 1, D), key and value (1, G, K, D) -> (1, 1, H, D).

    Raises ValueError for an argument whose meaning we do not know, and for more than one token or row.
    """
    onlooker = _CURRENT.get()
    if onlooker is None:
        raise RuntimeError(f"attention {ATTENTION!r} runs inside `observing` only")
    unknown = sorted(
        name for name, given in others.items() if given is not None and name not in {*HARMLESS, "is_causal"}
    )
    if unknown or attention_mask is not None or dropout or query.shape[0] != 1 or query.shape[2] != 1:
        what = ", ".join(unknown) or "a mask, dropout, several rows or several tokens at once"
        raise ValueError(f"{type(module).__name__} asks its watched attention for {what}")
    heads, keys = query.shape[1], key.shape[2]
    scores = _scores(query, key)
    group, near = (1, keys) if group_tables is None else (int(group_tables.groups[0]), group_tables.neighbours)
    if group_tables is not None and group > 1 and keys > near:
        far = _scores(*in_groups(query, key, group_tables, group))
        scores[:, : keys - near] = far[:, : keys - near]
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if sliding_window is not None and keys > sliding_window:
        scores[:, : keys - sliding_window] = float("-inf")
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.float().view(heads, 1)), dim=-1)
    weights = scores.softmax(dim=-1)[:, :keys]
    onlooker(int(module.layer_idx), weights)
    found = weights.view(key.shape[1], -1, keys) @ value[0].float()
    return found.reshape(1, 1, heads, -1).to(query.dtype), None


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(H, K) float32, before they are scaled."""
    heads, keys = query.shape[1], key.shape[2]
    grouped = query[0, :, 0].view(key.shape[1], heads // key.shape[1], -1).float()
    return (grouped @ key[0].float().transpose(-1, -2)).reshape(heads, keys)
