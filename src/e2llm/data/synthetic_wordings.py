"""Ways to state a fact of codes and to ask for it: fixed ones, and ones made up of any words.

Flows in: random draws. Flows out: templates in which K stands for the name and V for the value (`synthetic.fill`).

A model that sees a few dozen wordings thousands of times learns these, and answers a question in another one with any
code (docs/decisions.md, 2026-11-29). Of wordings whose labels, marks and order are made up anew each time it can learn
only what they have in common: a question names what was stated, and what was stated with it follows. None is an
evaluation's wording (tests/data/test_synthetic.py).
"""

from __future__ import annotations

from e2llm.data.synthetic import Draw
from e2llm.data.synthetic_words import NOUNS, VERBS

STATEMENTS = (
    "K = V", "K -> V", "K => V", "K: V", "K | V", "K; V", "K\tV", "K (V)", "set K V", "assign(K, V)", "K\n    V",
    "K maps to V.", "K stands for V.", "K goes with V.", "The entry for K is V.", "The code of K is V.",
    "V was given to K.", "V is filed under K.", "Under K they wrote V.", "Take V for K.", "K was exchanged for V.",
    "id K, token V", "item K\ncontent V",
)  # fmt: skip
ASKS = (
    "K = V", "K -> V", "K: V", "K | V", "K\n    V", "K?\nV", "get(K) == V", "find K\nfound: V", "query: K\nresult: V",
    "Input: K\nOutput: V", "request K\nresponse V", "Q: K?\nA: V", "What does K map to? V", "What goes with K? V",
    "Look up K.\nV", "Look up K: V", "Which code belongs to K? It is V.", "As said, K goes with V.",
    "The entry for K, again: V", "Asked for K, they gave V.", "Name: K\nIts match: V", "Recall what K has: V",
    "Of all these, K stands for V.", "Wanted: K\nFound above: V", "The one for K was V.",
)  # fmt: skip
MADE_UP = 0.6
"""Share of wordings that are made up."""
TWO_LINES = tuple(ask for ask in ASKS if "\n" in ask and ask not in STATEMENTS)
"""Drawn for half of the fixed questions and a share of the rest. No statement looks like these: going on as the same
line went on before does not answer them."""

_EVALUATIONS = frozenset({"key", "keys", "pass", "value", "values", "corresponding", "specified", "extract"})
_BETWEEN = (
    " = ", ": ", " -> ", ", ", " | ", "; ", " / ", "\t", " ~ ", " :: ", " >> ", " := ", " - ", "  ", ",", "=", ":",
    " == ", " => ", "\n", "\n  ",
)  # fmt: skip
_AROUND = (
    ("", ""), ("", ""), ("", ""), ("", ","), ("", ";"), ("", "."), ("- ", ""), ("* ", ""), ("# ", ""), ("> ", ""),
    ("// ", ""), ("(", ")"), ("[", "],"), ("{", "}"), ("<", ">"), ("| ", " |"),
)  # fmt: skip
_AFTER_LABEL = (": ", ": ", ": ", " = ", " - ", " ", "=", " > ", "\t")
_BEFORE_VALUE = (": ", ": ", ":\n", " = ", " -> ", " ", "\t", " - ")


def _word(draw: Draw) -> str:
    found = draw.pick(draw.words if draw.chance(0.5) else NOUNS)
    return "note" if found in _EVALUATIONS else str(found)


def label(draw: Draw) -> str:
    """One to three words, as they stand in front of something: "Road", "spare wheel", "Grain record"."""
    words = [_word(draw) for _ in range(draw.pick((1, 1, 2, 2, 3)))]
    style = draw.number(0, 3)
    if style == 0:
        return " ".join(words)
    if style == 1:
        return ("_" if draw.chance(0.5) else " ").join(words)
    # Capital K and V standing alone are places in a template; words have three letters or more.
    return " ".join([words[0].capitalize(), *(word.capitalize() if style == 2 else word for word in words[1:])])


def statement(draw: Draw) -> str:
    """How one set of facts is stated."""
    if not draw.chance(MADE_UP):
        return draw.pick(STATEMENTS)
    kind = draw.number(0, 5)
    if kind <= 2:
        (before, after), between = draw.pick(_AROUND), draw.pick(_BETWEEN)
        first, second = ("V", "K") if draw.chance(0.15) else ("K", "V")
        return f"{before}{first}{between}{second}{after}"
    if kind == 3:
        mark, between = draw.pick(_AFTER_LABEL), draw.pick((", ", "; ", "\n", " | ", " "))
        return f"{label(draw)}{mark}K{between}{label(draw)}{mark}V"
    if kind == 4:
        return f"{label(draw).capitalize()} K {draw.pick(VERBS)} V."
    return draw.pick((f"The {label(draw)} of K is V.", f"K has {label(draw)} V.", f"V is the {label(draw)} of K."))


def ask(draw: Draw) -> str:
    """How one fact is asked for; the name comes first."""
    if not draw.chance(MADE_UP):
        return draw.pick(TWO_LINES if draw.chance(0.5) else ASKS)
    kind, end = draw.number(0, 7), draw.pick(("", "", "", ".", "?", ";", ","))
    named = f"{label(draw)}{draw.pick(_AFTER_LABEL)}K{end}"
    if kind <= 3:
        return f"{named}\n{label(draw)}{draw.pick(_BEFORE_VALUE)}V"
    if kind == 4:
        return f"{named}\nV"
    if kind == 5:
        return f"{named}{draw.pick((' ', '; ', ' | ', ' -> '))}{label(draw)}{draw.pick(_BEFORE_VALUE)}V"
    if kind == 6:
        return f"{label(draw).capitalize()} {draw.pick(VERBS)} K{draw.pick((': ', '? ', ', ', ' -> '))}V"
    return f"{named}\n{label(draw)}, {label(draw)}\n{label(draw)}{draw.pick(_BEFORE_VALUE)}V"
