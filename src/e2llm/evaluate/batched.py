"""Prompts become answers: one after the other, or many at once through the serving engine, in the prompts' order.

Flows in: the engine that evaluates, prompts with their plans (any lengths, any scales). Flows out: greedy answers, one
by one as they are needed. One at a time is the way that is known to be right; the batch is compared with it in tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from e2llm.engine import BatchEngine, Request
from e2llm.evaluate.perplexity import TOKENS_PER_FORWARD
from e2llm.infer import WHOLE_PROMPT_TOKENS, Engine, RequestPlan

PAGE = 16
"""Tokens of a page of keys and values."""
_BATCHES = 16
"""Batches whose prompts are held at once: between two such groups the batch runs empty."""
HELD_TOKENS = 1 << 21
"""Tokens of prompts held at once, where a single batch does not need more: some 40 bytes each."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Asked:
    """One prompt and what it is served with."""

    token_ids: Sequence[int]
    plan: RequestPlan


@dataclass(frozen=True)
class Reply:
    """What came back."""

    text: str
    new_tokens: int
    finish_reason: str


def groups(items: Sequence[Item], *, window: int, batch: int) -> Iterator[Sequence[Item]]:
    """`items` cut into those whose prompts (of at most `window` tokens) are made and held together: one where they are
    asked one by one, else whole batches within HELD_TOKENS, at least one batch."""
    size = 1 if batch == 1 else batch * max(1, min(_BATCHES, HELD_TOKENS // (batch * window)))
    for start in range(0, len(items), size):
        yield items[start : start + size]


def replies(
    engine: Engine, asked: Sequence[Asked], *, batch: int = 1, chunk_tokens: int | None = None
) -> Iterator[Reply]:
    """Answers to `asked` in their order, `batch` of them at a time; a step reads up to `chunk_tokens` of prompts (None:
    `step_tokens`).

    The model has its own attention again when the iterator ends or is closed. Raises ValueError, with a batch above 1,
    for a model that the serving engine refuses (`engine.BatchEngine`).
    """
    if batch > 1 and asked:
        chunk = step_tokens(engine.model.device.type, asked) if chunk_tokens is None else chunk_tokens
        yield from _together(engine, asked, batch, chunk)
        return
    for one in asked:
        completion = engine.complete(one.token_ids, one.plan)
        yield Reply(completion.text, len(completion.token_ids), completion.finish_reason)


def step_tokens(device: str, asked: Sequence[Asked]) -> int | None:
    """Prompt tokens of a step; None where the serving engine's own number holds.

    No one waits for a first token here: steps of few tokens would spend their time on launching kernels. On a GPU
    prompts that are longer than a usual step are read whole or in halves, for pieces behind a cache take another
    kernel: 20 % more tokens a second at 64k and 11 % at 128k than in pieces of 32k (SmolLM2-135M on an H200). A step
    then holds what it takes to read a window of as many tokens in one pass, as perplexity does, and no more for longer
    prompts.
    """
    usual = TOKENS_PER_FORWARD.get(device)
    if device == "cuda" and usual and max(len(one.token_ids) for one in asked) > usual:
        return WHOLE_PROMPT_TOKENS[device]
    return usual


def check_batches(engine: Engine) -> None:
    """Raise ValueError for a model that the serving engine refuses; before anything is measured."""
    with BatchEngine(engine.model, engine.tokenizer, max_running=1, kv_tokens=PAGE, page_tokens=PAGE):
        pass


def _together(engine: Engine, asked: Sequence[Asked], batch: int, chunk_tokens: int | None) -> Iterator[Reply]:
    # Memory for the longest that can run together, whatever their order.
    needed = sorted((-(-_tokens(one) // PAGE) * PAGE + PAGE for one in asked), reverse=True)
    with BatchEngine(
        engine.model,
        engine.tokenizer,
        max_scale=max(engine.max_scale, *(one.plan.scale for one in asked)),
        max_running=batch,
        chunk_tokens=chunk_tokens,
        kv_tokens=sum(needed[:batch]),
        page_tokens=PAGE,
        prefix_cache=False,
        one_graph=True,
    ) as serving:
        streams = [
            serving.submit(
                Request(
                    prompt_ids=tuple(one.token_ids),
                    max_new_tokens=one.plan.max_new_tokens,
                    scale=float(one.plan.scale),
                    beyond_trained=True,
                )
            )
            for one in asked
        ]
        for one, stream in zip(asked, streams, strict=True):
            outputs = list(stream)
            reason = outputs[-1].finish_reason
            if reason == "error":
                raise RuntimeError(f"prompt of {len(one.token_ids)} tokens, {batch} at once: {outputs[-1].error}")
            tokens = [token for output in outputs for token in output.token_ids]
            text = "" if engine.tokenizer is None else engine.tokenizer.decode(tokens, skip_special_tokens=True)
            yield Reply(text, len(tokens), str(reason))


def _tokens(one: Asked) -> int:
    return len(one.token_ids) + one.plan.max_new_tokens
