"""The training or held-out part of a source, cut into windows.

Flows in: a `TokenStore` and which of its documents belong here, or a generator of passages. Flows out: `Window`s.
Shapes: R = window, K = documents that begin inside a window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from e2llm.data.order import keyed_hash, permute
from e2llm.data.pieces import Jumps, piece_offsets
from e2llm.data.tokens import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SCAN_TOKENS = 2**22


@dataclass(frozen=True)
class Window:
    """R tokens in a row of the packed documents."""

    tokens: np.ndarray  # (R,) int64
    loss: np.ndarray | None
    """(R,) bool, None where all tokens carry loss."""
    document_starts: np.ndarray  # (K,) positions inside the window, ascending
    weights: np.ndarray | None = None
    """(R,) float32, how much each token counts in the loss; None where all count once."""


@dataclass(frozen=True)
class TextPart:
    """Documents of a store, packed in their order. Neighbours are kept as one run, so a split costs little memory."""

    name: str
    weight: float
    store: TokenStore
    num_documents: int
    run_starts: np.ndarray  # int64: where each run of documents begins in the store
    run_stops: np.ndarray

    @staticmethod
    def of(store: TokenStore, chosen: np.ndarray, *, name: str, weight: float) -> TextPart:
        """chosen: bool (D,), the documents of this part."""
        edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
        starts, stops = store.offsets[edges[::2]], store.offsets[edges[1::2]]
        return TextPart(name, weight, store, int(chosen.sum()), np.asarray(starts), np.asarray(stops))

    @functools.cached_property
    def _ends(self) -> np.ndarray:  # where each run ends in the packed stream
        return np.cumsum(self.run_stops - self.run_starts)

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """[start, stop) of the packed stream as spans of the store."""
        spans = []
        run = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            into_run = start - int(self._ends[run - 1] if run else 0)
            first = int(self.run_starts[run]) + into_run
            length = min(stop - start, int(self.run_stops[run]) - first)
            spans.append((first, first + length))
            start, run = start + length, run + 1
        return spans

    def windows(self, window: int) -> PackedWindows:
        return PackedWindows(self, window)


@dataclass(frozen=True)
class SyntheticPart:
    """Passages of a built-in generator, made when asked for; there is no end to them."""

    name: str
    weight: float
    generator: str
    tokenizer: PreTrainedTokenizerBase

    def windows(self, window: int) -> SyntheticWindows:
        return SyntheticWindows(self, window)


class Windows(Protocol):
    """What is drawn from, without end."""

    num_unusable: int
    """Windows left out because they hold nothing to learn."""

    def draw(self, number: int, seed: int, jumps: Jumps | None = None) -> Window:
        """The number-th window; the same for the same (number, seed). With `jumps` text jumps too, where it can: a
        generator's passages and windows with facts stay in one row."""
        ...


