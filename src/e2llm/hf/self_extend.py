"""SelfExtend's attention: near keys at their own distance, far ones at that of their groups.

Jin et al. 2024 (arXiv 2401.01325, Sect. 3); `positions.groups` says which group a scale has. Flows in: a transformers
model. Flows out: the same model with another attention, registered with transformers' AttentionInterface; while its
forwards are given `group_tables`, layers read by them. Keys arrive rotated to their own positions; they are turned on
from there to their group's. Prompts are read by kernels that write no scores (`hf.grouped_attention`) where there are
any, else scores are made for a block of queries at a time; training windows by `hf.grouped_training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from e2llm.hf.compiled import uncompiled
from e2llm.hf.group_tables import GROUP_TABLES, PAIRS, Documents, GroupTables, PlacedGroups, far_shift, rotate, turned
from e2llm.hf.grouped_attention import can_group, grouped_attention, has_kernels
from e2llm.hf.grouped_documents import grouped_documents
from e2llm.hf.grouped_training import grouped_training
from e2llm.hf.paged import HARMLESS, SCORE_ELEMENTS, Extras, attention
from e2llm.hf.read_once import is_placeholder
from e2llm.hf.rotary import is_local, unwrap

# B = batch, H = query heads, G = key-value heads, Q = queries, K = keys, D = head dim, R = rotated channels

ATTENTION = "e2llm_self_extend"
"""Name in transformers' registries. Its masks are those of flash attention: which tokens are padding, or none."""
FLASH = "flash_attention_2"
BLOCK_QUERIES = 512
"""Queries whose scores are made at once, at most: few, so that little is made of keys that stand after them."""
_HARMLESS = {*HARMLESS, "is_causal", "num_items_in_batch"}
_PROBE_TOKENS = 6
_PROBE_SHIFT = 7

_WATCHED: ContextVar[list[tuple[torch.Tensor, bool]] | None] = ContextVar("e2llm_self_extend", default=None)
"""Queries that layers were given, and whether tables came with them, while a model is tried."""


def attend_in_groups(model: nn.Module, inv_freq: Sequence[float]) -> str:
    """Give `model` the attention that knows `group_tables`, for good; returns how it pairs channels, one of PAIRS.

    inv_freq: (R/2,) what it rotates by. A model without weights is not tried. Raises ValueError, naming the model type,
    where attention or rotation cannot be exchanged.
    """
    inner = cast(Any, unwrap(model))
    own = inner.config._attn_implementation
    AttentionInterface.register(ATTENTION, self_extend_attention)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[FLASH])
    inner.set_attn_implementation(ATTENTION)
    try:
        if any(map(is_placeholder, inner.parameters())) or any(p.is_meta for p in inner.parameters()):
            return PAIRS[0]
        return _find_pairs(inner, torch.tensor(tuple(inv_freq), dtype=torch.float32))
    except BaseException:
        inner.set_attn_implementation(own)
        raise


def check_trains(model: nn.Module) -> None:
    """Raise ValueError, naming the setting, for a model that this attention reads and cannot train. Weights are not
    looked at: they may be on the meta device."""
    config = cast(Any, unwrap(model)).config
    for name, what in (("attn_logit_softcapping", "caps its scores"), ("attention_dropout", "drops attention")):
        if value := getattr(config, name, None):
            raise ValueError(
                f"method = 'self_extend': model type {config.model_type!r} {what} ({name} = {value:g}), which training "
                "in groups cannot; use method = 'yarn' (the recipe recommended-yarn)"
            )


