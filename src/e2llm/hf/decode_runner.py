"""Decoding on a GPU: one token of each of many requests, by kernels, replayed from CUDA graphs.

Flows in: which requests, at which positions and scales; their last tokens are on the device already. Flows out: their
logits. A step of a small model is a thousand small kernels, which take longer to launch than to run: the whole step is
recorded once for each batch size of a ladder, its inputs in buffers that stay where they are, and replayed. A batch
between two sizes takes the larger one and leaves places empty. Everything is queued; nothing waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from e2llm.hf import paged_decode
from e2llm.hf.packed import KeyValuePages
from e2llm.hf.packed_groups import TokenGroups, Turns, groups_of, token_groups, turns
from e2llm.hf.packed_model import PackedModel
from e2llm.hf.paged import Extras, attending
from e2llm.hf.row_tables import RowTables

# N = tokens of a step, H = query heads, G = key-value heads, D = head dim, V = vocabulary size

WARM_UPS = 2
"""Runs before one is recorded: kernels are compiled and libraries take their memory there."""

_log = logging.getLogger(__name__)


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, then steps of a quarter to a half, up to `most`."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return [size for size in sizes if size < most] + [most]


@dataclass
class _Batch:
    """One batch size: its buffers, and the recorded step once there is one. Answers attention while it runs."""

    size: int
    store: KeyValuePages
    tables: paged_decode.BlockTables
    most_items: int
    staged: torch.Tensor
    """int32, of `paged_decode.pack`."""
    rope: RowTables
    singles: paged_decode.Singles
    """Views of `staged`."""
    turns: Turns | None = None
    """Of the step that runs, where far keys stand in groups."""
    graph: torch.cuda.CUDAGraph | None = None
    logits: torch.Tensor | None = None
    """(N, V), written by each replay."""

    def attend(
        self,
        layer: int,
        window: int | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        extras: Extras,
    ) -> torch.Tensor:
        """(H, N, D), (G, N, D), (G, N, D) -> (N, H, D)."""
        shape, store, singles = self.store.shapes[layer], self.store.layers[layer], self.singles
        its_turns = self.turns if shape.far_dim else None
        paged_decode.write(store, shape, key.transpose(0, 1), value.transpose(0, 1), singles.slots, its_turns)
        query, tables = query.transpose(0, 1), self.tables.table
        return paged_decode.attend(query, store, shape, tables, singles, window, extras, its_turns)


class DecodeRunner:
    """Steps in which every request has one token to compute.

    `last`: (rows,) int64 on the device, the token that each row of the block tables goes on from. `record`: from CUDA
    graphs; without, the same buffers and kernels, launched one by one. `one_size`: every step takes the largest batch's
    graph, places left empty, in place of one from a ladder of sizes.
    """

    def __init__(
        self,
        packed: PackedModel,
        store: KeyValuePages,
        tables: paged_decode.BlockTables,
        last: torch.Tensor,
        *,
        record: bool,
        one_size: bool = False,
    ) -> None:
        self.packed, self.store, self.tables, self.last = packed, store, tables, last
        self.why_not_recorded: str | None = None if record else "not asked for"
        self._sizes = [len(last)] if one_size else batch_sizes(len(last))
        self._batches: dict[int, _Batch] = {}
        self._pool: Any = None
        self._stride = tables.table.stride(0)
        self._grouping = packed.extension.grouping
        if self._grouping is not None:
            self._inv_freq = torch.tensor(self._grouping.inv_freq, device=packed.device)
        if record:  # whether the model's step can be recorded is found out now and not in the first request
            with torch.inference_mode(), torch.cuda.device(packed.device):
                self._record_if_possible(self._new_batch(self._sizes[0], (1.0,)))

    @property
    def recorded(self) -> list[int]:
        """Batch sizes that are replayed."""
        return sorted(size for size, batch in self._batches.items() if batch.graph is not None)

    def logits(
        self,
        rows: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        scales: Sequence[float],
        token_scale: np.ndarray,
    ) -> torch.Tensor:
        """(N, V) logits after the last tokens of `rows`, whose keys go to `slots`; valid until the next call's.

        rows, positions, slots (N,) int64: row of the block tables, position, and page · S + place of each token.
        token_scale (N,): which of `scales` it has.
        """
        if self._stride != self.tables.table.stride(0):  # the tables have moved
            self._batches.clear()
            self._pool, self._stride = None, self.tables.table.stride(0)
        count = len(rows)
        size = next(size for size in self._sizes if size >= count)
        batch = self._batches.get(size) or self._new_batch(size, scales)
        empty = size - count
        positions, token_scale = np.pad(positions, (0, empty), constant_values=-1), np.pad(token_scale, (0, empty))
        packed = paged_decode.pack(
            np.pad(rows, (0, empty)),
            positions,
            np.pad(slots, (0, empty)),  # the page of zeros, which is masked wherever it is read
            batch.most_items,
            self._groups(positions, scales, token_scale),
        )
        batch.staged.copy_(self._pinned(packed), non_blocking=True)
        which = self._pinned(token_scale).to(self.packed.device, non_blocking=True)
        batch.rope.copy_(self.packed.extension.token_tables(scales, which))
        if batch.graph is None:
            self._record_if_possible(batch)
        if batch.graph is None:
            batch.logits = self._run(batch)
        else:
            batch.graph.replay()
        assert batch.logits is not None
        return batch.logits[:count]

    def _groups(self, positions: np.ndarray, scales: Sequence[float], token_scale: np.ndarray) -> TokenGroups | None:
        if self._grouping is None:
            return None
        groups = groups_of(self._grouping, scales, token_scale)
        return token_groups(positions, groups, self._grouping.neighbours)

    def _pinned(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.pin_memory() if self.packed.device.type == "cuda" else tensor

    def _new_batch(self, size: int, scales: Sequence[float]) -> _Batch:
        device = self.packed.device
        heads = min(shape.kv_heads for shape in self.store.shapes.values())
        grouped = self._grouping is not None
        most = paged_decode.most_items(size, heads, device, grouped=grouped)
        empty, zeros = np.full(size, -1), np.zeros(size, dtype=int)
        packed = paged_decode.pack(zeros, empty, zeros, most, self._groups(empty, scales, zeros))
        staged = torch.from_numpy(packed).to(device)
        which = torch.zeros(size, dtype=torch.int64, device=device)
        rope = self.packed.extension.token_tables(scales, which)
        singles = paged_decode.unpack(staged, size, grouped=grouped)
        batch = _Batch(size, self.store, self.tables, most, staged, rope, singles)
        self._batches[size] = batch
        return batch

    def _run(self, batch: _Batch) -> torch.Tensor:
        """(N, V), all on the device: may be recorded."""
        singles = batch.singles
        ids = self.last.index_select(0, singles.rows)[None]
        positions = (singles.lengths - 1).clamp(min=0).long()[None]
        if self._grouping is not None:
            assert singles.by is not None, "staged with groups"
            batch.turns = turns(singles.by, self._inv_freq, self._grouping.pairs)
        with self.packed.extension.using(batch.rope), attending(batch):
            found: torch.Tensor = self.packed.model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        return found

    def _record(self, batch: _Batch) -> None:
        """Its own inputs are in the buffers: the runs before write what the replay will write again."""
        side = torch.cuda.Stream(self.packed.device)
        side.wait_stream(torch.cuda.current_stream(self.packed.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._run(batch)
        torch.cuda.current_stream(self.packed.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            batch.logits = self._run(batch)
        batch.graph, self._pool = graph, graph.pool()

    def _record_if_possible(self, batch: _Batch) -> None:
        """A step that cannot be recorded is said once, and launched kernel by kernel from then on."""
        if self.why_not_recorded is not None:
            return
        try:
            self._record(batch)
        except (RuntimeError, NotImplementedError) as error:
            batch.graph = None
            self.why_not_recorded = str(error).strip().split("\n")[0]
            _log.warning(
                "decoding of %s is launched kernel by kernel, which is slower: a step of %d tokens cannot be recorded "
                "as a CUDA graph (%s)",
                self.packed.kind,
                batch.size,
                self.why_not_recorded,
            )
