"""The attention function that transformers calls in every layer of a packed row, through its AttentionInterface.

Flows in: a layer's query, key and value. Flows out: what the `Attending` that is current makes of them (`packed.py`:
keys in pages, every token attends to its own request). transformers builds no mask for an attention function that
registers no mask function of its own, so none of T × T ever exists. Knows no pages and no requests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

# T = tokens of a row, H = query heads, G = key-value heads, D = head dim, Q = queries, K = keys

ATTENTION = "e2llm_paged"
"""Name in transformers' registry."""

SCORE_ELEMENTS = 2**28
"""Scores (query head, query, key) that are held at once where they are written out."""

HARMLESS = {
    *("position_ids", "cache_position", "use_cache", "past_key_values", "cache", "return_dict", "logits_to_keep"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
}


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a token."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    sliding_window: int | None
    """Keys that a token sees, itself included; None: all."""
    far_dim: int = 0
    """Of the key turned on to its group's place (`hf.packed_groups`), as many as of the key; 0: there is none."""

    @property
    def width(self) -> int:
        """Numbers of one head: key, value and far key, in this order."""
        return self.key_dim + self.value_dim + self.far_dim

    @property
    def token_bytes(self) -> int:
        return self.kv_heads * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Extras:
    """What a model's attention does beyond scaled dot products."""

    scaling: float | None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    """(H,) logits of a key that holds nothing (attention sinks)."""

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


class Attending(Protocol):
    """Whoever answers a layer's attention while it is the current one."""

    def attend(
        self,
        layer: int,
        window: int | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        extras: Extras,
    ) -> torch.Tensor:
        """(H, T, D), (G, T, D), (G, T, D) -> (T, H, D)."""
        ...


_CURRENT: ContextVar[Attending | None] = ContextVar("e2llm_paged", default=None)


@contextlib.contextmanager
def attending(current: Attending) -> Iterator[None]:
    """Forwards of this thread attend through `current`."""
    token = _CURRENT.set(current)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def paged_attention(
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
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D).

    Raises ValueError for an argument whose meaning we do not know: ignoring it would change results.
    """
    current = _CURRENT.get()
    if current is None:
        raise RuntimeError(f"attention {ATTENTION!r} runs inside a batch engine's step only")
    unknown = sorted(name for name, given in others.items() if given is not None and name not in HARMLESS)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if unknown or attention_mask is not None or dropout or not causal or query.shape[0] != 1:
        what = ", ".join(unknown) or "a mask, dropout, bidirectional attention or several rows"
        raise ValueError(f"{type(module).__name__} asks its attention for {what}")
    extras = Extras(scaling, softcap, s_aux)
    return current.attend(module.layer_idx, sliding_window, query[0], key[0], value[0], extras)[None], None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """q (…, Q, D) over k, v (…, K, D): what `mask` (additive) leaves, or what is causal from the last key back, or all.

    `sinks`: those of `extras`, in a shape that broadcasts over (…, Q, 1).
    """
    if extras.plain:
        bias: Any = mask
        if causal and q.shape[-2] != k.shape[-2]:
            causal, bias = False, causal_lower_right(q.shape[-2], k.shape[-2])
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=extras.scaling)
    assert not causal, "only plain attention has causal kernels"
    queries = q.shape[-2]
    block = max(1, SCORE_ELEMENTS // (q[..., 0, 0].numel() * k.shape[-2]))
    parts = zip(q.split(block, dim=-2), _split(mask, queries, block), _split(sinks, queries, block), strict=True)
    return torch.cat([_by_hand(part, k, v, extras, its_mask, its_sinks) for part, its_mask, its_sinks in parts], dim=-2)


def selected_attention(
    q: torch.Tensor,
    far_q: torch.Tensor,
    k: torch.Tensor,
    far_k: torch.Tensor,
    v: torch.Tensor,
    far: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """q, far_q (…, Q, D) over k, far_k, v (…, K, D): a key counts as `far_q` · `far_k` where `far` (bool) says so, else
    as `q` · `k`; `mask` is additive. Scores are written out, in float32."""
    scores = torch.where(far, far_q.float() @ far_k.float().mT, q.float() @ k.float().mT)
    scores = scores * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if mask is None else scores + mask
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _split(rows: torch.Tensor | None, queries: int, block: int) -> Sequence[torch.Tensor | None]:
    """`rows` (…, Q or 1, K) for each block of queries."""
    if rows is None or rows.shape[-2] != queries:
        return [rows] * -(-queries // block)
    return rows.split(block, dim=-2)


def _by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Scores written out, softmax in float32: what kernels do not offer."""
    scaling = q.shape[-1] ** -0.5 if extras.scaling is None else extras.scaling
    scores = (q @ k.transpose(-1, -2)) * scaling
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    scores = scores if mask is None else scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return (weights if sinks is None else weights[..., :-1]) @ v
