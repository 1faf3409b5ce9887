"""Rows and examples of where the answer looks (`attention.py`), over several prompts of one window and scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from e2llm.evaluate.attention import RETRIEVAL_HEAD, STRETCHES, Looked, look
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.context import Context, Part, Results
from e2llm.evaluate.documents import Document
from e2llm.evaluate.retrieval import RetrievalPrompt, check_facts, prompt_maker
from e2llm.evaluate.tasks import UUID_KV
from e2llm.infer import Engine
from e2llm.intervals import Interval, interval_fields, interval_of_mean, interval_of_statistic
from e2llm.records import make_row


def measure(context: Context, part: Part, progress: Callable[[int], None]) -> Results:
    """Rows: shares of attention on the asked value, on the other two, and what an even spread would give; the number
    of retrieval heads. The last example holds the maps: layers × heads, layers × stretches of one prompt."""
    config, engine = context.config, context.engine
    documents = context.corpora[part.corpus]
    asked: dict[str, Any] = {"seed": config.seed, "chat": config.chat, "task": UUID_KV}
    make = prompt_maker(engine.tokenizer, documents, window=part.window, **asked)

    kept = context.kept(part)

    def watch_one(index: int) -> Looked:
        looked = look(engine, make(index), scale=part.scale)
        progress(part.window)
        return looked

    def watch(own: list[int]) -> list[Looked]:
        return kept.each(own, watch_one, name=lambda index: index, dump=_dump, load=lambda result: _load(make, result))

    found = context.ranks.share(range(config.prompts), watch)
    labels = context.labels | {"corpus": part.corpus, "protocol": part.protocol, "window": part.window}
    labels |= {"scale": part.scale, "seed": config.seed}
    heads = np.stack([one.head_score for one in found])
    rows = [
        make_row(metric, value, unit, len(found), **labels, **interval_fields(spread))
        for metric, value, unit, spread in _numbers(found, heads)
    ]
    examples = [_example(engine, part, one) for one in found]
    return {"rows": rows, "examples": [*examples, _maps(part, found, heads.mean(axis=0))]}


_ARRAYS = {"on_span": np.float32, "on_others": np.float32, "by_stretch": np.float32, "head_score": np.float64}
"""Types as `look` gives them: means are the same to the last bit whether an answer was kept or not."""


def _dump(one: Looked) -> dict[str, Any]:
    """As JSON; the prompt by its index, from which it is made again."""
    arrays = {name: getattr(one, name).tolist() for name in _ARRAYS}
    return {"index": one.prompt.index, "token_ids": list(one.token_ids), **arrays}


def _load(make: Callable[[int], RetrievalPrompt], kept: dict[str, Any]) -> Looked:
    arrays = {name: np.asarray(kept[name], dtype=kind) for name, kind in _ARRAYS.items()}
    return Looked(make(kept["index"]).without_tokens(), tuple(kept["token_ids"]), **arrays)


def _numbers(found: Sequence[Looked], heads: np.ndarray) -> Iterator[tuple[str, float, str, Interval | None]]:
    """(metric, value, unit, interval over prompts); `heads`: (n, Y, H) share of the value that each head copied."""
    on_span = np.stack([one.on_span for one in found])
    best = on_span.reshape(len(found), -1)
    shares = {
        "attention_on_span": on_span.mean(axis=(1, 2)),
        "attention_on_others": np.array([one.on_others.mean() / 2 for one in found]),
        "attention_if_even": np.array([len(one.prompt.spans[0]) / one.prompt.prompt_tokens for one in found]),
        # The interval is that of the one head which is best over all prompts.
        "attention_of_best_head": best[:, best.mean(axis=0).argmax()],
    }
    for metric, each in shares.items():
        yield metric, float(each.mean()), "share", interval_of_mean(each.tolist())

    def count(rows: np.ndarray) -> int:
        return int((heads[rows].mean(axis=0) >= RETRIEVAL_HEAD).sum())

    yield "retrieval_heads", count(np.arange(len(found))), "heads", interval_of_statistic(len(found), count)


def _example(engine: Engine, part: Part, one: Looked) -> dict[str, Any]:
    prompt = one.prompt
    answer = engine.tokenizer.decode(list(one.token_ids), skip_special_tokens=True)
    return {
        "metric": "attention_on_span",
        "corpus": part.corpus,
        "window": part.window,
        "scale": part.scale,
        "document": prompt.document,
        "seed": prompt.seed,
        "index": prompt.index,
        "depth": round(prompt.depth, 6),
        "span": [prompt.spans[0].start, prompt.spans[0].stop],
        "prompt_tokens": prompt.prompt_tokens,
        "on_span": round(float(one.on_span.mean()), 6),
        "expected": prompt.expected,
        "answer": answer,
        "correct": UUID_KV.is_correct(answer, prompt.expected),
    }


def _maps(part: Part, found: Sequence[Looked], heads: np.ndarray) -> dict[str, Any]:
    """Means over prompts by layer and head; and the map over one prompt, whose value stands nearest its middle."""
    shown = min(found, key=lambda one: abs(one.prompt.depth - 0.5))
    tokens = shown.prompt.prompt_tokens
    return {
        "metric": "attention_map",
        "corpus": part.corpus,
        "window": part.window,
        "scale": part.scale,
        "prompts": len(found),
        "on_span": _rounded(np.mean([one.on_span for one in found], axis=0)),
        "head_score": _rounded(heads),
        "index": shown.prompt.index,
        "by_stretch": _rounded(shown.by_stretch),
        "spans": [[round(s.start / tokens, 5), round(s.stop / tokens, 5)] for s in shown.prompt.spans],
        "stretches": STRETCHES,
    }


def _rounded(values: np.ndarray) -> list[list[float]]:
    return [[round(float(value), 6) for value in row] for row in values]


def check(engine: Engine, documents: Sequence[Document], config: EvaluateConfig) -> None:
    asked: dict[str, Any] = {"seed": config.seed, "chat": config.chat, "task": UUID_KV}
    prompt_maker(engine.tokenizer, documents, window=min(config.windows), **asked)(0)
    for window in config.windows:
        check_facts(engine.tokenizer, window=window, num_prompts=config.prompts, **asked)
