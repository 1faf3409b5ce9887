"""Attention of a prompt's later chunks without a mask: causal from the last key back, which flash kernels know.

Flows in: a transformers model whose layers all see every token before, under `sdpa`. Flows out: the same model inside
`without_masks`, where a chunk of Q tokens over a cache of K keys holds no Q × K mask and takes the kernels of a whole
pass. transformers' own `sdpa` writes such a mask out, with which no flash kernel runs. Knows no scale and no lengths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from e2llm.hf.rotary import unwrap

# B = batch, H = query heads, G = key-value heads, Q = queries, K = keys, D = head dim

ATTENTION = "e2llm_chunks"
"""Name in transformers' registry, where no mask function belongs to it: none is built."""


def is_windowed(model: Any) -> bool:
    """Whether a layer of `model` sees less than all tokens before it."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    # Without a list of kinds a window in the config is every layer's.
    return kinds != {"full_attention"} if kinds else getattr(config, "sliding_window", None) is not None


def needs_no_mask(model: Any) -> bool:
    """Whether chunks of `model` can be read without masks: under `sdpa`, and no layer sees a window of its own."""
    return cast(Any, unwrap(model)).config._attn_implementation == "sdpa" and not is_windowed(model)


@contextlib.contextmanager
def without_masks(model: Any) -> Iterator[None]:
    """Within the block the model builds no causal masks; only where `needs_no_mask`, and for rows without padding."""
    inner = cast(Any, unwrap(model))
    AttentionInterface.register(ATTENTION, chunk_attention)
    inner.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        inner.set_attn_implementation("sdpa")


def chunk_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query (B, H, Q, D) over key, value (B, G, K, D), K ≥ Q -> (B, Q, H, D).

    The last query is the last key's, as in a cache. Raises ValueError for a mask or a bias: either says more than the
    order of tokens.
    """
    if attention_mask is not None or others.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} asks the attention of its chunks for a mask or a bias")
    queries, keys = query.shape[2], key.shape[2]
    if queries in (1, keys):
        return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling, **others)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    order: Any = causal_lower_right(queries, keys)
    found = scaled_dot_product_attention(query, key, value, attn_mask=order, dropout_p=dropout, scale=scaling)
    return found.transpose(1, 2).contiguous(), None
