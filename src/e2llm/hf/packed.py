"""Packed rows over paged keys: tokens of several requests stand in one row, each request's keys in pages of its own.

Flows in: `Piece`s, which tokens of which request a step computes and in which pages their keys live. Flows out: a
`PackedStep`, which answers every layer's attention: it writes the step's keys and values into their pages and lets
each token attend to its own request. Index tensors are made once a step, not once a layer. Where far keys stand in
groups (`positions.groups`), pages hold each key a second time, turned on to its group's place, and tokens of a request
with a group above 1 see their far keys by that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from e2llm.hf import paged_decode
from e2llm.hf.group_tables import Grouping
from e2llm.hf.packed_groups import token_groups, turns
from e2llm.hf.paged import Extras, LayerShape, attention, selected_attention
from e2llm.hf.row_tables import sent
from e2llm.hf.self_extend import read_in_groups

# T = tokens of a step, H = query heads, G = key-value heads, R = H / G, D = head dim, K = keys, S = tokens of a page

NULL_PAGE = 0
"""A page of zeros that fills up block tables; belongs to nobody."""
SMALL_KEYS = 256
"""Single tokens with up to this many keys share a batch whatever their lengths; with more, only up to twice as many
as the shortest."""
LONG_KEYS = 8192
"""With more keys a token is attended alone and without a mask: kernels then split its keys among all processors."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one request in a step."""

    pages: np.ndarray
    """(pages,) int64: the request's block table; page i holds its tokens i·S to (i + 1)·S - 1."""
    start: int
    """Position of the first token; the keys before it are in the pages already."""
    count: int
    group: int = 1
    """Tokens that stand at one place among its far keys; 1: all keys are near."""


class KeyValuePages:
    """Keys, values and far keys of every layer, side by side in one tensor (pages, S, G, width) a layer."""

    def __init__(self, shapes: dict[int, LayerShape], num_pages: int, page_tokens: int, device: torch.device) -> None:
        self.shapes, self.page_tokens, self.device = shapes, page_tokens, device
        # Zeros: a masked key counts nothing only where its value is finite.
        self.layers = {
            layer: _zeros((num_pages + 1, page_tokens, s.kv_heads, s.width), s.dtype, device)
            for layer, s in shapes.items()
        }

    @classmethod
    def borrowed(cls, page_tokens: int, device: torch.device) -> KeyValuePages:
        """Pages that somebody else owns: whoever does puts each layer's tensor and shape in. All that a masked key's
        value holds there must be finite."""
        return cls({}, 0, page_tokens, device)

    def wipe(self, pages: Sequence[int]) -> None:
        """Zero what `pages` hold, where it may not be finite."""
        index = torch.tensor(list(pages), dtype=torch.int64, device=self.device)
        for layer in self.layers.values():
            layer.index_fill_(0, index, 0)


@dataclass(frozen=True)
class _Singles:
    """Single-token pieces that are attended in one batch."""

    first: int
    """Place of the first one's token in the row; the others follow."""
    count: int
    table: torch.Tensor
    """(count · pages,) int64."""
    mask: torch.Tensor | None
    """(count, 1, 1, K) additive; None for a piece alone, whose `keys` it sees all."""
    keys: slice
    """Of the table's slots, those that are attended to."""
    far: torch.Tensor | None
    """(count, 1, 1, K) bool, which keys are far ones; None: none."""


@dataclass(frozen=True)
class _Chunk:
    """A piece of several tokens."""

    first: int
    count: int
    table: torch.Tensor | None
    """(pages,) int64; None where the request begins here: its keys are the step's own."""
    keys: int
    """Keys in use, from the table's first page on."""
    mask: torch.Tensor | None
    """(count, K) additive; None: causal, aligned at the last token."""
    grouped: bool
    """Whether some keys are far ones; `mask` is None then."""


@dataclass(frozen=True)
class _Plan:
    """How the layers of one kind attend."""

    singles: list[_Singles]
    chunks: list[_Chunk]


