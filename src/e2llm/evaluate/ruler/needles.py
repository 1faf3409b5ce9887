"""RULER's needle kinds: sentences with a name and a value hidden in noise, in real text or among their like.

The eight kinds differ in what the haystack is, what names and values are, and how many are hidden or asked for
(arXiv 2404.06654, Table 2 and Appendix B). Sizes are words of text, or sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from e2llm.evaluate.questions import Draft, Texts
from e2llm.evaluate.ruler.words import Draw, any_uuid, distinct, name_drawer, number

Haystack = Literal["noise", "text", "needles"]
NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
_SEARCH = 60  # words, to the end of a sentence
_MOST_SENTENCES = 1_000_000

BODY = (
    "{some} special magic {values} {are} hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {values} afterwards.\n{context}\nWhat {are_all} the special magic {values} for {names} mentioned in the "
    "provided text?"
)
ANSWER = " The special magic {values} for {names} mentioned in the provided text {are}"
NEEDLE = "One of the special magic {plural} for {name} is: {value}."


@dataclass(frozen=True)
class Needles:
    """What one needle kind hides."""

    haystack: Haystack
    names: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_names: int = 1
    """Names hidden; the needle haystack is made of further ones."""
    num_values: int = 1
    """Values of each name."""
    num_asked: int = 1

    def __call__(self, texts: Texts, random: np.random.Generator, window: int, index: int) -> Draft:
        draw_name: Draw = any_uuid if self.names == "uuids" else name_drawer(texts.words)
        draw_value: Draw = any_uuid if self.values == "uuids" else number
        plural = "uuids" if self.values == "uuids" else "numbers"
        names = distinct(random, draw_name, self.num_names)
        values = distinct(random, draw_value, self.num_names * self.num_values)
        facts = [
            (name, values[i * self.num_values + k]) for i, name in enumerate(names) for k in range(self.num_values)
        ]
        asked = [names[int(i)] for i in sorted(random.permutation(len(names))[: self.num_asked])]
        depths = _depths(random, len(facts), index)
        needles = [NEEDLE.format(plural=plural, name=name, value=value) for name, value in facts]
        hay, most = self._hay(texts, random, index, plural, (draw_name, draw_value), names)
        expected = [(value, depth) for (name, value), depth in zip(facts, depths, strict=True) if name in asked]
        one = self.num_asked * self.num_values == 1
        wording = _wording(plural, asked, one)

        def body(size: int) -> str:
            return BODY.format(context=hide(hay(size), needles, depths), **wording)

        source = texts.documents[index % len(texts.documents)].name if self.haystack == "text" else ""
        return Draft(
            body=body,
            answer_start=ANSWER.format(**wording),
            expected=tuple(value for value, _ in expected),
            most=most,
            depths=tuple(depth for _, depth in expected),
            source=source,
        )

    def _hay(
        self,
        texts: Texts,
        random: np.random.Generator,
        index: int,
        plural: str,
        draws: tuple[Draw, Draw],
        taken: Sequence[str],
    ) -> tuple[Callable[[int], list[str]], int]:
        """(size -> pieces of the haystack, largest size)."""
        if self.haystack == "text":
            return texts.context(random, index), len(texts.running(index))
        if self.haystack == "noise":
            return noise, _MOST_SENTENCES
        made: list[str] = []
        each = 14 if self.names == "uuids" else 4  # noise sentences about as long as one needle

        def others(size: int) -> list[str]:
            while len(made) < size // each:  # drawn in order, so that a longer haystack begins with the shorter one
                name = next(n for n in iter(lambda: draws[0](random), "") if n not in taken)
                made.append(NEEDLE.format(plural=plural, name=name, value=draws[1](random)) + "\n")
            # What is left of the length, less than a needle, is noise: the prompt ends close to the window.
            return made[: size // each] + noise(size % each)

        return others, _MOST_SENTENCES


def noise(size: int) -> list[str]:
    """So many of the five sentences, over and over; a line for each round."""
    return [NOISE[i % 5] + ("\n" if i % 5 == 4 else " ") for i in range(size)]


def hide(pieces: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """The pieces with each needle at its depth, moved on to the next end of a sentence where one is near."""
    found: list[str] = []
    end = 0
    for depth, which in sorted(zip(depths, range(len(needles)), strict=True)):
        place = max(end, sentence_end(pieces, round(depth * len(pieces))))
        found += [*pieces[end:place], _apart(found or pieces[:place], needles[which])]
        end = place
    return ("".join(found) + "".join(pieces[end:])).strip()


def sentence_end(pieces: Sequence[str], place: int) -> int:
    """The first place from `place` on after which a sentence has ended; `place` itself where none is near."""
    for candidate in range(place, min(place + _SEARCH, len(pieces) + 1)):
        if candidate == 0 or pieces[candidate - 1].rstrip().endswith((".", "!", "?", ".”", '."', "。")):
            return candidate
    return place


def _apart(before: Sequence[str], needle: str) -> str:
    """The needle with a space before it, unless there is one, and after it."""
    space = "" if not before or before[-1][-1:].isspace() else " "
    return f"{space}{needle} "


def _depths(random: np.random.Generator, count: int, index: int) -> list[float]:
    """Places of the needles: the first in the tenth of the context whose turn it is, the others anywhere."""
    return [(index % 10 + random.random()) / 10, *(random.random() for _ in range(count - 1))]


def _wording(plural: str, asked: Sequence[str], one: bool) -> dict[str, str]:
    names = ", ".join(asked[:-1]) + (", and " if len(asked) > 1 else "") + asked[-1]
    if one:
        return {"some": "A", "values": plural[:-1], "are": "is", "are_all": "is", "names": names}
    return {"some": "Some", "values": plural, "are": "are", "are_all": "are all", "names": names}


NEEDLE_KINDS: dict[str, Needles] = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", values="uuids"),
    "niah_multikey_1": Needles("text", num_names=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", names="uuids", values="uuids"),
    "niah_multivalue": Needles("text", num_values=4),
    "niah_multiquery": Needles("text", num_names=4, num_asked=4),
}
