"""Steps of one model: which tokens of which requests go in, what is drawn for each that asks comes out, later.

Flows in: (request, tokens) pairs of `schedule.next_step`. Flows out: a `Flight`, whose draws are read when they are
wanted: on a GPU a step is queued and the next one may be queued behind it, from tokens that only the device knows yet.
Chooses the path once, when an engine is made: kernels and CUDA graphs, or plain gathering. Knows no queue and no lock.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from e2llm.engine.running import Running, Turning
from e2llm.engine.sampling import Drawn, Draws, start_draw
from e2llm.hf.decode_runner import DecodeRunner
from e2llm.hf.packed import KeyValuePages, PackedStep, Piece
from e2llm.hf.packed_model import PackedModel
from e2llm.hf.paged_decode import BlockTables
from e2llm.hf.rerotate import Rerotation

Attention = Literal["auto", "kernels", "plain"]
Step = list[tuple[Running, int]]

KEPT_SCALES = 256
"""Scales whose tables are kept stacked; with policy `exact` every length has its own."""

TABLE_PAGES = 2**14
"""Width that block tables have at least, memory allowing: a longer request moves them, and graphs are recorded anew."""

_log = logging.getLogger(__name__)


def choose_attention(wanted: Attention, device: torch.device) -> Literal["kernels", "plain"]:
    """The path of decoding. Raises ValueError where kernels are wanted, as always on CUDA, and Triton is missing."""
    if wanted not in ("auto", "kernels", "plain"):
        raise ValueError(f"attention = {wanted!r}: use 'auto', 'kernels' or 'plain'")
    if wanted == "plain" or (wanted == "auto" and device.type != "cuda"):
        return "plain"
    try:
        import triton  # type: ignore[import-not-found, unused-ignore] # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"attention = {wanted!r}: decoding on {device.type} uses kernels in Triton, which is not installed; "
            "pip install triton, or give attention='plain', which gathers every request's keys and is slower"
        ) from error
    return "kernels"


@dataclass(frozen=True)
class Flight:
    """A step that is on its way."""

    step: Step
    asking: list[Running]
    """Requests that a token is drawn for."""
    draws: Draws | None
    done: torch.cuda.Event | None
    """Where there is a queue, its end of the step."""

    def read(self) -> list[Drawn | None]:
        """What was drawn for each of `asking`. Waits until the step is done, also where it drew nothing: whoever is
        queued far ahead makes newcomers wait."""
        if self.done is not None:
            self.done.synchronize()
        return [] if self.draws is None else self.draws.read()


class Forward:
    """The model's side of an engine. Call from one thread."""

    def __init__(
        self,
        packed: PackedModel,
        store: KeyValuePages,
        max_running: int,
        num_pages: int,
        window_tokens: int,
        *,
        record: bool,
        one_size: bool = False,
        rerotate: bool = False,
    ) -> None:
        """`num_pages`: of the store. `window_tokens`: of the longest request that is expected. `record`: CUDA graphs,
        where there is CUDA; `one_size`: of the largest batch alone. Raises ValueError for `rerotate` of a model whose
        keys cannot be turned."""
        self.packed, self.store = packed, store
        device = packed.device
        self._last = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._free = list(reversed(range(max_running)))
        self._scales: dict[float, int] = {}
        self._tables: BlockTables | None = None
        self._runner: DecodeRunner | None = None
        if packed.kernels:
            width = min(num_pages, max(-(-window_tokens // store.page_tokens), TABLE_PAGES))
            self._tables = BlockTables(max_running, width, device)
            record = record and device.type == "cuda"
            self._runner = DecodeRunner(packed, store, self._tables, self._last, record=record, one_size=one_size)
        self._rerotation = Rerotation(packed, store) if rerotate else None
        _log.info("decoding of %s on %s: %s", packed.kind, device, self.describe())

    def describe(self) -> str:
        """The path, in words."""
        if self._runner is None:
            return "plain (keys gathered for each request)"
        if self._runner.why_not_recorded is None:
            return "kernels, recorded in CUDA graphs"
        return f"kernels, not recorded ({self._runner.why_not_recorded})"

    def enter(self, row: Running) -> None:
        """A request was admitted."""
        row.place = self._free.pop()
        self.moved(row)

    def turn(self, turning: Turning, scale: float) -> None:
        """Queue the turning of another scale's keys into those of `scale`."""
        assert self._rerotation is not None
        sources, targets = np.array(turning.sources), np.array(turning.targets)
        self._rerotation.turn(sources, targets, turning.first_position, turning.scale, scale)

    def moved(self, row: Running) -> None:
        """A request's pages are others."""
        if self._tables is not None:
            self._tables.set(row.place, row.table)

    def leave(self, row: Running) -> None:
        """A request that was admitted has ended. What is queued for it writes to its old pages, before their next
        owner does."""
        self._free.append(row.place)

    def launch(self, step: Step) -> Flight:
        """Queue `step`; requests that have no more to compute get a token."""
        asking = [row for row, count in step if count == row.remaining]
        decoding = sum(row.decoding for row, _ in step)
        index = self._scale_index([row.scale for row, _ in step])
        if self._runner is not None and decoding == len(step):
            logits = self._decode(self._runner, [row for row, _ in step], index)
        else:
            logits = self._mixed(step, decoding, index, set(asking))
        draws = None
        if asking:
            draws = start_draw(logits, [row.request.sampling for row in asking], [row.source for row in asking])
            places = torch.tensor([row.place for row in asking]).to(self._last.device, non_blocking=True)
            self._last.index_copy_(0, places, draws.tokens.clamp(min=0))
        done = None
        if self._last.is_cuda:
            done = torch.cuda.Event()
            done.record()
        return Flight(step, asking, draws, done)

    def _scale_index(self, scales: list[float]) -> np.ndarray:
        """Index of each in the tables' order, which grows and seldom changes, so that tables are seldom made."""
        if len(self._scales) > KEPT_SCALES:
            self._scales.clear()
        return np.array([self._scales.setdefault(scale, len(self._scales)) for scale in scales])

    def _decode(self, runner: DecodeRunner, rows: list[Running], index: np.ndarray) -> torch.Tensor:
        size = self.store.page_tokens
        positions = np.array([row.computed for row in rows])
        slots = np.array([row.table[row.computed // size] * size + row.computed % size for row in rows])
        return runner.logits(np.array([row.place for row in rows]), positions, slots, list(self._scales), index)

    def _mixed(self, step: Step, decoding: int, index: np.ndarray, asking: set[Running]) -> torch.Tensor:
        """Logits of the requests in `asking`; the first `decoding` ones go on from tokens on the device."""
        grouping = self.packed.extension.grouping
        groups = [1 if grouping is None else grouping.group(row.scale) for row, _ in step]
        pieces = [
            Piece(row.table, row.computed, count, group) for (row, count), group in zip(step, groups, strict=True)
        ]
        counts = [count for _, count in step]
        singles = None
        if self._tables is not None:
            singles = np.array([row.place for row, count in step if count == 1], dtype=np.int64)
        packed = PackedStep(self.store, pieces, self._tables, singles, grouping)
        known = [row.tokens[row.computed : row.computed + count] for row, count in step[decoding:]]
        read = np.array([0] * decoding + [token for tokens in known for token in tokens])
        ids = torch.from_numpy(read).to(self._last.device, non_blocking=True)
        if decoding:
            places = torch.tensor([row.place for row, _ in step[:decoding]]).to(ids.device, non_blocking=True)
            ids[:decoding] = self._last[places]
        ends = np.cumsum(counts) - 1
        wanted = [int(end) for end, (row, _) in zip(ends, step, strict=True) if row in asking]
        return self.packed.logits(packed, ids, list(self._scales), np.repeat(index, counts), wanted)
