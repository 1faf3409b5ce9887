"""Facts of random codes: names that look alike, values that must be copied letter by letter.

Flows in: (seed, index), a host text. Flows out: the host with such facts between its lines and questions about them
later, as `synthetic.plant` makes them of words and short numbers. What is to be learned is what an evaluation with
UUIDs asks, and none of it is shown: no UUID, no quoted name with a quoted value, none of the wording
(tests/data/test_synthetic.py).

A module and a function of its own, beside `plant`: what `plant` and `key_values` draw for a seed is what the embedded
model and the quickstart's measured results were trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from e2llm.data.synthetic import Asked, Draw, code_key, drawing, fill, names, phrase, question, value, weave
from e2llm.data.synthetic_wordings import ask, statement

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_HEX = _DIGITS + "abcdef"
ALPHABETS = (
    _HEX, _HEX, _HEX, _HEX.upper(), _DIGITS + _LETTERS, (_DIGITS + _LETTERS).upper(),
    _DIGITS + _LETTERS + _LETTERS.upper(), _LETTERS + "234567", _LETTERS, _DIGITS,
)  # fmt: skip
SEPARATORS = ("-", "-", "-", ":", ".", "_", " ", "/", "", "", "")
QUOTES = (("", ""), ("", ""), ("", ""), ("'", "'"), ("`", "`"), ("<", ">"), ("[", "]"), ("(", ")"))
LONG, SHORT = (12, 40), (4, 14)
"""Characters of a code, its separators among them, at least and at most. A set has long codes or short ones."""
SHORT_SETS = 2 / 3
"""Share of the sets that have short codes. What is hard is to choose a value, not to copy it, and a choice costs fewer
tokens where codes are short (docs/decisions.md, 2026-11-30); long ones keep long answers in practice."""
FEWEST, MOST = 3, 8
"""Facts of a set of long codes, where the host is long enough; one of short codes has twice as many, which take as many
tokens."""
_UUID = re.compile(r"\w{8}(\W|_)\w{4}(\W|_)\w{4}(\W|_)\w{4}(\W|_)\w{12}|^[0-9a-fA-F]{32}$")
_FIVE_DIGITS = re.compile(r"(?<!\w)\d{5}(?!\w)")  # a pass key

def is_allowed(code: str) -> bool:
    """Whether `code` is none of an evaluation's values: no UUID in any alphabet or with any separator, no five digits
    standing alone."""
    return not _UUID.search(code) and not _FIVE_DIGITS.search(code)


@dataclass(frozen=True)
class Form:
    """What the codes of one set look like."""

    alphabet: str
    groups: tuple[int, ...]
    """Characters of each group."""
    separator: str

    def code(self, draw: Draw) -> str:
        """One of this form."""
        while True:
            found = self.separator.join(draw.characters(self.alphabet, size) for size in self.groups)
            if is_allowed(found):
                return found


def form(draw: Draw, lengths: tuple[int, int]) -> Form:
    """A form of `lengths` characters: at least, at most."""
    while True:
        alphabet, separator = draw.pick(ALPHABETS), draw.pick(SEPARATORS)
        length = draw.number(*lengths)
        groups = [length]
        if separator:
            even = draw.number(2, 8)  # half of them have groups of one size, as serial numbers do
            is_even = draw.chance(0.5)
            groups = []
            while sum(groups) + len(groups) < length:
                groups.append(even if is_even else draw.number(2, 12))
        # Five digits would stand alone in every code of such a form.
        groups = [6 if size == 5 and alphabet == _DIGITS else size for size in groups]
        found = Form(alphabet, tuple(groups), separator)
        example = separator.join("a" * size for size in groups)
        if lengths[0] <= len(example) <= lengths[1] and is_allowed(example):
            return found


def alike(draw: Draw, count: int, lengths: tuple[int, int]) -> list[str]:
    """`count` different codes of one form; often they begin or end alike, so that the whole name must be matched."""
    shape, kind = form(draw, lengths), draw.number(0, 5)
    first = shape.code(draw)
    shared = draw.number(1, max(1, len(first) - 6))
    found: dict[str, None] = {}
    while len(found) < count:
        one = shape.code(draw)
        if kind == 0:
            one = first[:shared] + one[shared:]
        elif kind == 1:
            one = one[: len(first) - shared] + first[len(first) - shared :]
        if is_allowed(one):
            found.setdefault(one)
    return list(found)


def _values(draw: Draw, count: int, lengths: tuple[int, int]) -> list[str]:
    shape = form(draw, lengths)
    doubled = draw.chance(0.1)  # now and then an answer is longer still
    return [" ".join(shape.code(draw) for _ in range(2 if doubled else 1)) for _ in range(count)]


def pairs(draw: Draw, most: int) -> list[tuple[str, str]]:
    """Names and values of one set, FEWEST to `most` of them (`most` where that is less), of short ones twice that."""
    lengths = SHORT if draw.chance(SHORT_SETS) else LONG
    count, kind = draw.number(min(FEWEST, most), most), draw.number(0, 19)
    if lengths == SHORT:
        count *= 2
    if kind == 0:  # a code is to be copied, the name is easy
        make: Callable[[Draw], str] = phrase if draw.chance(0.5) else code_key
        keys = names(draw, count, make)
        stored = _values(draw, len(keys), lengths)
    elif kind == 1:  # a code is to be found, the answer is easy
        keys = alike(draw, count, lengths)
        stored = [value(draw, in_sentence=True) for _ in keys]
    elif kind <= 3:
        keys, stored = alike(draw, count, lengths), _values(draw, count, lengths)
    else:  # both of one form: where forms differ, "a code that does not look like the name" is answer enough
        keys = alike(draw, 2 * count, lengths)
        keys, stored = keys[:count], keys[count:]
    return list(zip(keys, stored, strict=True))


def statements(draw: Draw, facts: list[tuple[str, str]]) -> list[str]:
    """Blocks of lines that state `facts`, all in one wording."""
    blocks = _written(draw, statement(draw), facts)
    if draw.chance(0.3):
        blocks = ["\n" + block + "\n" for block in blocks]
    if draw.chance(0.3):
        blocks = ["\n".join(blocks)]
    return blocks


def asks(draw: Draw, facts: list[tuple[str, str]]) -> list[str]:
    """A question about every one of `facts`, about some a second one, each in a wording of its own.

    Each is one more choice among the names and values of the set, which is what is to be learned.
    """
    order = draw.rng.permutation(len(facts)).tolist()
    order += draw.rng.permutation(len(facts)).tolist()[: draw.number(0, len(facts) // 2)]
    found = []
    for i in order:
        template, ((a, b), quotes) = ask(draw), _quotes(draw)
        found.append(question(draw, template, a + facts[i][0] + b, facts[i][1], quotes))
    return found


def _written(draw: Draw, template: str, facts: list[tuple[str, str]]) -> list[str]:
    """`facts` in one wording, names and values in quotes of one kind each."""
    (a, b), (c, d) = _quotes(draw)
    return [fill(template, a + name + b, c + stored + d) for name, stored in facts]


def _quotes(draw: Draw) -> tuple[tuple[str, str], tuple[str, str]]:
    """Around a name and around its value."""
    (a, b), (c, d) = draw.pick(QUOTES), draw.pick(QUOTES)
    if draw.chance(0.7):  # mostly one kind for both: else quotes would tell names from values
        c, d = a, b
    if draw.chance(0.15):  # double ones around one of the two: around both they would be the evaluation's
        (a, b), (c, d) = (('"', '"'), ("", "")) if draw.chance(0.5) else (("", ""), ('"', '"'))
    return (a, b), (c, d)


def plant_codes(seed: int, index: int, host: str, *, asked: list[Asked] | None = None) -> str:
    """`host` with facts of codes between its lines and questions about them later. `asked` gets the questions.

    The questions of half of the sets stand together, midway and at the end, those of the others one by one: an
    evaluation's stands alone.
    """
    draw, lines = drawing(host, seed, index, 3), host.split("\n")
    # A fact, or two with short codes, takes some 220 characters with its questions, of more tokens than as much text: a
    # short host holds few.
    facts = pairs(draw, min(MOST, max(2, len(host) // 1000)))
    stated, questions = statements(draw, facts), asks(draw, facts)
    if asked is not None:
        asked += draw.asked
    if draw.chance(0.5):
        return weave(draw, lines, stated, questions)
    cut = draw.number(len(lines) // 4, len(lines) // 2)
    before = weave(draw, lines[:cut], stated, []).removesuffix("\n")
    return "\n".join([before, *_scattered(draw, lines[cut:], questions)]) + "\n"


def _scattered(draw: Draw, lines: list[str], asked: list[str]) -> list[str]:
    """`lines` with questions between them, one at a place, and one at the end."""
    places = sorted(draw.rng.integers(0, len(lines), size=len(asked) - 1).tolist())
    found, blank = [], "\n" * draw.number(0, 1)
    for i, line in enumerate(lines):
        found += [f"{blank}{one}{blank}" for one, place in zip(asked, places, strict=False) if place == i]
        found.append(line)
    return [*found, f"{blank}{asked[-1]}"]