def self_extend_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    group_tables: GroupTables | PlacedGroups | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query (B, H, Q, D), key and value (B, G, K, D) -> (B, Q, H, D).

    attention_mask: (B, K), 0 where a token is padding, which nobody sees and which does not count as a place; None
    without any. Raises ValueError for an argument whose meaning is not known: ignoring it would change results.
    """
    unknown = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
    strange = attention_mask is not None and attention_mask.dim() != 2
    if unknown or strange or dropout:
        what = ", ".join(sorted(unknown)) or "a mask or dropout"
        raise ValueError(f"{type(module).__name__} asks for {what}, which SelfExtend's attention does not know")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sliding_window is not None:  # a layer that meets no distance that it was not made for
        extras, documents = Extras(scale, softcap), None if group_tables is None else group_tables.documents
        found = _near_alone(query, key, value, attention_mask, sliding_window, extras, documents)
        return found.transpose(1, 2).contiguous(), None
    if isinstance(group_tables, PlacedGroups):
        if softcap is not None:
            raise ValueError(f"{type(module).__name__} caps its scores (softcap), which training in groups cannot")
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):  # behind a row it is harmless
            raise ValueError("attention_mask: training in groups knows no padding before a row's text; pad behind it")
        return _placed(query, key, value, group_tables, scale).transpose(1, 2).contiguous(), None
    return _read(query, key, value, attention_mask, group_tables, scale, softcap), None


def _near_alone(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    window: int,
    extras: Extras,
    documents: Documents | None,
) -> torch.Tensor:
    """(B, H, Q, D) of the last Q of K tokens, each over itself and the window - 1 before it, of its document."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves what was rotated in float32
    queries, keys, shared = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    places = torch.arange(keys, device=key.device)
    distance = places[keys - queries :, None] - places
    seen = (distance >= 0) & (distance < window)
    if documents is not None:
        seen = seen & (documents.owners[:, None, :, None] == documents.owners[:, None, None])
    if attention_mask is not None:  # a query that is padding sees itself: nobody reads it, and it must be a number
        seen = seen & (attention_mask[:, None, None, :keys].bool() | (distance == 0))
    mask = torch.zeros(seen.shape, dtype=value.dtype, device=key.device).masked_fill(~seen, float("-inf"))
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    return attention(query, key, value, extras, mask=mask)


def _placed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tables: PlacedGroups, scale: float
) -> torch.Tensor:
    """(B, H, T, D) of training windows, which may be longer than what is read of them."""
    tokens = query.shape[2]
    cos, sin = (table[:, :, :tokens] for table in tables.of_queries)
    number = value.dtype  # autocast leaves what was rotated in float32
    far_query, query = turned(query.float(), cos, sin, tables.pairs).to(number), query.to(number)
    cos, sin = (table[:, :, :tokens] for table in tables.of_keys)
    far_key, key = turned(key.float(), cos, sin, tables.pairs).to(number), key.to(number)
    positions, segments, bias = (t[:, :tokens] for t in (tables.positions, tables.segments, tables.bias))
    rows, sizes = (positions, tables.groups, segments, bias), (tables.leading, tables.neighbours, scale)
    if tables.documents is not None:
        return grouped_documents(query, far_query, key, far_key, value, *rows, tables.documents.lengths, *sizes)
    return grouped_training(query, far_query, key, far_key, value, *rows, *sizes)


