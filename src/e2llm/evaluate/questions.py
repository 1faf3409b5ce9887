"""Generated questions: what one is, how it is cut to a window, how it is asked and what is written down.

Flows in: a `Kind` (how a question of some size reads) and texts. Flows out: questions of the wanted length, answers
with scores, rows and examples. A question is a function of (kind, seed, window, index) and of the texts alone: every
model and scale is asked the same. Prompt and answer together never exceed the window.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from e2llm.evaluate.batched import Asked, replies
from e2llm.evaluate.documents import Document
from e2llm.evaluate.fit import Frame, largest_fit
from e2llm.evaluate.ruler.score import match_all, match_part
from e2llm.evaluate.ruler.words import words_of
from e2llm.evaluate.running import RunningWords
from e2llm.evaluate.writable import REMEDY, as_written, check_writes, encode
from e2llm.infer import Engine, RequestPlan

_TEXTS_HELD = 2
"""Documents whose text is held: some 12 bytes a token each. Another one is decoded when its turn comes."""
_WORDS_READ = 200_000
"""Words of a document that names are drawn from."""

SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {"all": match_all, "part": match_part}


@dataclass(frozen=True)
class Draft:
    """A question that can still be made longer or shorter; everything random in it is drawn already."""

    body: Callable[[int], str]
    """Size (words, sentences, pairs …) -> what is asked, context included."""
    answer_start: str
    """What the answer begins with."""
    expected: tuple[str, ...]
    most: int
    """Largest size that there is material for."""
    depths: tuple[float, ...] = ()
    """Where each expected string stands, as a share of the context; () where it has no one place."""
    source: str = ""
    """Document that the context is from."""
    least: int = 0
    """Smallest size that can be asked."""


Maker = Callable[["Texts", np.random.Generator, int, int], Draft]
"""(texts, generator, window, index) -> a question."""


@dataclass(frozen=True)
class Kind:
    """One kind of question."""

    name: str
    make: Maker
    answer_tokens: int
    """Tokens that the answer may take."""
    score: str = "all"
    """`all`: share of the expected strings found; `part`: any of them."""
    suite: str = ""
    """Label `protocol` of its rows: ruler, needle, …"""
    metric: str = "string_match"
    wording: str = ""
    """What is asked, as written into a Record."""


@dataclass(frozen=True)
class Question:
    """One prompt."""

    kind: str
    seed: int
    window: int
    index: int
    document: str
    expected: tuple[str, ...]
    depths: tuple[float, ...]
    token_ids: tuple[int, ...]
    answer_tokens: int
    size: int


@dataclass(frozen=True)
class Answered:
    """One question and what came back."""

    question: Question
    answer: str
    score: float
    found: tuple[bool, ...] = field(default=())
    """Which of the expected strings the answer holds."""


@dataclass(frozen=True)
class Texts:
    """A corpus as running text: contexts and words are taken from it."""

    documents: Sequence[Document]
    tokenizer: Any

    @cached_property
    def _read(self) -> Callable[[int], RunningWords]:
        return functools.lru_cache(_TEXTS_HELD)(
            lambda number: RunningWords(self.tokenizer.decode(self.documents[number].tokens.tolist()))
        )

    def running(self, index: int) -> RunningWords:
        """Words of the index-th document, each with the space after it; documents take turns."""
        return self._read(index % len(self.documents))

    @cached_property
    def words(self) -> list[str]:
        return words_of(self.running(number).beginning(_WORDS_READ) for number in range(len(self.documents)))

    def context(self, random: np.random.Generator, index: int) -> Callable[[int], list[str]]:
        """Size -> so many running words of the index-th document, from a place that is drawn once."""
        pieces = self.running(index)
        place = random.random()
        return lambda size: pieces[(start := int(place * max(0, len(pieces) - size))) : start + size]


def draw_question(kind: Kind, texts: Texts, *, window: int, index: int, seed: int) -> Draft:
    """A question whose length is still open. Raises ValueError where the tokenizer cannot write it or its answer."""
    # crc32 of the name: a hash that is the same in every run
    random = np.random.default_rng([seed, window, index, zlib.crc32(kind.name.encode())])
    draft = kind.make(texts, random, window, index)
    asked = draft.body(draft.least) + draft.answer_start
    try:
        check_writes(texts.tokenizer, asked, encode(texts.tokenizer, asked))
        written = {one: as_written(texts.tokenizer, f" {one}") for one in draft.expected}
        lost = [one for one, read in written.items() if not match_part(read, [one])]
        if lost and (kind.score == "all" or len(lost) == len(written)):
            raise ValueError(
                f"the tokenizer writes the answer {lost[0]!r} as {written[lost[0]]!r}, which does not count"
            )
    except ValueError as error:
        raise ValueError(f"{kind.name}, question {index} of window {window}: {error}; {REMEDY}") from error
    return draft


def make_question(kind: Kind, texts: Texts, frame: Frame, *, window: int, index: int, seed: int) -> Question:
    """Raises ValueError when the window is too small for the kind, the texts too short for the window, or the tokenizer
    cannot write the question or an answer that is right."""
    draft = draw_question(kind, texts, window=window, index=index, seed=seed)
    limit = window - kind.answer_tokens
    fitted = largest_fit(
        lambda size: frame.encode(draft.body(size), draft.answer_start),
        limit,
        least=draft.least,
        most=draft.most,
        what=f"{kind.name} at window {window}",
    )
    if draft.least < draft.most == fitted.size and limit - len(fitted.token_ids) > max(64, window // 50):
        raise ValueError(
            f"{kind.name} at window {window}: the text given ends after {len(fitted.token_ids)} of {limit} tokens; "
            "give longer documents or lower the window"
        )
    return Question(
        kind=kind.name,
        seed=seed,
        window=window,
        index=index,
        document=draft.source,
        expected=draft.expected,
        depths=draft.depths,
        token_ids=fitted.token_ids,
        answer_tokens=kind.answer_tokens,
        size=fitted.size,
    )


def ask(
    engine: Engine,
    kind: Kind,
    questions: Sequence[Question],
    scale: float,
    progress: Callable[[int], None] = lambda tokens: None,
    *,
    batch: int = 1,
    heard: Callable[[Answered], None] = lambda answered: None,
) -> list[Answered]:
    """Greedy answers to `questions` (of one window) at `scale`, scored; `progress` is told tokens read, `heard` each
    answer as soon as it is there. `batch`: asked at once, through the serving engine; 1 asks one after the other."""
    asked = [Asked(one.token_ids, RequestPlan(scale, one.window, one.answer_tokens)) for one in questions]
    found = []
    for question, reply in zip(questions, replies(engine, asked, batch=batch), strict=True):
        found.append(judge(kind, question, reply.text))
        heard(found[-1])
        progress(question.window)
    return found


def judge(kind: Kind, question: Question, answer: str) -> Answered:
    each = tuple(bool(match_part(answer, [one])) for one in question.expected)
    return Answered(question, answer, SCORES[kind.score](answer, question.expected), each)
