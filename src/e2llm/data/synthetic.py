"""Synthetic passages that teach a small model to look things up and to copy inside its window.

Flows in: (seed, index), for `plant` also a host text. Flows out: one text passage. A passage depends on these alone
(one numpy Generator seeded with them), so any worker, rank or resume draws the same. Knows no tokenizer.

`key_values` states names and values, goes on about other things, and comes back to some of them. `copies` repeats a
random sequence after a gap. `plant` does what `key_values` does inside a given text. The evaluation's own wording
(pass keys in prose, UUIDs) never occurs here: see tests/data/test_synthetic.py. Facts of random codes are
`synthetic_codes`'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from e2llm.data.synthetic_words import ADJECTIVES, CODE_LINES, CODE_WORDS, FUNCTION_WORDS, NOUNS, VERBS

CONSONANTS = "b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kl pl pr sh sk st th tr".split()
VOWELS = "a e i o u ai ea ou".split()
WORDS = tuple(dict.fromkeys((*NOUNS, *VERBS, *ADJECTIVES, *CODE_WORDS)))
"""Words that names are made of, in any order: a lookup learned on few names does not carry over to new ones."""


class Asked(NamedTuple):
    """A question with its answer, as it stands in a text, and which of its characters the answer is."""

    text: str
    start: int
    stop: int


class Draw:
    """Shorthands over one numpy Generator; state is the generator's alone."""

    def __init__(self, *key: int) -> None:
        self.rng = np.random.default_rng(key)
        self.words: Sequence[str] = WORDS
        self.asked: list[Asked] = []
        """The questions written so far."""

    def number(self, low: int, high: int) -> int:
        """Uniform integer, both ends included."""
        return int(self.rng.integers(low, high + 1))

    def pick(self, items: Sequence):
        return items[int(self.rng.integers(len(items)))]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def characters(self, alphabet: str, length: int) -> str:
        return "".join([alphabet[i] for i in self.rng.integers(len(alphabet), size=length).tolist()])

    def digits(self, length: int) -> str:
        return self.characters("0123456789", length)

    def pseudo(self) -> str:
        """A word that no text holds, so that only looking back can tell it."""
        return "".join(self.pick(CONSONANTS) + self.pick(VOWELS) for _ in range(self.number(2, 4)))

    def identifier(self) -> str:
        parts = [self.pick(NOUNS) if self.chance(0.7) else self.pseudo() for _ in range(self.number(1, 3))]
        style = self.number(0, 3)
        if style == 0:
            return "".join([parts[0], *(p.capitalize() for p in parts[1:])])
        if style == 1:
            return "_".join(parts).upper()
        return "_".join(parts)


# --- names and values ------------------------------------------------------------------------------------------------

def phrase(draw: Draw) -> str:
    if draw.chance(0.6):
        words = [draw.pick(draw.words if draw.chance(0.6) else WORDS) for _ in range(draw.number(1, 3))]
        if not {"pass", "key"} <= set(words):  # the evaluation's name stays unseen
            return " ".join(words)
    kind = draw.number(0, 4)
    if kind == 0:
        return f"{draw.pick(NOUNS)} {draw.pick(NOUNS)}"
    if kind == 1:
        return f"{draw.pick(ADJECTIVES)} {draw.pick(NOUNS)}"
    if kind == 2:
        return f"{draw.pick(NOUNS)} of the {draw.pick(NOUNS)}"
    if kind == 3:
        return f"{draw.pseudo()} {draw.pick(NOUNS)}"
    return f"{draw.pick(ADJECTIVES)} {draw.pick(NOUNS)} {draw.pick(NOUNS)}"


def code_key(draw: Draw) -> str:
    kind = draw.number(0, 4)
    if kind <= 1:
        return draw.identifier()
    if kind == 2:
        return draw.characters("0123456789abcdef", draw.number(6, 12))
    if kind == 3:
        return draw.pseudo()
    return f"{draw.characters('ABCDEFGHKLMNPRSTVWXZ', 2)}-{draw.digits(draw.number(2, 4))}"


def names(draw: Draw, count: int, make: Callable[[Draw], str]) -> list[str]:
    """`count` different names; now and then they share words, so that the whole name must be matched."""
    if make is phrase and draw.chance(0.4):
        heads = [draw.pick(ADJECTIVES) for _ in range(3)]
        tails = [draw.pick(NOUNS) for _ in range(count)]
        names = dict.fromkeys(f"{draw.pick(heads)} {draw.pick(tails)}" for _ in range(4 * count))
    else:
        names = dict.fromkeys(make(draw) for _ in range(2 * count))
    return list(names)[:count]


def value(draw: Draw, *, in_sentence: bool) -> str:
    kind = draw.number(0, 9)
    if kind <= 5:
        # Five digits are the evaluation's: never where a sentence says that something is a number.
        return draw.digits(draw.pick((3, 4, 6, 7, 8) if in_sentence else (3, 4, 5, 6, 7, 8)))
    if kind == 6:
        return draw.characters("0123456789abcdef", draw.pick((6, 8, 10, 12)))
    if kind == 7:
        return draw.pick(NOUNS)
    return draw.pseudo() if kind == 8 else f"{draw.pick(ADJECTIVES)} {draw.pick(NOUNS)}"


