"""Single tokens over paged keys: made at random, and attention over them written out by hand in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from e2llm.hf.packed_groups import TokenGroups, token_groups, turns
from e2llm.hf.paged import Extras, LayerShape
from e2llm.hf.paged_decode import BlockTables, Singles, attend, most_items, pack, unpack

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Relative distance."""


def make(lengths: list[int], heads: int, shape: LayerShape, page: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Query (N, H, D), a store with every request's keys in pages of no order, block tables."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // page) for length in lengths]
    places = torch.randperm(sum(needed) + 3, generator=generator)[: sum(needed)] + 1
    store = torch.randn(sum(needed) + 4, page, shape.kv_heads, shape.width, generator=generator).to(shape.dtype)
    query = torch.randn(len(lengths), heads, shape.key_dim, generator=generator).to(shape.dtype)
    tables = BlockTables(len(lengths), max(needed, default=1), torch.device("cpu"))
    rows = list(reversed(range(len(lengths))))  # a token's row of the tables is not its place in the batch
    for row, pages in zip(rows, places.split(needed), strict=True):
        tables.set(row, pages.numpy())
    return query, store, tables.table, torch.tensor(rows)


def _pack(lengths: list[int], rows: torch.Tensor, most: int, groups: TokenGroups | None = None) -> torch.Tensor:
    slots = np.zeros(len(lengths), dtype=np.int64)
    return torch.from_numpy(pack(rows.numpy(), np.array(lengths) - 1, slots, most, groups))


def singles(lengths: list[int], rows: torch.Tensor, most: int) -> Singles:
    return unpack(_pack(lengths, rows, most), len(lengths))


def _extras_on(extras: Extras, device: str) -> Extras:
    return dataclasses.replace(extras, sinks=None if extras.sinks is None else extras.sinks.to(device))


def by_hand(
    query: torch.Tensor, store: torch.Tensor, table: torch.Tensor, length: int, window: int | None, extras: Extras
) -> torch.Tensor:
    """(H, D) of one token, float64, a head at a time."""
    heads, dim = query.shape
    groups = store.shape[2]
    kept = store[table[: -(-length // store.shape[1])].long()].flatten(0, 1)[:length].double()
    kept = kept[-window:] if window else kept
    rows = []
    for head in range(heads):
        key, value = kept[:, head // (heads // groups)].split((dim, kept.shape[-1] - dim), dim=-1)
        scores = key @ query[head].double() * (extras.scaling or dim**-0.5)
        if extras.softcap:
            scores = torch.tanh(scores / extras.softcap) * extras.softcap
        if extras.sinks is not None:
            scores = torch.cat((scores, extras.sinks[head : head + 1].double()))
            value = torch.cat((value, torch.zeros(1, value.shape[1], dtype=torch.float64)))
        rows.append(scores.softmax(0) @ value)
    return torch.stack(rows)


def check(
    lengths: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    key_dim: int = 32,
    value_dim: int = 32,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    extras: Extras | None = None,
    device: str = "cpu",
) -> None:
    shape, extras = LayerShape(kv_heads, key_dim, value_dim, dtype, window), extras or Extras(None)
    query, store, tables, rows = make(lengths, heads, shape, page)
    most = most_items(len(lengths), kv_heads, torch.device(device))
    where = unpack(_pack(lengths, rows, most).to(device), len(lengths))
    there = (query.to(device), store.to(device), shape, tables.to(device), where, window, _extras_on(extras, device))
    found = attend(*there).cpu()
    for place, length in enumerate(lengths):
        if not length:
            assert not found[place].any(), "an empty place"
            continue
        expected = by_hand(query[place], store, tables[rows[place]], length, window, extras)
        error = (found[place].double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[dtype], (length, error)


def turned_by_hand(x: torch.Tensor, by: int, inv_freq: torch.Tensor, pairs: str) -> torch.Tensor:
    """(…, D) turned by `by` positions, float64; of complex numbers."""
    x, count = x.double(), len(inv_freq)
    own, rest = x[..., : 2 * count], x[..., 2 * count :]
    a, b = own.chunk(2, dim=-1) if pairs == "halves" else (own[..., ::2], own[..., 1::2])
    z = torch.complex(a, b) * torch.polar(torch.ones(count, dtype=torch.float64), by * inv_freq.double())
    parts = (z.real, z.imag)
    both = torch.cat(parts, dim=-1) if pairs == "halves" else torch.stack(parts, dim=-1).flatten(-2)
    return torch.cat((both, rest), dim=-1)


def in_groups_by_hand(
    query: torch.Tensor, far_query: torch.Tensor, kept: torch.Tensor, far: int, shape: LayerShape
) -> torch.Tensor:
    """(H, D) of one token over what was kept of its keys (K, G, width), float64: the first `far` keys are far ones."""
    rows = []
    for head in range(len(query)):
        own = kept[:, head // (len(query) // shape.kv_heads)].double()
        key, value, far_key = own.split((shape.key_dim, shape.value_dim, shape.far_dim), dim=-1)
        scores = torch.cat((far_key[:far] @ far_query[head].double(), key[far:] @ query[head].double()))
        rows.append((scores * shape.key_dim**-0.5).softmax(0) @ value)
    return torch.stack(rows)


def check_in_groups(
    lengths: list[int],
    groups: list[int],
    neighbours: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    key_dim: int = 32,
    value_dim: int = 32,
    rotated: int | None = None,
    pairs: str = "halves",
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Tokens whose far keys stand in `groups`; what a token sees of a page past its length is no number."""
    shape = LayerShape(kv_heads, key_dim, value_dim, dtype, None, far_dim=key_dim)
    query, store, tables, rows = make(lengths, heads, shape, page)
    own = token_groups(np.array(lengths) - 1, np.array(groups), neighbours)
    most = most_items(len(lengths), kv_heads, torch.device(device), grouped=True)
    where = unpack(_pack(lengths, rows, most, own).to(device), len(lengths), grouped=True)
    inv_freq = 0.5 ** torch.arange((rotated or key_dim) // 2)
    assert where.by is not None
    tables_of = turns(where.by, inv_freq.to(device), pairs)
    for place, length in enumerate(lengths):
        if length % page:
            store[tables[rows[place]][length // page].long(), length % page :] = float("nan")
    there = (query.to(device), store.to(device), shape, tables.to(device), where, None, Extras(None))
    found = attend(*there, tables_of).cpu()
    for place, (length, group) in enumerate(zip(lengths, groups, strict=True)):
        if not length:
            assert not found[place].any(), "an empty place"
            continue
        position = length - 1
        far = max(0, length - neighbours) if group > 1 else 0
        by = position // group + neighbours - neighbours // group - position
        far_query = turned_by_hand(query[place], by, inv_freq, pairs)
        kept = store[tables[rows[place]][: -(-length // page)].long()].flatten(0, 1)[:length]
        expected = in_groups_by_hand(query[place], far_query, kept, far, shape)
        error = (found[place].double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[dtype], (length, group, error)
