"""Retrieval: facts hidden in real text at some depth, one of them asked for at its end, answered greedily.

A prompt is a function of (task, seed, window, index), of the part of the text that its fact stands in, and of the
documents alone: every model and scale is asked the same. Prompt and answer together have exactly `window` tokens,
counting the tokens that the answer may take. A prompt is made when it is asked and its tokens go with the answer: of
millions of tokens each, few are held.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from e2llm.evaluate.batched import Asked, groups, replies
from e2llm.evaluate.config import WHOLE_TEXT
from e2llm.evaluate.documents import Document
from e2llm.evaluate.fit import begin_of_text
from e2llm.evaluate.partial import Finished, Kept
from e2llm.evaluate.tasks import PASS_KEY, Task
from e2llm.evaluate.writable import REMEDY, as_written, check_keeps, encode
from e2llm.infer import Engine, RequestPlan

Progress = Callable[[int], None]

NUM_DEPTHS = 10
"""Depths are drawn one from each tenth of the filler in turn (of a part of it where one is asked for), and reported by
the middle of the filler's tenth."""
_SLOT = "\x00filler\x00"
_NAME = "\x00name\x00"


@dataclass(frozen=True)
class RetrievalPrompt:
    """One question."""

    seed: int
    window: int
    index: int
    document: str
    depth: float
    """Where the asked fact stands, as a share of the filler: 0 at its beginning, 1 at its end."""
    depth_bin: float
    """Middle of the filler's tenth that `depth` lies in."""
    expected: str
    token_ids: tuple[int, ...]
    answer_tokens: int
    """Tokens that the answer may take; len(token_ids) + answer_tokens = window."""
    spans: tuple[range, ...] = ()
    """Places of the values in `token_ids`, the asked one's first."""

    @property
    def prompt_tokens(self) -> int:
        return self.window - self.answer_tokens

    def without_tokens(self) -> RetrievalPrompt:
        """What is kept of a prompt that was asked."""
        return dataclasses.replace(self, token_ids=())


@dataclass(frozen=True)
class Retrieved:
    """One question and what came back."""

    prompt: RetrievalPrompt
    """Without its tokens."""
    scale: float
    answer: str
    correct: bool


def retrieval(
    engine: Engine,
    documents: Sequence[Document],
    *,
    window: int,
    scale: float,
    indices: Sequence[int],
    seed: int = 0,
    chat: bool = False,
    task: Task = PASS_KEY,
    depths: tuple[float, float] = WHOLE_TEXT,
    batch: int = 1,
    progress: Progress = lambda tokens: None,
    kept: Kept | None = None,
) -> list[Retrieved]:
    """Ask the questions of `window` tokens with these `indices` at `scale`, `batch` at once, facts between `depths`;
    `progress` is told tokens read. Answers that are `kept` already are taken from there, others put there at once.
    Raises ValueError as `prompt_maker` does."""
    make = prompt_maker(
        engine.tokenizer, documents, window=window, seed=seed, chat=chat, task=task, depths=depths
    )
    kept = kept or Kept(Finished(None), "", {})

    def judged(prompt: RetrievalPrompt, answer: str) -> Retrieved:
        return Retrieved(prompt.without_tokens(), scale, answer, task.is_correct(answer, prompt.expected))

    found: dict[int, Retrieved] = {}
    for index in indices:
        known = kept.get(index)
        if known is not None:
            found[index] = judged(make(index), known["answer"])
            progress(window)
    for group in groups([index for index in indices if index not in found], window=window, batch=batch):
        prompts = [make(index) for index in group]

        def heard(place: int, answer: str, group: Sequence[int] = group) -> None:
            kept.add(group[place], {"answer": answer})
            progress(window)

        written = answers(engine, prompts, scale=scale, batch=batch, heard=heard)
        found |= {
            index: judged(prompt, answer) for index, prompt, answer in zip(group, prompts, written, strict=True)
        }
    return [found[index] for index in indices]