# --- ways to state a fact and to come back to it (K = name, V = value) ------------------------------------------------

SENTENCES = (
    "The K is V.", "The K is V.", "V is the K.", "Note that the K is V.", "For the K, use V.", "The K was set to V.",
    "They wrote down V as the K.", "The K is V. Once more: V.", "The K is V, and V is what the K stays.",
    "Keep in mind: the K is V.", "The K: V.", "Nobody else knows that the K is V.",
)
SENTENCE_ASKS = (
    "So the K is V.", "As stated above, the K is V.", "Which K was given? V.", "Question: what was the K?\nAnswer: V.",
    "The K, again: V.", "Tell me the K: V.", "Recall the K. It is V.", "I asked about the K and they said V.",
    "Q: the K?\nA: V", "We saw that the K is V.", "The K is V.",
    # A question that names K right before the answer: the lookup must pass over that mention, which has no value.
    "Which K is it? The K is V.", "Do you remember the K? The K is V.", "Who can tell me the K? The K is V.",
    "Someone asked about the K. The K is V.", "Can you name the K? Yes, the K is V.", "Was there a K? The K is V.",
    "About the K: the K is V.", "Any idea of the K? Sure: the K is V.", "Back to the K. We know the K is V.",
)
ASSIGNMENTS = ("K = V", "self.K = V", "set(K, V)", "K: V", "K -> V", "export K=V", "# K is V")
ASSIGNMENT_ASKS = ("assert K == V", ">>> K\nV", "print(K)  # V", "K: V", "K = V", "# K was V", "get(K) == V")
PAIRS = (('{"K": "V"', ', "K": "V"', "}"), ("{'K': V", ",\n 'K': V", "}"), ("| K | V |", "\n| K | V |", ""),
         ("K: V", "\nK: V", ""), ("[settings]\nK = V", "\nK = V", ""), ("K=V", " K=V", ""), ("(K V)", " (K V)", ""))
PAIR_ASKS = ('"K": "V"', "'K': V", "| K | V |", "K: V", "K = V", "K=V", "(K V)")


def fill(template: str, name: str, value: str) -> str:
    # As it is, also at the start of a sentence: a value that is asked for later must stand there letter by letter.
    return _filled(_split(template), name, value)


def _filled(parts: Sequence[str], name: str, value: str) -> str:
    return "".join(name if part == "K" else value if part == "V" else part for part in parts)


def question(draw: Draw, template: str, name: str, value: str, quotes: tuple[str, str] = ("", "")) -> str:
    """`fill` of a question, with `quotes` around its value; the draw remembers which characters the answer is."""
    parts, quoted = _split(template), quotes[0] + value + quotes[1]
    before = len(parts) - 1 - parts[::-1].index("V")
    start = len(_filled(parts[:before], name, quoted)) + len(quotes[0])
    draw.asked.append(Asked(_filled(parts, name, quoted), start, start + len(value)))
    return draw.asked[-1].text


def _split(template: str) -> list[str]:
    """Cut a template at its K and V; no other capital K or V stands in one ("Keep" is guarded by its next letter)."""
    parts, start = [], 0
    for i, letter in enumerate(template):
        if letter in "KV" and not template[i + 1 : i + 2].isalpha():
            parts += [template[start:i], letter]
            start = i + 1
    return [*parts, template[start:]]


def _facts(draw: Draw, rows: range) -> tuple[list[str], list[str]]:
    """(blocks that state, lines that come back to some of it, in the order of the statements or any other). `rows`:
    which of `PAIRS` may be drawn."""
    style, count = draw.number(0, 3), draw.number(1, 8)
    asks: Sequence[str]
    if style <= 1:
        keys = names(draw, count, phrase if draw.chance(0.8) else code_key)
        values = [value(draw, in_sentence=True) for _ in keys]
        blocks = [fill(draw.pick(SENTENCES), k, v) for k, v in zip(keys, values, strict=True)]
        asks = SENTENCE_ASKS
    elif style == 2:
        keys = names(draw, count, code_key)
        values = [value(draw, in_sentence=True) for _ in keys]  # "# K is V" stands among the templates
        template, asks = draw.pick(ASSIGNMENTS), ASSIGNMENT_ASKS
        blocks = [fill(template, k, v) for k, v in zip(keys, values, strict=True)]
    else:
        keys = names(draw, draw.number(2, 14), code_key)
        values = [value(draw, in_sentence=False) for _ in keys]
        row = draw.pick(rows)
        first, later, end = PAIRS[row]
        blocks = ["".join(fill(later if i else first, k, v)
                          for i, (k, v) in enumerate(zip(keys, values, strict=True))) + end]
        asks = (PAIR_ASKS[row],)
    chosen = draw.rng.permutation(len(keys))[: draw.number(1, min(5, len(keys)))].tolist()
    return blocks, [question(draw, draw.pick(asks), keys[i], values[i]) for i in chosen]


