"""RULER's aggregation kinds: a chain of variables to follow, the most common words of a list, of a coded text.

arXiv 2404.06654, Sect. 3 (variable tracking, common and frequent words) and Appendix B for the sizes. Variable
tracking and common words show one solved example first. Sizes are sentences or words.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from e2llm.evaluate.questions import Draft, Texts
from e2llm.evaluate.ruler.needles import hide, noise
from e2llm.evaluate.ruler.words import coded_word, distinct, distinct_words, variable

HOPS = 4
COMMON = 10
"""Words that are asked for of a list."""
SHORT_WINDOW = 4096
"""Below it (or where the common words alone would take half the window) lists are shorter, as in RULER: common words
stand 6 times and others once, instead of 30 and 3."""
FREQUENT = 3
"""Coded words asked for."""
ALPHA = 2.0
"""Exponent of the Zipf law that coded words follow."""
_MOST = 1_000_000

VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above."
)
VT_ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
CWE_ANSWER = " Answer: The top 10 words that appear most often in the list are:"
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
FWE_ANSWER = " Answer: According to the coded text above, the three most frequently appeared words are:"


def variable_tracking(texts: Texts, random: np.random.Generator, window: int, index: int) -> Draft:
    """One chain of four hops in noise: which variables hold the value?"""
    example_body, example_start, example_names = _chain(random, HOPS if window >= SHORT_WINDOW else 2)
    shown = example_body(24 if window >= SHORT_WINDOW else 8) + example_start + " ".join(example_names) + "\n\n"
    body, answer_start, names = _chain(random, HOPS)
    return Draft(
        body=lambda size: shown + body(size), answer_start=answer_start, expected=tuple(names), most=_MOST, least=6
    )


def _chain(random: np.random.Generator, hops: int):  # type: ignore[no-untyped-def]
    """(size -> text, beginning of the answer, names) of one chain."""
    names = distinct(random, variable, hops + 1)
    value = str(random.integers(10_000, 100_000))
    links = [f"VAR {names[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(names))]
    depths = sorted(float(random.random()) for _ in links)

    def body(size: int) -> str:
        return VT.format(context=hide(noise(size), links, depths), value=value)

    return body, VT_ANSWER.format(count=len(names), value=value), names


def common_words(texts: Texts, random: np.random.Generator, window: int, index: int) -> Draft:
    """A numbered list in which ten words stand thirty times and all others three times."""
    long = window >= SHORT_WINDOW and window >= 2 * COMMON * 30 * _tokens_a_word(texts)
    often, seldom = (30, 3) if long else (6, 1)
    sizes = (30, 10, 3) if long else (5, 3, 1)  # other words, times of the ten, of the others
    shown_words = distinct_words(random, texts.words, COMMON + sizes[0])
    shown = CWE.format(context=_list(random, shown_words, sizes[1], sizes[2])) + CWE_ANSWER
    shown += _numbered(shown_words[:COMMON]) + "\n\n"
    most = max(64, window // seldom)
    words = distinct_words(random, texts.words, COMMON + most)
    order = int(random.integers(2**31))

    def body(size: int) -> str:
        listed = _list(np.random.default_rng(order), words[: COMMON + size], often, seldom)
        return shown + CWE.format(context=listed)

    return Draft(body=body, answer_start=CWE_ANSWER, expected=tuple(words[:COMMON]), most=most, least=1)


def _tokens_a_word(texts: Texts) -> float:
    """What a word of the list takes; a tokenizer that cuts words small needs a shorter list at the same window."""
    words = texts.words[:: max(1, len(texts.words) // 100)]
    return len(texts.tokenizer(_numbered(words), add_special_tokens=False, verbose=False).input_ids) / len(words)


def _list(random: np.random.Generator, words: Sequence[str], often: int, seldom: int) -> str:
    """The first ten words `often` times, the others `seldom`, shuffled and numbered."""
    repeated = [word for i, word in enumerate(words) for _ in range(often if i < COMMON else seldom)]
    return _numbered([repeated[int(i)] for i in random.permutation(len(repeated))]).lstrip()


def _numbered(words: Sequence[str]) -> str:
    return "".join(f" {number}. {word}" for number, word in enumerate(words, start=1))


def frequent_words(texts: Texts, random: np.random.Generator, window: int, index: int) -> Draft:
    """Coded words, the k-th of them in proportion to k ** -2; the first is written as dots and does not count."""
    vocabulary = distinct(random, coded_word, max(16, min(2000, window // 16)))
    order = int(random.integers(2**31))
    weights = np.arange(1, len(vocabulary) + 1, dtype=np.float64) ** -ALPHA
    shares = weights / weights.sum()

    def body(size: int) -> str:
        counts = np.floor(size * shares).astype(int)
        # Fewer words of a rank than of the one before it, as far as they are asked for: else the question is open.
        for rank in range(FREQUENT, -1, -1):
            counts[rank] = max(counts[rank], counts[rank + 1] + 1)
        words = [w for w, n in zip(["....", *vocabulary[1:]], counts, strict=True) for _ in range(int(n))]
        places = np.random.default_rng(order).permutation(len(words))
        return FWE.format(context=" ".join(words[int(i)] for i in places))

    expected = tuple(vocabulary[1 : FREQUENT + 1])
    return Draft(body=body, answer_start=FWE_ANSWER, expected=expected, most=_MOST, least=math.ceil(1 / shares[4]))