class PackedStep:
    """One forward pass over `pieces`, in this order; single tokens of like lengths side by side share a batch.

    With `tables` single tokens stand first and are attended by kernels; `rows` (singles,) are theirs in the tables.
    `grouping`: the model's, where the pieces have groups.
    """

    def __init__(
        self,
        pages: KeyValuePages,
        pieces: Sequence[Piece],
        tables: paged_decode.BlockTables | None = None,
        rows: np.ndarray | None = None,
        grouping: Grouping | None = None,
    ) -> None:
        self.pages, self.pieces, self._tables = pages, pieces, tables
        size = pages.page_tokens
        spots = [np.arange(p.start, p.start + p.count) for p in pieces]
        slots = [p.pages[spot // size] * size + spot % size for p, spot in zip(pieces, spots, strict=True)]
        self.position_ids = self._device(np.concatenate(spots))[None]
        """(1, T) int64."""
        self._slots = self._device(np.concatenate(slots))
        self._neighbours, groups, self._turns = 0, None, None
        if any(piece.group > 1 for piece in pieces):
            assert grouping is not None, "groups are those of a grouping"
            self._neighbours = grouping.neighbours
            of_tokens = np.repeat([piece.group for piece in pieces], [piece.count for piece in pieces])
            groups = token_groups(np.concatenate(spots), of_tokens, grouping.neighbours)
            inv_freq = sent(torch.tensor(grouping.inv_freq), pages.device)
            self._turns = turns(self._device(groups.by), inv_freq, grouping.pairs)
        self._by_kernel: paged_decode.Singles | None = None
        if tables is not None and rows is not None and len(rows):
            assert all(piece.count == 1 for piece in pieces[: len(rows)]), "single tokens stand first"
            heads = min(shape.kv_heads for shape in pages.shapes.values())
            most = paged_decode.most_items(len(rows), heads, pages.device, grouped=groups is not None)
            starts = np.array([piece.start for piece in pieces[: len(rows)]])
            its_groups = None if groups is None else groups.of(slice(len(rows)))
            packed = paged_decode.pack(rows, starts, np.concatenate(slots[: len(rows)]), most, its_groups)
            self._by_kernel = paged_decode.unpack(self._device(packed), len(rows), grouped=groups is not None)
        self._plans: dict[tuple[int | None, bool, torch.dtype], _Plan] = {}

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
        key, value = key.transpose(0, 1), value.transpose(0, 1)
        shape, store = self.pages.shapes[layer], self.pages.layers[layer]
        step_turns = self._turns if shape.far_dim else None
        far_key = key if step_turns is None else step_turns.key(key)
        written = (key, value, far_key) if shape.far_dim else (key, value)
        store.flatten(0, 1).index_copy_(0, self._slots, torch.cat(written, dim=-1))
        kind = (window, extras.plain, query.dtype)
        if kind not in self._plans:
            self._plans[kind] = self._plan(*kind)
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        if self._by_kernel is not None:
            assert self._tables is not None
            count = len(self._by_kernel.rows)
            singly = query[:, :count].transpose(0, 1)
            its_turns = None if step_turns is None else step_turns.of(slice(count))
            out[:count] = paged_decode.attend(
                singly, store, shape, self._tables.table, self._by_kernel, window, extras, its_turns
            )
        for singles in self._plans[kind].singles:
            rows = slice(singles.first, singles.first + singles.count)
            out[rows] = self._attend_singles(layer, query[:, rows], singles, extras)
        for chunk in self._plans[kind].chunks:
            rows = slice(chunk.first, chunk.first + chunk.count)
            own = (key[rows], value[rows], far_key[rows])
            out[rows] = self._attend_chunk(layer, query[:, rows], *own, chunk, extras)
        return out

    def _attend_singles(self, layer: int, query: torch.Tensor, singles: _Singles, extras: Extras) -> torch.Tensor:
        """(H, N, D) -> (N, H, D). The R query heads of a key head stand where tokens would, so keys are not copied for
        each."""
        shape, store, count = self.pages.shapes[layer], self.pages.layers[layer], singles.count
        kept = store.index_select(0, singles.table).view(count, -1, shape.kv_heads, store.shape[-1])
        kept = kept[:, singles.keys].transpose(1, 2)
        key, value, far_key = kept.split((shape.key_dim, shape.value_dim, shape.far_dim), dim=-1)
        queries = self._by_key_head(query, shape)
        if singles.far is not None:
            far_query = self._by_key_head(self._far_query(query, singles.first), shape)
            found = selected_attention(
                queries, far_query, key, far_key, value, singles.far, singles.mask, extras.scaling
            )
            return found.reshape(count, query.shape[0], -1)
        sinks = None if extras.sinks is None else extras.sinks.view(1, shape.kv_heads, -1, 1)
        found = attention(queries, key, value, extras, mask=singles.mask, sinks=sinks)
        return found.reshape(count, query.shape[0], -1)

    def _attend_chunk(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        far_key: torch.Tensor,
        chunk: _Chunk,
        extras: Extras,
    ) -> torch.Tensor:
        """(H, N, D), the chunk's own key, value and far key (N, G, D) -> (N, H, D)."""
        shape = self.pages.shapes[layer]
        if chunk.table is not None:
            kept = self.pages.layers[layer].index_select(0, chunk.table).flatten(0, 1)[: chunk.keys]
            key, value, far_key = kept.split((shape.key_dim, shape.value_dim, shape.far_dim), dim=-1)
        if chunk.grouped:
            far_query = self._far_query(query, chunk.first)
            key, far_key, value = (t.transpose(0, 1)[None] for t in (key, far_key, value))
            scaling = query.shape[-1] ** -0.5 if extras.scaling is None else extras.scaling
            found = read_in_groups(query[None], far_query[None], key, far_key, value, self._neighbours, scaling)
            return found[0]
        shared = query.shape[0] // shape.kv_heads
        key, value = (t.transpose(0, 1)[:, None].expand(-1, shared, -1, -1) for t in (key, value))
        queries = query.reshape(shape.kv_heads, shared, chunk.count, -1)
        sinks = None if extras.sinks is None else extras.sinks.view(shape.kv_heads, shared, 1, 1)
        found = attention(queries, key, value, extras, mask=chunk.mask, causal=chunk.mask is None, sinks=sinks)
        return found.flatten(0, 1).transpose(0, 1)

    def _by_key_head(self, query: torch.Tensor, shape: LayerShape) -> torch.Tensor:
        """(H, N, D) -> (N, G, H / G, D)."""
        return query.transpose(0, 1).reshape(query.shape[1], shape.kv_heads, -1, query.shape[-1])

    def _far_query(self, query: torch.Tensor, first: int) -> torch.Tensor:
        """(H, N, D) of the tokens from `first` on, turned on to where far keys are seen from."""
        assert self._turns is not None, "someone has far keys"
        return self._turns.of(slice(first, first + query.shape[1])).query(query)

    def _far_keys(self, piece: Piece) -> int:
        """Keys that are far from the last token of `piece`: the first ones."""
        return max(0, piece.start + piece.count - self._neighbours) if piece.group > 1 else 0

    def _device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.pages.device, non_blocking=True)

    def _first_page(self, piece: Piece, window: int | None) -> int:
        """First page that any token of the piece sees."""
        return 0 if window is None else max(0, piece.start - window + 1) // self.pages.page_tokens

    def _plan(self, window: int | None, plain: bool, dtype: torch.dtype) -> _Plan:
        places = np.cumsum([0, *(piece.count for piece in self.pieces)]).tolist()
        singles, chunks = [], []
        for run in self._runs(window):
            piece, place = self.pieces[run.start], places[run.start]
            if piece.count > 1:
                chunks.append(self._chunk(piece, place, window, plain, dtype))
            else:
                singles.append(self._singles([self.pieces[i] for i in run], place, window, dtype))
        return _Plan(singles, chunks)

    def _runs(self, window: int | None) -> Iterator[range]:
        """Neighbouring pieces that are attended together: single tokens of like lengths; a chunk alone."""
        begin = first = 0 if self._by_kernel is None else len(self._by_kernel.rows)
        longest, shortest = 0, 0
        for index, piece in enumerate(self.pieces[first:], first):
            keys = max(piece.start + 1 - self._first_page(piece, window) * self.pages.page_tokens, SMALL_KEYS)
            alone = piece.count > 1 or self.pieces[begin].count > 1 or max(longest, keys) > LONG_KEYS
            if index > begin and (alone or max(longest, keys) > 2 * min(shortest, keys)):
                yield range(begin, index)
                begin = index
            longest, shortest = (keys, keys) if index == begin else (max(longest, keys), min(shortest, keys))
        if begin < len(self.pieces):
            yield range(begin, len(self.pieces))

    def _singles(self, group: list[Piece], place: int, window: int | None, dtype: torch.dtype) -> _Singles:
        size = self.pages.page_tokens
        first_pages = [self._first_page(piece, window) for piece in group]
        tables = [piece.pages[page : piece.start // size + 1] for piece, page in zip(group, first_pages, strict=True)]
        if len(group) == 1:
            offset, end = first_pages[0] * size, group[0].start + 1
            first = 0 if window is None else max(0, end - window)
            seen = slice(first - offset, end - offset)
            far = self._far(group, end) if window is None else None
            return _Singles(place, 1, self._device(tables[0].copy()), None, seen, far)
        width = max(len(table) for table in tables)
        padded = np.full((len(group), width), NULL_PAGE, dtype=np.int64)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        starts = self._device(np.array([piece.start for piece in group]))[:, None]
        keys = self._device(np.array(first_pages) * size)[:, None] + torch.arange(width * size, device=starts.device)
        mask = _additive(keys, starts, window, dtype)[:, None, None]
        far = self._far(group, width * size) if window is None else None
        return _Singles(place, len(group), self._device(padded.reshape(-1)), mask, slice(None), far)

    def _far(self, group: list[Piece], keys: int) -> torch.Tensor | None:
        """Which of the first `keys` keys are far ones, (pieces, 1, 1, K); None where none is."""
        far = np.array([self._far_keys(piece) for piece in group])
        if not far.any():
            return None
        return torch.arange(keys, device=self.pages.device) < self._device(far)[:, None, None, None]

    def _chunk(self, piece: Piece, place: int, window: int | None, plain: bool, dtype: torch.dtype) -> _Chunk:
        size, device = self.pages.page_tokens, self.pages.device
        first_page, end = self._first_page(piece, window), piece.start + piece.count
        table = None if piece.start == 0 else self._device(piece.pages[first_page : (end - 1) // size + 1])
        keys = end - first_page * size
        binding = window is not None and window < end
        grouped = window is None and self._far_keys(piece) > 0
        if grouped or (plain and not binding and (piece.start == 0 or device.type == "cuda")):
            return _Chunk(place, piece.count, table, keys, None, grouped)  # kernels that are causal by themselves
        spots = torch.arange(first_page * size, end, device=device)
        queries = torch.arange(piece.start, end, device=device)[:, None]
        return _Chunk(place, piece.count, table, keys, _additive(spots, queries, window, dtype), grouped)


def _additive(keys: torch.Tensor, queries: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """0 where the token at position `queries` sees the one at `keys`, else -inf."""
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    return torch.zeros(seen.shape, dtype=dtype, device=keys.device).masked_fill_(~seen, float("-inf"))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU the system gives them memory where they are first written, which torch.zeros does everywhere."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
