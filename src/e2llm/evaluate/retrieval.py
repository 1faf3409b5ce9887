"""Pass-key retrieval: five digits stated once at some depth of real text, asked for at its end, answered greedily.

The wording is that of Mohtashami & Jaggi 2023 (arXiv 2305.16300, Sect. 4.2): what is asked for is announced before the
text, as a model that only continues text cannot know otherwise that the statement matters. Deviations: real text as
filler in place of their repeated sentences, a blank line between the parts, "memorize it" for "memorize them".

A prompt is a function of (seed, window, index) and of the documents alone: every model and scale is asked the same.
Prompt and answer together have exactly `window` tokens, counting the tokens that the answer may take.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from e2llm.evaluate.documents import Document
from e2llm.infer import Engine, RequestPlan

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
STATEMENT = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key?"
ANSWER_START = " The pass key is"
NUM_DEPTHS = 10
"""Depths are drawn one from each tenth of the filler in turn, and reported by the middle of the tenth."""
_SLOT = "\x00filler\x00"


@dataclass(frozen=True)
class PassKeyPrompt:
    """One question."""

    seed: int
    window: int
    index: int
    document: str
    depth: float
    """Where the key stands, as a share of the filler: 0 at its beginning, 1 at its end."""
    depth_bin: float
    """Middle of the tenth that `depth` was drawn from."""
    expected: str
    token_ids: tuple[int, ...]
    answer_tokens: int
    """Tokens that the answer may take; len(token_ids) + answer_tokens = window."""


@dataclass(frozen=True)
class Retrieved:
    """One question and what came back."""

    prompt: PassKeyPrompt
    scale: float
    answer: str
    correct: bool


def retrieval(
    engine: Engine,
    documents: Sequence[Document],
    *,
    window: int,
    scale: float,
    num_prompts: int = 20,
    seed: int = 0,
    chat: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[Retrieved]:
    """Ask `num_prompts` pass-key questions of `window` tokens at `scale`; `progress` is told tokens read."""
    results = []
    for prompt in make_prompts(
        engine.tokenizer, documents, window=window, num_prompts=num_prompts, seed=seed, chat=chat
    ):
        plan = RequestPlan(scale, window, prompt.answer_tokens)
        answer = engine.complete(prompt.token_ids, plan).text
        results.append(Retrieved(prompt, scale, answer, is_correct(answer, prompt.expected)))
        progress(window)
    return results


def share_by_depth(results: Sequence[Retrieved]) -> dict[float, tuple[float, int]]:
    """Depth (middle of the tenth) -> share answered and prompts asked."""
    groups: dict[float, list[bool]] = defaultdict(list)
    for result in results:
        groups[result.prompt.depth_bin].append(result.correct)
    return {depth: (sum(found) / len(found), len(found)) for depth, found in sorted(groups.items())}


def is_correct(answer: str, expected: str) -> bool:
    """Whether the continuation begins with exactly the expected digits (spaces before them aside)."""
    return re.match(rf"\s*{expected}(?!\d)", answer) is not None


def make_prompts(
    tokenizer: Any, documents: Sequence[Document], *, window: int, num_prompts: int, seed: int, chat: bool = False
) -> list[PassKeyPrompt]:
    """The prompts of one window. Documents take turns; the part of one that is used, the key and the depth are drawn.

    Raises ValueError when the window is too small for the question or no document fills it.
    """
    if tokenizer is None:
        raise ValueError("tokenizer = None: pass keys are text")
    if num_prompts < 1:
        raise ValueError(f"num_prompts = {num_prompts}: use at least 1")
    before, after = _frame(tokenizer, chat)
    return [
        _prompt(tokenizer, documents, window=window, index=index, seed=seed, before=before, after=after)
        for index in range(num_prompts)
    ]


def _prompt(
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    window: int,
    index: int,
    seed: int,
    before: list[int],
    after: list[int],
) -> PassKeyPrompt:
    random = np.random.default_rng([seed, window, index])
    key = str(random.integers(10_000, 100_000))
    step = index % NUM_DEPTHS
    depth = (step + random.random()) / NUM_DEPTHS
    statement = _ids(tokenizer, STATEMENT.format(key=key))
    # Two tokens of slack: models may split the digits otherwise than the tokenizer does.
    answer_tokens = len(_ids(tokenizer, f" {key}")) + 2
    filler = window - len(before) - len(statement) - len(after) - answer_tokens
    if filler < 1:
        raise ValueError(f"window = {window}: a pass-key prompt without filler already takes {window - filler} tokens")
    long_enough = [document for document in documents if len(document.tokens) >= filler]
    if not long_enough:
        longest = max((len(document.tokens) for document in documents), default=0)
        raise ValueError(f"window = {window}: needs a document of {filler} tokens as filler, the longest has {longest}")
    document = long_enough[index % len(long_enough)]
    start = int(random.integers(0, len(document.tokens) - filler + 1))
    text = document.tokens[start : start + filler].tolist()
    place = round(depth * filler)
    token_ids = (*before, *text[:place], *statement, *text[place:], *after)
    assert len(token_ids) + answer_tokens == window
    return PassKeyPrompt(
        seed=seed,
        window=window,
        index=index,
        document=document.name,
        depth=depth,
        depth_bin=(step + 0.5) / NUM_DEPTHS,
        expected=key,
        token_ids=token_ids,
        answer_tokens=answer_tokens,
    )


def _frame(tokenizer: Any, chat: bool) -> tuple[list[int], list[int]]:
    """Tokens before and after the filler, with the begin-of-text token or the chat template around them."""
    if not chat:
        first = begin_of_text(tokenizer)
        opening = [] if first is None else [first]
        return opening + _ids(tokenizer, INTRODUCTION), _ids(tokenizer, QUESTION + ANSWER_START)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("chat = True: this tokenizer has no chat template; use chat = False")
    message = {"role": "user", "content": INTRODUCTION + _SLOT + QUESTION}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(_SLOT)
    return _ids(tokenizer, before), _ids(tokenizer, after + ANSWER_START.strip())


def prompt_template(chat: bool) -> str:
    """What is asked, as written into a Record: {text} is the document up to the key and after it."""
    asked = INTRODUCTION + "{text}" + STATEMENT + "{text}" + QUESTION
    return f"[chat template: {asked}]{ANSWER_START.strip()}" if chat else asked + ANSWER_START


def begin_of_text(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before a text by itself, None where it puts none."""
    first = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a").input_ids
    return first if first is not None and ids and ids[0] == first else None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