# --- passages ---------------------------------------------------------------------------------------------------------

def _filler_lines(draw: Draw, characters: int) -> list[str]:
    """Lines of words or of code-like text, about `characters` in all."""
    lines, total, is_code = [], 0, draw.chance(0.4)
    while total < characters:
        if is_code:
            names = (draw.identifier(), draw.identifier())
            line = "".join(draw.pick(names) if c == "@" else draw.digits(draw.number(1, 3)) if c == "%" else c
                           for c in draw.pick(CODE_LINES))
        else:
            words = []
            for _ in range(draw.number(3, 7)):
                words += [draw.pick(FUNCTION_WORDS), draw.pick(ADJECTIVES if draw.chance(0.3) else NOUNS)]
                if draw.chance(0.5):
                    words.append(draw.pick(VERBS))
            line = " ".join(words).capitalize() + "."
        lines.append(line)
        total += len(line) + 1
    return lines


def weave(draw: Draw, host: list[str], blocks: list[str], asks: list[str]) -> str:
    """Put statements between the host's lines and questions after them: some midway, the rest at the end."""
    cut = draw.number(len(host) // 2, len(host))
    slots = sorted(draw.rng.integers(0, max(cut // 2, 1), size=len(blocks)).tolist())
    if draw.chance(0.5):  # one place for all: the questions then lie at like distances
        slots = [slots[0]] * len(blocks)
    lines: list[str] = []
    for i in range(cut):
        lines += [b for b, slot in zip(blocks, slots, strict=True) if slot == i]
        lines.append(host[i])
    if cut == 0:
        lines += blocks
    midway = draw.number(0, len(asks) - 1) if len(asks) > 1 else 0
    return "\n".join([*lines, *asks[:midway], *host[cut:], *asks[midway:]]) + "\n"


def drawing(host: str, *key: int) -> Draw:
    """A `Draw` whose names are made of the host's own words."""
    draw = Draw(*key)
    draw.words = list(dict.fromkeys(re.findall(r"(?<![A-Za-z])[a-z]{3,10}(?![A-Za-z])", host))) or WORDS
    return draw


def plant(
    seed: int, index: int, host: str, *, quoted_pairs: bool = True, asked: list[Asked] | None = None
) -> str:
    """`host` with name–value facts between its lines and questions about them later and at its end.

    `quoted_pairs`: also as JSON. Facts planted in a user's text come without it (`data.planted`), as an evaluation asks
    for pairs in that form; the embedded model and the quickstart were measured with it. `asked` gets the questions.
    """
    draw = drawing(host, seed, index, 2)
    text = weave(draw, host.split("\n"), *_facts(draw, range(0 if quoted_pairs else 1, len(PAIRS))))
    if asked is not None:
        asked += draw.asked
    return text


def key_values(seed: int, index: int) -> str:
    """Facts, filler, questions: about 150 to 1500 characters."""
    draw = Draw(seed, index, 0)
    host = _filler_lines(draw, draw.number(120, 950))
    return weave(draw, host, *_facts(draw, range(len(PAIRS))))


def _items(draw: Draw, count: int) -> list[str]:
    kind = draw.number(0, 6)
    if kind == 0:
        return [draw.pseudo() for _ in range(count)]
    if kind == 1:
        return [draw.pick(NOUNS) for _ in range(count)]
    if kind == 2:
        return [draw.digits(draw.pick((1, 2, 3, 4, 6))) for _ in range(count)]
    if kind == 3:
        return [draw.identifier() for _ in range(max(count // 2, 3))]
    if kind == 4:
        return [draw.characters("0123456789abcdef", draw.number(2, 8)) for _ in range(count)]
    if kind == 5:
        return [draw.characters("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-+", draw.number(1, 6))
                for _ in range(count)]
    pools = (NOUNS, ADJECTIVES, VERBS, FUNCTION_WORDS)
    return [draw.pick(draw.pick(pools)) if draw.chance(0.6) else draw.digits(draw.number(1, 4)) for _ in range(count)]


def copies(seed: int, index: int) -> str:
    """One or two random sequences, a gap, and then all or part of them again: about 150 to 1500 characters."""
    draw = Draw(seed, index, 1)
    joint = draw.pick((" ", " ", ", ", "\n", "; ", " | "))
    parts = [_items(draw, draw.number(12, 45)) for _ in range(draw.number(1, 2))]
    out = [joint.join(part) for part in parts]
    repeats = draw.number(1, 3)
    while repeats > 0 or sum(map(len, out)) < 150:
        repeats -= 1
        if draw.chance(0.6):
            out += _filler_lines(draw, draw.number(20, 250))
        part = draw.pick(parts)
        start = 0 if draw.chance(0.5) else draw.number(0, len(part) // 2)
        stop = len(part) if draw.chance(0.6) else draw.number(start + 3, max(start + 3, len(part)))
        out.append(joint.join(part[start:stop]))
    return "\n".join(out)[:1500] + "\n"


GENERATORS: dict[str, Callable[[int, int], str]] = {"key_values": key_values, "copies": copies}