class Part(Protocol):
    """One source of training windows: text as it is, text with facts planted in it, or made-up passages."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    def windows(self, window: int) -> Windows: ...


class PackedWindows:
    """A part's stream cut every R tokens. What fills no window, and windows without a token to learn, are left out."""

    def __init__(self, part: TextPart, window: int) -> None:
        self.part = part
        self.window = window
        self.num_unusable = 0
        self._usable: np.ndarray | None = None
        num_windows = part.num_tokens // window
        if part.store.loss is not None:
            # A loss over no token is 0/0, which would end a run.
            has_target = self._scan(num_windows)
            self.num_unusable = int(num_windows - has_target.sum())
            self._usable = np.flatnonzero(has_target)

    def __len__(self) -> int:
        return self.part.num_tokens // self.window - self.num_unusable

    def __getitem__(self, number: int) -> Window:
        cut = number if self._usable is None else int(self._usable[number])
        spans = self.part.spans(cut * self.window, (cut + 1) * self.window)
        store = self.part.store
        loss = None if store.loss is None else self._gather(store.loss, spans).astype(bool)
        return Window(self._gather(store.tokens, spans).astype(np.int64), loss, self._document_starts(spans))

    def draw(self, number: int, seed: int, jumps: Jumps | None = None) -> Window:
        """The number-th window of an endless walk that visits all windows in a new order each epoch.

        With `jumps` only its first piece is that window's; the first token of every other piece carries no loss, for
        nothing before it leads to it."""
        epoch, step = divmod(number, len(self))
        chosen = permute(step, len(self), keyed_hash(seed, epoch))
        if jumps is None or not len(jumps):
            return self[chosen]
        if not jumps.other_documents:
            return self._further_on(chosen, jumps)
        others = [keyed_hash(seed, number, piece) % len(self) for piece in range(len(jumps))]
        return self._from_others(chosen, others, jumps)

    def _further_on(self, number: int, jumps: Jumps) -> Window:
        """Pieces of the document in which the window begins; the window as it is where that ends within it."""
        whole = self[number]
        cut = number if self._usable is None else int(self._usable[number])
        first, _ = self.part.spans(cut * self.window, cut * self.window + 1)[0]
        offsets = self.part.store.offsets
        end = int(offsets[np.searchsorted(offsets, first, side="right")])
        room = end - first - self.window
        if room <= 0:
            return whole
        skipped = piece_offsets(jumps, self.window, room)
        store, taken = self.part.store, np.arange(first, first + self.window) + skipped
        tokens = store.tokens[taken].astype(np.int64)
        loss = np.ones(self.window, bool) if store.loss is None else store.loss[taken].astype(bool)
        loss[jumps.places] &= np.diff(skipped)[jumps.places - 1] == 0
        return Window(tokens, loss, whole.document_starts[whole.document_starts == 0])

    def _from_others(self, number: int, others: list[int], jumps: Jumps) -> Window:
        """Each piece what stands there in another window."""
        whole = self[number]
        tokens = whole.tokens.copy()
        loss = np.ones(self.window, bool) if whole.loss is None else whole.loss.copy()
        for place, stop, other in zip(jumps.places, [*jumps.places[1:], self.window], others, strict=True):
            piece = self[other]
            tokens[place:stop] = piece.tokens[place:stop]
            loss[place:stop] = True if piece.loss is None else piece.loss[place:stop]
        loss[jumps.places] = False
        starts = whole.document_starts
        return Window(tokens, loss, starts[starts < jumps.places[0]])

    def _scan(self, num_windows: int) -> np.ndarray:  # (num_windows,) bool
        assert self.part.store.loss is not None
        found = np.zeros(num_windows, dtype=bool)
        block = max(1, _SCAN_TOKENS // self.window)
        for first in range(0, num_windows, block):
            last = min(first + block, num_windows)
            loss = self._gather(self.part.store.loss, self.part.spans(first * self.window, last * self.window))
            # The model shifts labels: nothing predicts a window's first token.
            found[first:last] = loss.reshape(-1, self.window)[:, 1:].any(axis=1)
        return found

    def _document_starts(self, spans: list[tuple[int, int]]) -> np.ndarray:
        offsets = self.part.store.offsets
        starts = []
        position = 0
        for first, stop in spans:
            low, high = np.searchsorted(offsets, (first, stop))
            starts.append(np.asarray(offsets[low:high]) - first + position)
            position += stop - first
        return np.concatenate(starts)

    @staticmethod
    def _gather(array: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
        return np.concatenate([array[first:stop] for first, stop in spans])


class SyntheticWindows:
    """Passages joined by EOS until R tokens are full; every draw starts a fresh one."""

    def __init__(self, part: SyntheticPart, window: int) -> None:
        self.part = part
        self.window = window
        self.num_unusable = 0
        self._generate = find_generator(part.generator)

    def draw(self, number: int, seed: int, jumps: Jumps | None = None) -> Window:
        """The same for the same (seed, number), whatever `jumps` are."""
        tokenizer = self.part.tokenizer
        tokens: list[int] = []
        starts: list[int] = []
        draw_seed = keyed_hash(seed, number) >> 1  # signed 64 bits hold it
        while len(tokens) < self.window:
            starts.append(len(tokens))
            ids = tokenizer(self._generate(draw_seed, len(starts) - 1), verbose=False)["input_ids"]
            tokens += ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        return Window(np.asarray(tokens[: self.window], dtype=np.int64), None, np.asarray(starts, dtype=np.int64))


def find_generator(name: str) -> Callable[[int, int], str]:
    """ValueError for a name that is no generator."""
    from e2llm.data.synthetic import GENERATORS

    if name not in GENERATORS:
        raise ValueError(
            f"data.sources.synthetic = {name!r}: no such generator; there are {', '.join(sorted(GENERATORS))}"
        )
    return GENERATORS[name]
