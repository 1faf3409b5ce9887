"""What is hidden: words, numbers, UUIDs, variable names, coded words, drawn from a generator.

Words are those of the text that the questions are asked in, so that the kinds work in any language and need no list.
"""

from __future__ import annotations

import re
import string
import uuid
from collections.abc import Callable, Iterable, Sequence

import numpy as np

_WORD = re.compile(r"[^\W\d_]{4,14}")
_TEXT_READ = 2_000_000
"""Characters of a text that its words are taken from."""
LEAST_WORDS = 120
"""Fewer would give names that repeat."""

Draw = Callable[[np.random.Generator], str]


def words_of(texts: Iterable[str]) -> list[str]:
    """Distinct words of 4 to 14 letters, small, sorted. Raises ValueError for texts with too few of them."""
    found = sorted({word.lower() for text in texts for word in _WORD.findall(text[:_TEXT_READ])})
    if len(found) < LEAST_WORDS:
        raise ValueError(
            f"corpora: the text has {len(found)} different words of 4 to 14 letters and the questions draw theirs "
            f"from at least {LEAST_WORDS}; give longer or richer text"
        )
    return found


def distinct_words(random: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    """`count` different words; where the text has no more, two of them joined make one."""
    picked = [words[i] for i in random.permutation(len(words))[:count]]
    seen = set(picked)
    while len(picked) < count:
        pair = "".join(words[int(i)] for i in random.integers(len(words), size=2))
        if pair not in seen:
            seen.add(pair)
            picked.append(pair)
    return picked


def name_drawer(words: Sequence[str]) -> Draw:
    """Two words with a hyphen (RULER: an adjective and a noun)."""
    return lambda random: "-".join(words[int(i)] for i in random.integers(len(words), size=2))


def number(random: np.random.Generator) -> str:
    """Seven digits."""
    return str(random.integers(1_000_000, 10_000_000))


def any_uuid(random: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=random.bytes(16), version=4))


def letters(random: np.random.Generator, alphabet: str, count: int) -> str:
    return "".join(alphabet[int(i)] for i in random.integers(len(alphabet), size=count))


def variable(random: np.random.Generator) -> str:
    """Five capital letters."""
    return letters(random, string.ascii_uppercase, 5)


def coded_word(random: np.random.Generator) -> str:
    """Six small letters that mean nothing."""
    return letters(random, string.ascii_lowercase, 6)


def distinct(random: np.random.Generator, draw: Draw, count: int, taken: Sequence[str] = ()) -> list[str]:
    """`count` draws, all different and none of `taken`."""
    found: dict[str, None] = {}
    while len(found) < count:
        one = draw(random)
        if one not in taken:
            found.setdefault(one)
    return list(found)