@torch.compiler.disable
def _read(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tables: GroupTables | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """(B, Q, H, D) of the last Q of K tokens. Outside of layers that are compiled: lengths and groups change."""
    watched = _WATCHED.get()
    if watched is not None:
        watched.append((query, tables is not None))
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves what was rotated in float32
    if tables is not None and tables.documents is not None:
        return _read_documents(query, key, value, tables, scale, softcap)
    groups = [1] if tables is None else tables.groups.tolist()
    if len(groups) not in (1, query.shape[0]):
        raise ValueError(
            f"scales are set for {len(groups)} rows, the batch has {query.shape[0]}: set one scale, or one for each row"
        )
    groups = groups * query.shape[0] if len(groups) == 1 else groups
    paddings = [0] * len(groups)
    if attention_mask is not None:
        paddings = attention_mask[:, : key.shape[2]].int().argmax(-1).tolist()  # before the text; behind it harmless
    if len(set(groups)) == 1 and not any(paddings):
        return _read_rows(query, key, value, tables, groups[0], scale, softcap)
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    before = key.shape[2] - query.shape[2]
    for row, (group, padding) in enumerate(zip(groups, paddings, strict=True)):
        first = max(0, padding - before)  # of the queries, that is text
        part, keys, values = query[row, None, :, first:], key[row, None, :, padding:], value[row, None, :, padding:]
        out[row, first:] = _read_rows(part, keys, values, tables, group, scale, softcap)[0]
    return out


def _read_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tables: GroupTables,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """(B, T, H, D) of rows in which several documents stand, each read alone."""
    assert tables.documents is not None
    groups = tables.groups.tolist() * (query.shape[0] if len(tables.groups) == 1 else 1)
    out = value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    row = start = 0
    for length in tables.documents.lengths.tolist():
        own = slice(start, start + length)
        part, keys, values = query[row, None, :, own], key[row, None, :, own], value[row, None, :, own]
        out[row, own] = _read_rows(part, keys, values, tables, groups[row], scale, softcap)[0]
        row, start = (row, start + length) if start + length < query.shape[2] else (row + 1, 0)
    return out


def _read_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tables: GroupTables | None,
    group: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """(B, Q, H, D), all rows in one group."""
    queries, keys, shared = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    near = keys if tables is None or group == 1 else tables.neighbours
    if keys <= near and softcap is None:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        order: Any = causal_lower_right(queries, keys) if 1 < queries < keys else None
        causal = 1 < queries == keys
        found = scaled_dot_product_attention(query, key, value, attn_mask=order, is_causal=causal, scale=scale)
        return found.transpose(1, 2).contiguous()
    far_query, far_key = query, key
    if tables is not None and keys > near:
        far_query, far_key = in_groups(query, key, tables, group)
    return read_in_groups(query, far_query, key, far_key, value, near, scale, softcap)


def in_groups(
    query: torch.Tensor, key: torch.Tensor, tables: GroupTables, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (…, Q, D) of the last of K tokens and keys (…, K, D), float32, as far ones: turned on from their own
    places to those of their groups."""
    places = torch.arange(key.shape[-2], device=key.device)
    by = places // group - places
    far_key = rotate(key.float(), by, tables.inv_freq, tables.pairs)
    by = by[-query.shape[-2] :] + far_shift(tables.neighbours, group)
    return rotate(query.float(), by, tables.inv_freq, tables.pairs), far_key


def read_in_groups(
    query: torch.Tensor,
    far_query: torch.Tensor,
    key: torch.Tensor,
    far_key: torch.Tensor,
    value: torch.Tensor,
    neighbours: int,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Queries (B, H, Q, D), the last Q of K places, over (B, G, K, D) -> (B, Q, H, D) of value's type.

    A key nearer than `neighbours` counts as `query` · `key`, another as `far_query` · `far_key`, which may be of a
    finer type than these. By kernels where they can, else scores are made for a block of queries at a time.
    """
    queries, keys, shared = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    added = _queries_to_add(query, key, value, neighbours)
    if softcap is None and not torch.is_grad_enabled() and added is not None:
        key, far_key, value = (x.to(value.dtype).repeat_interleave(shared, 1) for x in (key, far_key, value))
        query, far_query = (pad(x.to(query.dtype), (0, 0, added, 0)) for x in (query, far_query))
        found = grouped_attention(query, far_query, key, far_key, value, neighbours, scale)
        return found[:, :, added:].transpose(1, 2).contiguous()
    query, far_query = (x.unflatten(1, (key.shape[1], shared)) for x in (query, far_query))  # (B, G, H / G, Q, D)
    block = max(1, min(BLOCK_QUERIES, SCORE_ELEMENTS // (query[..., 0, 0].numel() * keys)))
    blocks = zip(
        query.split(block, dim=3), far_query.split(block, dim=3), range(keys - queries, keys, block), strict=True
    )
    out = [
        _block(part, far_part, key, far_key, value, first, neighbours, scale, softcap)
        for part, far_part, first in blocks
    ]
    return torch.cat(out, dim=3).flatten(1, 2).transpose(1, 2).contiguous()


def _queries_to_add(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, neighbours: int) -> int | None:
    """Queries before the first with which kernels can read these; None where they cannot, or where they would read more
    that nobody asked for than what is asked for (on a CPU scores then cost less)."""
    queries, keys = query.shape[2], key.shape[2]
    if keys <= neighbours or value.shape[-1] != key.shape[-1] or not has_kernels(query):
        return None
    if can_group(queries, keys, neighbours):
        return 0
    before = keys - queries
    return before if 1 < queries and before <= queries else None


def _block(
    query: torch.Tensor,
    far_query: torch.Tensor,
    key: torch.Tensor,
    far_key: torch.Tensor,
    value: torch.Tensor,
    first: int,
    neighbours: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Queries (B, G, H / G, q, D) that stand at `first` and after it -> (B, G, H / G, q, D) of value's type. Far keys
    and near ones are multiplied apart, each by as many as any of the queries sees."""
    shape, count = query.shape[:-1], query.shape[3]
    last = first + count
    places = torch.arange(first, last, device=query.device)[:, None]
    far_keys = max(0, last - neighbours)
    begin = max(0, first - neighbours + 1)

    def scores(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        found = (rows.float().flatten(2, 3) @ columns.float().transpose(-1, -2)).mul_(scale)
        found = found if softcap is None else torch.tanh(found / softcap) * softcap
        return found.unflatten(2, shape[2:])  # (B, G, H / G, q, keys)

    near = scores(query, key[:, :, begin:last])
    distance = places - torch.arange(begin, last, device=query.device)
    found = near.masked_fill_((distance < 0) | (distance >= neighbours), float("-inf"))
    if far_keys:
        far = scores(far_query, far_key[:, :, :far_keys])
        edge = torch.arange(begin, far_keys, device=query.device)  # keys before it are far from all of these queries
        far[..., begin:].masked_fill_(places - edge < neighbours, float("-inf"))
        found = torch.cat((far, near), dim=-1)
    weights = found.softmax(-1).to(value.dtype).flatten(2, 3)
    answer = weights[..., far_keys:] @ value[:, :, begin:last]
    if far_keys:
        answer = answer + weights[..., :far_keys] @ value[:, :, :far_keys]
    return answer.unflatten(2, shape[2:])


@torch.no_grad()
def _find_pairs(inner: Any, inv_freq: torch.Tensor) -> str:
    """How the model pairs channels, found by reading a few tokens at two places and turning the one to the other."""
    vocabulary = inner.get_input_embeddings().num_embeddings
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=inner.device)[None] % vocabulary
    places = torch.arange(_PROBE_TOKENS, device=inner.device)[None]
    kind, training = inner.config.model_type, inner.training
    tables = GroupTables(torch.ones(1, dtype=torch.int64), inv_freq.to(inner.device), _PROBE_TOKENS, PAIRS[0])
    found = []
    inner.eval()
    try:
        for shift in (0, _PROBE_SHIFT):
            found.append(_seen_by_layers(inner, ids, places + shift, tables))
    finally:
        inner.train(training)
    for pairs in PAIRS:
        by = torch.full((_PROBE_TOKENS,), _PROBE_SHIFT)
        turned_on = rotate(found[0], by, inv_freq.to(ids.device), pairs)
        if float((turned_on - found[1]).norm() / found[1].norm()) < 0.02:
            return pairs
    raise ValueError(f"model type {kind!r}: its queries are rotated in a way that SelfExtend does not know")


def _seen_by_layers(inner: Any, ids: torch.Tensor, places: torch.Tensor, tables: GroupTables) -> torch.Tensor:
    """Queries (1, H, T, D) float32 of the first layer, of `ids` at `places`."""
    kind, seen = inner.config.model_type, list[tuple[torch.Tensor, bool]]()
    token = _WATCHED.set(seen)
    try:
        with uncompiled():
            inner.base_model(input_ids=ids, position_ids=places, use_cache=False, **{GROUP_TABLES: tables})
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"model type {kind!r}: SelfExtend cannot stand in for its attention "
            f"({error}); use method = 'yarn'"
        ) from error
    finally:
        _WATCHED.reset(token)
    config = inner.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    if not seen or len(seen) != sum(not is_local(kind) for kind in kinds) or not all(told for _, told in seen):
        raise ValueError(
            f"model type {kind!r}: not every layer of full attention takes it from transformers' interface and hands "
            "on what that needs"
        )
    return seen[0][0].float()
