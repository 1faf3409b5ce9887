"""Windows of ordinary text in which facts are stated and asked for again: long-range supervision from short data.

Flows in: windows of a text source. Flows out: the same windows, a share of them with names and values between their
lines and questions about them later. Under jumps the two stand at any distance. Facts and wording are those of
`synthetic.plant` and `synthetic_codes.plant_codes`: none of an evaluation's. A window is a function of (text, seed,
number), as without planting.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from e2llm.data.order import keyed_hash
from e2llm.data.parts import PackedWindows, TextPart, Window
from e2llm.data.pieces import Jumps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST = 256
"""Tokens of text below which nothing is planted."""
CODES = 0.75
"""Share of the sets of facts that are made of random codes (docs/decisions.md has what it brings)."""
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
        return plant_window(self.inner.draw(number, seed), self.planted.tokenizer, key >> 2, self.planted.sets)


def plant_window(window: Window, tokenizer: PreTrainedTokenizerBase, seed: int, most: int) -> Window:
    """`window` with 1 to `most` sets of facts in its longest document; as it was where that is too short for any.

    What no longer fits is taken from the end of that document, so that the window keeps its length and every question
    its place.
    """
    edges = [0, *(int(start) for start in window.document_starts if start), len(window.tokens)]
    first, stop = max(itertools.pairwise(edges), key=lambda span: span[1] - span[0])
    if window.loss is not None or stop - first < SHORTEST:
        return window
    text = _planted_tokens(window.tokens[first:stop], tokenizer, seed, most)
    if text is None:
        return window
    return Window(np.concatenate([window.tokens[:first], text, window.tokens[stop:]]), None, window.document_starts)


def _planted_tokens(
    tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, seed: int, most: int
) -> np.ndarray | None:
    """As many tokens as came in: text with facts, filled up with what is left of it. None if that cannot be done."""
    # Long codes may take more than a short window has: then fewer sets of facts.
    found = (_with_rounds(tokens, tokenizer, seed, rounds) for rounds in range(1 + seed % most, 0, -1))
    return next((planted for planted in found if planted is not None), None)


def _with_rounds(
    tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, seed: int, rounds: int
) -> np.ndarray | None:
    room = len(tokens) * 15 // 16
    for _ in range(4):
        room = _line_end(tokens, room, tokenizer)
        text = str(tokenizer.decode(tokens[:room].tolist())).removesuffix("\n")
        for index in range(rounds):
            text = _with_facts(text, seed, index)
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(found) <= len(tokens):
            rest = tokens[room : room + len(tokens) - len(found)]
            if len(found) + len(rest) == len(tokens):
                return np.concatenate([np.asarray(found, dtype=np.int64), rest])
            room = min(len(tokens), room + len(tokens) - len(found) - len(rest))
        else:
            room -= len(found) - len(tokens) + 8
        if room < SHORTEST // 2:
            return None
    return None


def _with_facts(text: str, seed: int, index: int) -> str:
    """`text` with one set of facts, of words and numbers or of codes."""
    from e2llm.data.synthetic import plant
    from e2llm.data.synthetic_codes import plant_codes

    if (keyed_hash(_CODES, seed, index) >> 11) / 2**53 < CODES:
        return plant_codes(seed, index, text)
    return plant(seed, index, text, quoted_pairs=False)


def _line_end(tokens: np.ndarray, room: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens up to the end of the last line within `room`, so that no line is torn; `room` where lines are too long."""
    for end in range(room, max(room - SHORTEST // 2, 0), -1):
        if str(tokenizer.decode(tokens[end - 1 : end].tolist())).endswith("\n"):
            return end
    return room
