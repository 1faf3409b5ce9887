"""SelfExtend: a longer window without training, by an attention that counts far tokens in groups.

Jin et al. 2024 (arXiv 2401.01325, Sect. 3): a key nearer than `neighbours` is seen at its own distance, others at the
distance of groups of `group` tokens, shifted so that the two meet. Flows in: a transformers model. Flows out: the
same model with another attention, registered with transformers' AttentionInterface, and a handle that sets the group
and puts the model's own attention back. Keys arrive rotated to their own positions; they are turned on from there to
their group's. Prompts are read by kernels that write no scores (`hf.grouped_attention`) where there are any, else
scores are made for a block of queries at a time.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
from transformers import AttentionInterface

from e2llm.hf.extension import get_extension, install
from e2llm.hf.grouped_attention import can_group, grouped_attention, has_kernels
from e2llm.hf.paged import HARMLESS, SCORE_ELEMENTS
from e2llm.hf.rotary import unwrap

# B = batch, H = query heads, G = key-value heads, Q = queries, K = keys, D = head dim, R = rotated channels

_NAMES = itertools.count()
BLOCK_QUERIES = 512
"""Queries whose scores are made at once, at most: few, so that little is made of keys that stand after them."""
_PROBE_TOKENS = 6
_PROBE_SHIFT = 7


class SelfExtend:
    """The handle on one model's attention. `group` 1 is the model as it was."""

    def __init__(self, model: Any, *, native_window: int, neighbours: int | None = None) -> None:
        """Raises ValueError, naming the model type, where attention or rotation cannot be exchanged."""
        self._inner = cast(Any, unwrap(model))
        self.native_window = native_window
        self.neighbours = usual_neighbours(native_window) if neighbours is None else neighbours
        if not 1 <= self.neighbours < native_window:
            raise ValueError(
                f"neighbours = {self.neighbours}: use at least 1 and less than the native window ({native_window})"
            )
        self.group = 1
        extension = get_extension(model) or install(model, method="none")
        self._inv_freq = torch.tensor(extension.rope.inv_freq, dtype=torch.float32)
        self._own: str = self._inner.config._attn_implementation
        self._seen: list[torch.Tensor] | None = None
        self._layers = 0
        self._pairs = ""
        self.name = f"e2llm_self_extend_{next(_NAMES)}"
        AttentionInterface.register(self.name, self._attend)
        self._inner.set_attn_implementation(self.name)
        try:
            self._pairs = self._find_pairs()
        except BaseException:
            self.remove()
            raise
        self._inner.__dict__["_e2llm_self_extend"] = self

    def fit(self, window: int) -> int:
        """Set the smallest group whose window, (L - neighbours) * group + neighbours (Sect. 3.3), holds `window`
        tokens; returns it."""
        self.group = group_of(window, self.native_window, self.neighbours)
        return self.group

    def remove(self) -> None:
        """The model's own attention again."""
        self._inner.set_attn_implementation(self._own)
        self._inner.__dict__.pop("_e2llm_self_extend", None)

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention signature: query (B, H, Q, D), key and value (B, G, K, D) -> (B, Q, H, D)."""
        unknown = [name for name, given in others.items() if given is not None and name not in {*HARMLESS, "is_causal"}]
        if unknown or attention_mask is not None or dropout or sliding_window is not None:
            what = ", ".join(sorted(unknown)) or "a mask, dropout or a sliding window"
            raise ValueError(f"{type(module).__name__} asks for {what}, which SelfExtend's attention does not know")
        if self._seen is not None:
            self._seen.append(query)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if softcap is None and not torch.is_grad_enabled() and self._by_kernels(query, key, value):
            return self._grouped_kernels(query, key, value, scale).transpose(1, 2).contiguous(), None
        query = query.unflatten(1, (key.shape[1], query.shape[1] // key.shape[1]))  # (B, G, H / G, Q, D)
        keys, queries = key.shape[2], query.shape[3]
        block = max(1, min(BLOCK_QUERIES, SCORE_ELEMENTS // (query[..., 0, 0].numel() * keys)))
        far_key = self._turned(key, torch.arange(keys, device=key.device), self._grouped, 0) if self.group > 1 else key
        out = []
        for part, first in zip(query.split(block, dim=3), range(keys - queries, keys, block), strict=True):
            out.append(self._block(part, key, far_key, value, first, scale, softcap))
        return torch.cat(out, dim=3).flatten(1, 2).transpose(1, 2).contiguous(), None

    def _by_kernels(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        queries, keys = query.shape[2], key.shape[2]
        fits = can_group(queries, keys, self.neighbours) and value.shape[-1] == key.shape[-1]
        return self.group > 1 and keys > self.neighbours and fits and has_kernels(query)

    def _grouped_kernels(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        queries, keys = query.shape[2], key.shape[2]
        places = torch.arange(keys, device=key.device)
        shift = self.neighbours - self.neighbours // self.group
        far_query = self._turned(query, places[-queries:], self._grouped, shift).to(query.dtype)
        far_key = self._turned(key, places, self._grouped, 0).to(key.dtype)
        key, far_key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, far_key, value))
        return grouped_attention(query, far_query, key, far_key, value, self.neighbours, scale)

    def _block(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        far_key: torch.Tensor,
        value: torch.Tensor,
        first: int,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Queries (B, G, H / G, q, D) that stand at `first` and after it -> (B, G, H / G, q, D) of value's type. Far
        keys and near ones are multiplied apart, each by as many as any of the queries sees."""
        shape, count = query.shape[:-1], query.shape[3]
        last = first + count
        places = torch.arange(first, last, device=query.device)[:, None]
        grouped = self.group > 1 and last > self.neighbours
        far_keys = last - self.neighbours if grouped else 0
        begin = max(0, first - self.neighbours + 1) if grouped else 0

        def scores(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            found = (rows.float().flatten(2, 3) @ columns.float().transpose(-1, -2)).mul_(scale)
            found = found if softcap is None else torch.tanh(found / softcap) * softcap
            return found.unflatten(2, shape[2:])  # (B, G, H / G, q, keys)

        near = scores(query, key[:, :, begin:last])
        distance = places - torch.arange(begin, last, device=query.device)
        hidden = (distance < 0) | (distance >= self.neighbours) if grouped else distance < 0
        found = near.masked_fill_(hidden, float("-inf"))
        if far_keys:
            shift = self.neighbours - self.neighbours // self.group
            far = scores(self._turned(query, places[:, 0], self._grouped, shift), far_key[:, :, :far_keys])
            some = max(0, first - self.neighbours + 1)  # keys before it are far from all of these queries
            edge = torch.arange(some, far_keys, device=query.device)
            far[..., some:].masked_fill_(places - edge < self.neighbours, float("-inf"))
            found = torch.cat((far, near), dim=-1)
        weights = found.softmax(-1).to(value.dtype).flatten(2, 3)
        answer = weights[..., far_keys:] @ value[:, :, begin:last]
        if far_keys:
            answer = answer + weights[..., :far_keys] @ value[:, :, :far_keys]
        return answer.unflatten(2, shape[2:])

    def _grouped(self, places: torch.Tensor) -> torch.Tensor:
        return places // self.group

    def _turned(self, x: torch.Tensor, places: torch.Tensor, target: Any, shift: int) -> torch.Tensor:
        """float32 `x` (…, T, D), rotated to `places` (T,), turned on to target(places) + shift."""
        return rotate(x.float(), target(places) + shift - places, self._inv_freq.to(x.device), self._pairs or "halves")

    @torch.no_grad()
    def _find_pairs(self) -> str:
        """How the model pairs channels, found by reading a few tokens at two places and turning the one to the
        other."""
        vocabulary = self._inner.get_input_embeddings().num_embeddings
        ids = torch.arange(1, _PROBE_TOKENS + 1, device=self._inner.device)[None] % vocabulary
        places = torch.arange(_PROBE_TOKENS, device=self._inner.device)[None]
        kind = self._inner.config.model_type
        found = []
        for shift in (0, _PROBE_SHIFT):
            self._seen = []
            try:
                self._inner(input_ids=ids, position_ids=places + shift, use_cache=False)
            except (ValueError, TypeError, RuntimeError) as error:
                raise ValueError(
                    f"model type {kind!r}: SelfExtend cannot stand in for its attention ({error})"
                ) from error
            finally:
                seen, self._seen = self._seen, None
            if len(seen) != self._inner.config.get_text_config().num_hidden_layers:
                raise ValueError(
                    f"model type {kind!r}: not every layer takes its attention from transformers' interface"
                )
            found.append(seen[0].float())
        for pairs in PAIRS:
            turned = rotate(found[0], torch.full((_PROBE_TOKENS,), _PROBE_SHIFT), self._inv_freq.to(ids.device), pairs)
            if float((turned - found[1]).norm() / found[1].norm()) < 0.02:
                return pairs
        raise ValueError(f"model type {kind!r}: its queries are rotated in a way that SelfExtend does not know")


PAIRS = ("halves", "neighbours")
"""halves: channel j is turned with j + R/2 (Llama); neighbours: 2j with 2j + 1 (GLM, Cohere)."""


def usual_neighbours(native_window: int) -> int:
    """Tokens that keep their distance where none are named: a quarter of the native window."""
    return native_window // 4


def group_of(window: int, native_window: int, neighbours: int) -> int:
    """The smallest group whose window, (L - neighbours) * group + neighbours (Sect. 3.3), holds `window` tokens."""
    return max(1, -(-max(0, window - neighbours) // (native_window - neighbours)))


def rotate(x: torch.Tensor, by: torch.Tensor, inv_freq: torch.Tensor, pairs: str) -> torch.Tensor:
    """`x` (…, T, D) with its first R channels turned by `by` (T,) or (…, T) positions; the others stay."""
    angles = by.to(x.device)[..., None].float() * inv_freq  # (…, T, R/2)
    cos, sin = angles.cos(), angles.sin()
    turned, rest = x[..., : 2 * len(inv_freq)], x[..., 2 * len(inv_freq) :]
    if pairs == "halves":
        a, b = turned.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    both = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((both, rest), dim=-1)


def self_extend(model: Any, *, native_window: int, neighbours: int | None = None) -> SelfExtend:
    """Give `model` SelfExtend's attention. neighbours None: a quarter of the native window."""
    return SelfExtend(model, native_window=native_window, neighbours=neighbours)


def get_self_extend(model: Any) -> SelfExtend | None:
    """The handle of a model that has it."""
    return unwrap(model).__dict__.get("_e2llm_self_extend")