def answers(
    engine: Engine,
    prompts: Sequence[RetrievalPrompt],
    *,
    scale: float,
    batch: int = 1,
    heard: Callable[[int, str], None] = lambda place, answer: None,
) -> list[str]:
    """What the model writes after each of `prompts` (of one window); `heard` is told each as soon as it is there."""
    asked = [Asked(prompt.token_ids, RequestPlan(scale, prompt.window, prompt.answer_tokens)) for prompt in prompts]
    found = []
    for place, reply in enumerate(replies(engine, asked, batch=batch)):
        found.append(reply.text)
        heard(place, reply.text)
    return found


def share_by_depth(results: Sequence[Retrieved]) -> dict[float, tuple[float, int]]:
    """Depth (middle of the tenth) -> share answered and prompts asked."""
    groups: dict[float, list[bool]] = defaultdict(list)
    for result in results:
        groups[result.prompt.depth_bin].append(result.correct)
    return {depth: (sum(found) / len(found), len(found)) for depth, found in sorted(groups.items())}


def make_prompts(
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    window: int,
    num_prompts: int,
    seed: int,
    chat: bool = False,
    task: Task = PASS_KEY,
) -> list[RetrievalPrompt]:
    """The first `num_prompts` prompts of one window, all at once. Raises ValueError as `prompt_maker` and
    `check_facts` do."""
    if num_prompts < 1:
        raise ValueError(f"num_prompts = {num_prompts}: use at least 1")
    make = prompt_maker(tokenizer, documents, window=window, seed=seed, chat=chat, task=task)
    check_facts(tokenizer, window=window, num_prompts=num_prompts, seed=seed, chat=chat, task=task)
    return [make(index) for index in range(num_prompts)]


def prompt_maker(
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    window: int,
    seed: int,
    chat: bool = False,
    task: Task = PASS_KEY,
    depths: tuple[float, float] = WHOLE_TEXT,
) -> Callable[[int], RetrievalPrompt]:
    """Index -> the prompt. Documents take turns; the part of one that is used, facts and depths are drawn. The asked
    fact stands between `depths`, shares of the filler; all else is the same wherever that is.

    Raises ValueError without a tokenizer or chat template; the function that it returns does when the window is too
    small for the question or no document fills it. `check_facts` says what the tokenizer cannot write.
    """
    if tokenizer is None:
        raise ValueError(f"tokenizer = None: {task.name} is asked in text")
    frame = _frame(tokenizer, chat, task)
    first = begin_of_text(tokenizer)
    opening = [] if first is None or chat else [first]
    shared: dict[str, Any] = {"window": window, "seed": seed, "opening": opening, "frame": frame, "task": task}
    shared["part"] = depths
    return functools.partial(_prompt, tokenizer, documents, **shared)


def check_facts(
    tokenizer: Any, *, window: int, num_prompts: int, seed: int, chat: bool = False, task: Task = PASS_KEY
) -> None:
    """ValueError where the tokenizer cannot write a question of this window, a fact, or an answer that is right.

    No filler is read and no prompt made: cheap enough to ask for all windows before anything is measured.
    """
    before, after = _frame(tokenizer, chat, task)
    for index in range(num_prompts):
        facts, _ = _drawn(task, seed, window, index)
        name, value = facts[0]
        try:
            for fact in facts:
                check_keeps(tokenizer, task.statement.format(name=fact[0], value=fact[1]), fact)
            check_keeps(tokenizer, before + after.replace(_NAME, name), [name])
            written = as_written(tokenizer, task.answer.format(value=value))
            if not task.is_correct(written, value):
                raise ValueError(f"the tokenizer writes the answer {value!r} as {written!r}, which does not count")
        except ValueError as error:
            raise ValueError(f"{task.name}, prompt {index} of window {window}: {error}; {REMEDY}") from error


def _drawn(task: Task, seed: int, window: int, index: int) -> tuple[list[tuple[str, str]], np.random.Generator]:
    """Facts of a prompt, the asked one first, and the generator that everything else about it is drawn from."""
    random = np.random.default_rng([seed, window, index])
    return [task.draw(random) for _ in range(task.num_facts)], random


