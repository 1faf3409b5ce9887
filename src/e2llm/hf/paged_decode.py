"""Attention of single tokens over paged keys by Triton kernels: how the work is cut, and the launches.

Flows in: single tokens' queries, block tables on the device, how many keys each token sees. Flows out: what each
token attends to, for any mixture of lengths in two launches. A long request is cut into as many pieces as fill the
device; pieces are equal across requests, so that one of 128k tokens beside short ones does not wait for one processor.
The plain path (`packed.py`) is the oracle. Knows no requests and no model.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from e2llm.hf.packed_groups import TokenGroups, Turns
from e2llm.hf.paged import Extras, LayerShape

# N = single tokens, H = query heads, G = key-value heads, D = head dim, R = rotated channels

FILL = 4
"""Programs a multiprocessor should have."""
SMALLEST_PIECE = 128
"""Keys below which a piece costs more than it spreads."""
CPU_PROCESSORS = 2
"""Where kernels are interpreted (tests)."""


class BlockTables:
    """Block tables of running requests on the device, a row each; uploaded when a request gets its pages."""

    def __init__(self, rows: int, pages: int, device: torch.device) -> None:
        self.table = torch.zeros(rows, max(pages, 1), dtype=torch.int32, device=device)
        """(rows, pages) int32."""

    @classmethod
    def borrowed(cls, table: torch.Tensor) -> BlockTables:
        """Of a `table` (rows, pages) int32 that somebody else fills."""
        found = cls(0, 1, table.device)
        found.table = table
        return found

    def set(self, row: int, pages: np.ndarray) -> bool:
        """Row `row` is now `pages`; True where the whole table had to move, because a request is longer than any
        expected."""
        grown = len(pages) > self.table.shape[1]
        if grown:
            wider = self.table.new_zeros(self.table.shape[0], 2 * len(pages))
            wider[:, : self.table.shape[1]] = self.table
            self.table = wider
        self.table[row, : len(pages)] = torch.from_numpy(pages.astype(np.int32)).to(self.table.device)
        return grown


def processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return CPU_PROCESSORS


def most_items(tokens: int, kv_heads: int, device: torch.device, *, grouped: bool = False) -> int:
    """Pieces that `cut` makes of `tokens` tokens at most; `grouped`: whose far keys are cut apart."""
    return tokens * (1 + grouped) + -(-FILL * processors(device) // kv_heads)


def cut(lengths: np.ndarray, most: int, far: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut tokens that see `lengths` (N,) keys into at most `most` pieces of one size (most > N).

    Items (most, 3) int32 (token, first key, end; token -1: none), and of each token its first item and their number,
    (N,) int32 each. A length of 0 is an empty place. far: (N,) so many of the first keys are far ones, which share no
    piece with the others (most > 2 N).
    """
    ends = lengths[:, None] if far is None else np.stack((far, lengths), axis=1)  # of each token's ranges
    starts = np.zeros_like(ends)
    starts[:, 1:] = ends[:, :-1]
    tokens = np.repeat(np.arange(len(lengths)), ends.shape[1])
    starts, ends = starts.reshape(-1), ends.reshape(-1)
    size = max(SMALLEST_PIECE, -(-int(lengths.sum()) // (most - len(ends))))
    size = -(-size // 64) * 64
    counts = -(-(ends - starts) // size)
    firsts = np.cumsum(counts) - counts
    items = np.full((most, 3), -1, dtype=np.int32)
    made = int(counts.sum())
    ranges = np.repeat(np.arange(len(ends)), counts)
    begins = starts[ranges] + (np.arange(made) - firsts[ranges]) * size
    items[:made] = np.stack((tokens[ranges], begins, np.minimum(begins + size, ends[ranges])), axis=1)
    by_token = counts.reshape(len(lengths), -1).sum(axis=1)
    return items, (np.cumsum(by_token) - by_token).astype(np.int32), by_token.astype(np.int32)


@dataclass(frozen=True)
class Singles:
    """Where a batch of single tokens finds its keys, on the device; the same for every layer."""

    rows: torch.Tensor
    """(N,) int32, row of the block tables."""
    lengths: torch.Tensor
    """(N,) int32, keys that the token sees, itself included; 0: an empty place."""
    slots: torch.Tensor
    """(N,) int64, where its own key goes: page · S + place in the page."""
    items: torch.Tensor
    """(items, 3) int32, of `cut`."""
    firsts: torch.Tensor
    """(N,) int32."""
    counts: torch.Tensor
    """(N,) int32."""
    far: torch.Tensor | None = None
    """(N,) int32, of `TokenGroups`; None: no key is far."""
    by: torch.Tensor | None = None
    """(N, 2) int32, of `TokenGroups`."""


def pack(
    rows: np.ndarray, positions: np.ndarray, slots: np.ndarray, most: int, groups: TokenGroups | None = None
) -> np.ndarray:
    """All of `Singles` and the positions as one array of int32, so that one transfer a step brings them over.

    rows, slots (N,); positions (N,), -1 for an empty place.
    """
    items, firsts, counts = cut(positions + 1, most, None if groups is None else groups.far)
    parts = [slots.astype(np.int64).view(np.int32), rows, positions + 1, firsts, counts]
    parts += [] if groups is None else [groups.far, groups.by.reshape(-1)]
    return np.concatenate([part.astype(np.int32, copy=False) for part in (*parts, items.reshape(-1))])


def unpack(packed: torch.Tensor, tokens: int, *, grouped: bool = False) -> Singles:
    """Views into what `pack` made (with groups: `grouped`), on whatever device it is now."""
    slots, rest = packed[: 2 * tokens].view(torch.int64), packed[2 * tokens :]
    rows, lengths, firsts, counts = rest[: 4 * tokens].split(tokens)
    rest, far, by = rest[4 * tokens :], None, None
    if grouped:
        far, by, rest = rest[:tokens], rest[tokens : 3 * tokens].view(-1, 2), rest[3 * tokens :]
    return Singles(rows, lengths, slots, rest.view(-1, 3), firsts, counts, far, by)


def write(
    store: torch.Tensor,
    shape: LayerShape,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    turns: Turns | None = None,
) -> None:
    """key (N, G, D), value (N, G, D) of single tokens to their `slots` (N,) in `store` (pages, S, G, 2 D), and with
    `turns` the far keys to where they belong."""
    from e2llm.hf import paged_kernels as kernels

    key, value = _last_dense(key), _last_dense(value)
    with device_of(store):
        kernels.write_keys[(key.shape[0], shape.kv_heads)](
            *(key, value, store, slots, key if turns is None else turns.tables),
            *(key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
            *(store.stride(1), store.stride(2)),
            KEY_DIM=shape.key_dim,
            VALUE_DIM=shape.value_dim,
            KEY_BLOCK=tile_side(shape.key_dim, 1),
            VALUE_BLOCK=tile_side(shape.value_dim, 1),
            **_grouped(turns),
            enable_fp_fusion=True,
        )


def attend(
    query: torch.Tensor,
    store: torch.Tensor,
    shape: LayerShape,
    tables: torch.Tensor,
    singles: Singles,
    window: int | None,
    extras: Extras,
    turns: Turns | None = None,
) -> torch.Tensor:
    """Single tokens' queries (N, H, D) over `store` (pages, S, G, 2 D) -> (N, H, D of values), contiguous.

    turns: of these tokens, where some of their keys are far ones; for layers without a sliding window.
    """
    from e2llm.hf import paged_kernels as kernels

    query = _last_dense(query)
    tokens, heads = query.shape[:2]
    items = singles.items.shape[0]
    part = torch.empty(items, heads, shape.value_dim, dtype=torch.float32, device=query.device)
    stat = torch.empty(items, heads, 2, dtype=torch.float32, device=query.device)
    out = torch.empty(tokens, heads, shape.value_dim, dtype=query.dtype, device=query.device)
    value_block = tile_side(shape.value_dim, 16)
    of_groups = (stat, stat) if turns is None else (singles.far, turns.tables)
    with device_of(store):
        kernels.attend_items[(items, shape.kv_heads)](
            *(query, store, tables, singles.rows, singles.lengths, singles.items, *of_groups, part, stat),
            *(query.stride(0), query.stride(1), *store.stride()[:3], tables.stride(0)),
            query.shape[-1] ** -0.5 if extras.scaling is None else float(extras.scaling),
            extras.softcap or 1.0,
            window or 0,
            H=heads,
            R=heads // shape.kv_heads,
            S=store.shape[1],
            KEY_DIM=shape.key_dim,
            VALUE_DIM=shape.value_dim,
            ROWS=tile_side(heads // shape.kv_heads, 16),
            KEY_BLOCK=tile_side(shape.key_dim, 16),
            VALUE_BLOCK=value_block,
            CAPPED=extras.softcap is not None,
            WINDOWED=window is not None,
            WIDEN=query.device.type == "cpu" and query.dtype == torch.bfloat16,
            **_grouped(turns),
            **_tile(shape),
        )
        kernels.combine_items[(tokens, heads)](
            *(part, stat, singles.firsts, singles.counts, stat if extras.sinks is None else extras.sinks, out),
            H=heads,
            VALUE_DIM=shape.value_dim,
            ITEMS=16,
            VALUE_BLOCK=value_block,
            HAS_SINKS=extras.sinks is not None,
            num_warps=2,
            enable_fp_fusion=True,
        )
    return out


def _grouped(turns: Turns | None) -> dict[str, Any]:
    """What kernels are compiled for."""
    if turns is None:
        return {"GROUPED": False, "PAIRS": 1, "INTERLEAVED": False}
    return {"GROUPED": True, "PAIRS": turns.tables.shape[-1], "INTERLEAVED": turns.interleaved}


def _tile(shape: LayerShape) -> dict[str, Any]:
    """Keys a tile and how deep loads are pipelined: some 64 KiB of keys and values in flight a program."""
    key_bytes = max(tile_side(shape.key_dim, 16), tile_side(shape.value_dim, 16)) * shape.dtype.itemsize
    keys = 64 if key_bytes <= 256 else 32 if key_bytes <= 512 else 16
    return {"KEYS": keys, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def tile_side(size: int, least: int) -> int:
    """Power of two that holds `size`: what a tile's side has to be."""
    return max(least, 1 << (size - 1).bit_length())


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _last_dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
