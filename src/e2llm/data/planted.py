"""Windows of ordinary text in which facts are stated and asked for again: long-range supervision from short data.

Flows in: windows of a text source. Flows out: the same windows, a share of them with names and values between their
lines and questions about them later. Under jumps the two stand at any distance. Facts and wording are those of
`synthetic.plant` and `synthetic_codes.plant_codes`: none of an evaluation's. A window is a function of (text, seed,
number), as without planting. Tokens with which answers begin may count for more in the loss: they are the choice among
the values of a set, what follows is copied. The other tokens of planted lines may carry none, which was
asked to see what part of their cost it is that such lines are expected between those of ordinary text.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from e2llm.data.order import keyed_hash
from e2llm.data.parts import PackedWindows, TextPart, Window
from e2llm.data.pieces import Jumps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from e2llm.data.synthetic import Asked

SHORTEST = 256
"""Tokens of text below which nothing is planted."""
CODES = 0.75
"""Share of the sets of facts that are made of random codes (docs/decisions.md has what it brings)."""
ANSWER_TOKENS = 3
"""Tokens of an answer that have `data.planted_weight`."""
_PLANT = 0x706C616E74  # keeps these random numbers apart from others drawn from the same seed
_CODES = 0x636F646573


@dataclass(frozen=True)
class PlantedPart:
    """A text source whose windows hold planted facts, a share of them."""

    part: TextPart
    tokenizer: PreTrainedTokenizerBase
    share: float
    sets: int
    """Most sets of facts in one window."""
    answer_weight: float = 1.0
    """How much the first tokens of an answer count in the loss."""
    answers_only: bool = False
    """Of planted lines, answers and what ends their lines carry loss, nothing else."""

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def weight(self) -> float:
        return self.part.weight

    def windows(self, window: int) -> PlantedWindows:
        return PlantedWindows(self, window)


class PlantedWindows:
    """`PackedWindows` with facts in a share of what is drawn."""

    def __init__(self, planted: PlantedPart, window: int) -> None:
        self.planted = planted
        self.inner = PackedWindows(planted.part, window)
        self.num_unusable = 0

    def draw(self, number: int, seed: int, jumps: Jumps | None = None) -> Window:
        """The same for the same (seed, number). `jumps`: of windows without facts."""
        key = keyed_hash(_PLANT, seed, number)
        if (key >> 11) / 2**53 >= self.planted.share:
            return self.inner.draw(number, seed, jumps)
        inner, planted = self.inner.draw(number, seed), self.planted
        weight, only = planted.answer_weight, planted.answers_only
        return plant_window(inner, planted.tokenizer, key >> 2, planted.sets, weight, answers_only=only)


def plant_window(
    window: Window,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    most: int,
    answer_weight: float = 1.0,
    *,
    answers_only: bool = False,
) -> Window:
    """`window` with 1 to `most` sets of facts in its longest document; as it was where that is too short for any.

    The first tokens of answers have `answer_weight`. With `answers_only` planted lines carry loss from where an answer
    begins to the line's end, and nowhere else; text that was there before carries all of its own. What no longer fits
    is taken from the end of that document, so that the window keeps its length and every question its place.
    """
    edges = [0, *(int(start) for start in window.document_starts if start), len(window.tokens)]
    first, stop = max(itertools.pairwise(edges), key=lambda span: span[1] - span[0])
    if window.loss is not None or stop - first < SHORTEST:
        return window
    planted = _planted_tokens(window.tokens[first:stop], tokenizer, seed, most)
    if planted is None:
        return window
    tokens = np.concatenate([window.tokens[:first], planted.tokens, window.tokens[stop:]])
    weights = None
    if answer_weight != 1:
        weights = np.ones(len(tokens), dtype=np.float32)
        weights[first + planted.answers] = answer_weight
    loss = None
    if answers_only:
        loss = np.ones(len(tokens), dtype=bool)
        loss[first : first + len(planted.loss)] = planted.loss
    return Window(tokens, loss, window.document_starts, weights)


class _Planted(NamedTuple):
    tokens: np.ndarray
    """As many as came in."""
    answers: np.ndarray
    """Places of those with which answers begin."""
    loss: np.ndarray
    """bool, one a token: what was there before, and of planted lines the answers with what ends their lines."""


def _planted_tokens(
    tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, seed: int, most: int
) -> _Planted | None:
    """Text with facts, filled up with what is left of it. None if that cannot be done."""
    # Long codes may take more than a short window has: then fewer sets of facts.
    found = (_with_rounds(tokens, tokenizer, seed, rounds) for rounds in range(1 + seed % most, 0, -1))
    return next((planted for planted in found if planted is not None), None)


def _with_rounds(
    tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, seed: int, rounds: int
) -> _Planted | None:
    room = len(tokens) * 15 // 16
    for _ in range(4):
        room = _line_end(tokens, room, tokenizer)
        host = text = str(tokenizer.decode(tokens[:room].tolist())).removesuffix("\n")
        asked: list[Asked] = []
        for index in range(rounds):
            text = _with_facts(text, seed, index, asked)
        encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        found = encoded["input_ids"]
        if len(found) <= len(tokens):
            rest = tokens[room : room + len(tokens) - len(found)]
            if len(found) + len(rest) == len(tokens):
                offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
                answers, ends = _answer_tokens(offsets, text, asked)
                loss = np.ones(len(tokens), dtype=bool)
                loss[: len(found)] = _host_tokens(offsets, text, host) | ends
                return _Planted(np.concatenate([np.asarray(found, dtype=np.int64), rest]), answers, loss)
            room = min(len(tokens), room + len(tokens) - len(found) - len(rest))
        else:
            room -= len(found) - len(tokens) + 8
        if room < SHORTEST // 2:
            return None
    return None


def _answer_tokens(offsets: np.ndarray, text: str, asked: list[Asked]) -> tuple[np.ndarray, np.ndarray]:
    """Places of the first tokens of each answer; and bool (tokens,), whether a token is of an answer or of what follows
    it in its line, the line's end included. A question that a later set's lines have torn apart is not found, and a
    statement that reads like a question is none: nothing before it says its value."""
    begins, ends = offsets.T
    found: set[int] = set()
    carry = np.zeros(len(offsets), dtype=bool)
    for one in set(asked):
        place = text.find(one.text)
        while place >= 0:
            if text.find(one.text[one.start : one.stop]) < place + one.start:
                first = int(np.searchsorted(ends, place + one.start, side="right"))
                past = int(np.searchsorted(begins, place + one.stop, side="left"))
                found.update(range(first, min(past, first + ANSWER_TOKENS)))
                line_end = text.find("\n", place + one.stop)
                last = len(text) if line_end < 0 else line_end + 1
                carry[first : int(np.searchsorted(begins, last, side="left"))] = True
            place = text.find(one.text, place + 1)
    return np.asarray(sorted(found), dtype=np.int64), carry


def _host_tokens(offsets: np.ndarray, text: str, host: str) -> np.ndarray:
    """bool (tokens,): whether a token begins in a line of `host`, whose lines stand in `text` in their order."""
    lines, at, place = host.split("\n"), 0, 0
    ours = np.zeros(len(text) + 1, dtype=bool)
    for line in text.split("\n"):
        if at < len(lines) and line == lines[at]:
            ours[place : place + len(line) + 1] = True
            at += 1
        place += len(line) + 1
    return ours[np.minimum(offsets[:, 0], len(text))]


def _with_facts(text: str, seed: int, index: int, asked: list[Asked]) -> str:
    """`text` with one set of facts, of words and numbers or of codes; `asked` gets its questions."""
    from e2llm.data.synthetic import plant
    from e2llm.data.synthetic_codes import plant_codes

    if (keyed_hash(_CODES, seed, index) >> 11) / 2**53 < CODES:
        return plant_codes(seed, index, text, asked=asked)
    return plant(seed, index, text, quoted_pairs=False, asked=asked)


def _line_end(tokens: np.ndarray, room: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens up to the end of the last line within `room`, so that no line is torn; `room` where lines are too long."""
    for end in range(room, max(room - SHORTEST // 2, 0), -1):
        if str(tokenizer.decode(tokens[end - 1 : end].tolist())).endswith("\n"):
            return end
    return room