def _prompt(
    tokenizer: Any,
    documents: Sequence[Document],
    index: int,
    *,
    window: int,
    seed: int,
    opening: list[int],
    frame: tuple[str, str],
    task: Task,
    part: tuple[float, float],
) -> RetrievalPrompt:
    facts, random = _drawn(task, seed, window, index)
    name, value = facts[0]  # the asked one; the others stand anywhere
    step = index % NUM_DEPTHS
    depth = part[0] + (part[1] - part[0]) * (step + random.random()) / NUM_DEPTHS
    statements = [encode(tokenizer, task.statement.format(name=n, value=v)) for n, v in facts]
    values = [_value_places(tokenizer, task, fact, len(ids)) for fact, ids in zip(facts, statements, strict=True)]
    before, after = [*opening, *encode(tokenizer, frame[0])], encode(tokenizer, frame[1].replace(_NAME, name))
    # Models may split the value otherwise than the tokenizer does, at worst into single characters: an answer that is
    # right must not be cut short.
    answer = task.answer.format(value=value)
    answer_tokens = max(len(encode(tokenizer, answer)) + 2, len(answer))
    filler = window - len(before) - sum(map(len, statements)) - len(after) - answer_tokens
    document = _long_enough(documents, filler, index, window, task)
    start = int(random.integers(0, len(document.tokens) - filler + 1))
    text = document.tokens[start : start + filler].tolist()
    depths = [depth, *(random.random() for _ in facts[1:])]
    hidden, places = _hide(text, statements, depths)
    token_ids = (*before, *hidden, *after)
    assert len(token_ids) + answer_tokens == window
    return RetrievalPrompt(
        seed=seed,
        window=window,
        index=index,
        document=document.name,
        depth=depth,
        depth_bin=(min(int(depth * NUM_DEPTHS), NUM_DEPTHS - 1) + 0.5) / NUM_DEPTHS,
        expected=value,
        token_ids=token_ids,
        answer_tokens=answer_tokens,
        spans=tuple(
            range(len(before) + place + value.start, len(before) + place + value.stop)
            for place, value in zip(places, values, strict=True)
        ),
    )


def _value_places(tokenizer: Any, task: Task, fact: tuple[str, str], count: int) -> range:
    """Which of the `count` tokens of a fact's statement hold its value; all where the tokenizer cannot say."""
    if not getattr(tokenizer, "is_fast", False):
        return range(count)
    text = task.statement.format(name=fact[0], value=fact[1])
    start = text.index(fact[1])
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    inside = [i for i, (low, high) in enumerate(offsets) if low < start + len(fact[1]) and high > start]
    return range(inside[0], inside[-1] + 1)


def _long_enough(documents: Sequence[Document], filler: int, index: int, window: int, task: Task) -> Document:
    if filler < 1:
        raise ValueError(
            f"window = {window}: a {task.name} prompt without filler already takes {window - filler} tokens; "
            f"use larger windows, or leave {task.name} out"
        )
    found = [document for document in documents if len(document.tokens) >= filler]
    if not found:
        longest = max((len(document.tokens) for document in documents), default=0)
        raise ValueError(f"window = {window}: needs a document of {filler} tokens as filler, the longest has {longest}")
    return found[index % len(found)]


def _hide(text: list[int], statements: list[list[int]], depths: list[float]) -> tuple[list[int], list[int]]:
    """`text` with each statement at its depth, and the place of each statement's first token in it."""
    found: list[int] = []
    places = [0] * len(statements)
    end = 0
    for place, statement in sorted((round(depth * len(text)), i) for i, depth in enumerate(depths)):
        found += text[end:place]
        places[statement] = len(found)
        found += statements[statement]
        end = place
    return found + text[end:], places


def _frame(tokenizer: Any, chat: bool, task: Task) -> tuple[str, str]:
    """Text before and after the filler, the chat template around it where asked for, a slot for the asked name."""
    question = task.question.replace("{name}", _NAME)
    answer_start = task.answer_start.replace("{name}", _NAME)
    if not chat:
        return task.introduction, question + answer_start
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("chat = True: this tokenizer has no chat template; use chat = False")
    message = {"role": "user", "content": task.introduction + _SLOT + question}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(_SLOT)
    return before, after + answer_start.strip()


def prompt_template(chat: bool, task: Task = PASS_KEY) -> str:
    """What is asked, as written into a Record: {text} is the document up to a fact and after it."""
    asked = task.introduction + "{text}" + (task.statement + "{text}") * task.num_facts + task.question
    return f"[chat template: {asked}]{task.answer_start.strip()}" if chat else asked + task.answer_start
