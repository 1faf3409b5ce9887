"""Rows and examples of one kind of question at one window and scale."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from e2llm.evaluate.batched import groups
from e2llm.evaluate.context import Context, Part, Results
from e2llm.evaluate.fit import make_frame
from e2llm.evaluate.needle import depth_bin
from e2llm.evaluate.questions import Answered, Kind, Texts, ask, make_question
from e2llm.intervals import interval_fields, interval_of_mean
from e2llm.records import make_row


def measure(kind: Kind, context: Context, part: Part, progress: Callable[[int], None]) -> Results:
    """Ask `config.prompts` questions. Rows: the mean score, and by depth where each expected string has a place."""
    config, engine = context.config, context.engine
    frame = make_frame(engine.tokenizer, config.chat)
    texts = context.memory.get(("texts", part.corpus))
    if texts is None:
        texts = context.memory["texts", part.corpus] = Texts(context.corpora[part.corpus], engine.tokenizer)

    kept = context.kept(part)

    def keep(one: Answered) -> None:
        kept.add(one.question.index, dataclasses.asdict(_result(kind, part, one)))

    def answer(own: list[int]) -> list[_Result]:
        results: dict[int, _Result] = {}
        for index in own:
            known = kept.get(index)
            if known is not None:
                results[index] = _Result(known["score"], tuple(map(tuple, known["found"])), known["example"])
                progress(part.window)
        missing = [index for index in own if index not in results]
        for group in groups(missing, window=part.window, batch=config.batch_size):
            asked = {"window": part.window, "seed": config.seed}
            questions = [make_question(kind, texts, frame, index=index, **asked) for index in group]
            found = ask(engine, kind, questions, part.scale, progress, batch=config.batch_size, heard=keep)
            results |= {one.question.index: _result(kind, part, one) for one in found}
        return [results[index] for index in own]

    answered = context.ranks.share(range(config.prompts), answer)
    labels = context.labels | {"corpus": part.corpus, "window": part.window, "scale": part.scale}
    labels |= {"task": kind.name, "seed": config.seed}
    if kind.suite == "ruler":
        labels |= {"protocol": "ruler"}
    mean = sum(one.score for one in answered) / len(answered)
    spread = interval_fields(interval_of_mean([one.score for one in answered]))
    rows = [make_row(kind.metric, mean, "share", len(answered), **labels, **spread)]
    if kind.metric == "retrieval":
        for depth, found in sorted(_by_depth(answered).items()):
            spread = interval_fields(interval_of_mean(found))
            rows.append(
                make_row(kind.metric, sum(found) / len(found), "share", len(found), **labels, depth=depth, **spread)
            )
    return {"rows": rows, "examples": [one.example for one in answered]}


@dataclass(frozen=True)
class _Result:
    """What is kept of one question; its tokens are many and are not."""

    score: float
    found: tuple[tuple[float, bool], ...]
    """(depth as reported, whether the answer holds what stands there)."""
    example: dict[str, Any]


def _result(kind: Kind, part: Part, one: Answered) -> _Result:
    return _Result(one.score, _found_by_depth(kind, one), _example(kind, part, one))


def _found_by_depth(kind: Kind, one: Answered) -> tuple[tuple[float, bool], ...]:
    if kind.metric != "retrieval":  # RULER has no rows by depth
        return ()
    places = (
        depth_bin(kind.name, depth) if kind.suite == "needle" else (min(int(depth * 10), 9) + 0.5) / 10
        for depth in one.question.depths
    )
    return tuple((round(place, 3), found) for place, found in zip(places, one.found, strict=True))


def _by_depth(answered: Sequence[_Result]) -> dict[float, list[bool]]:
    groups: dict[float, list[bool]] = defaultdict(list)
    for one in answered:
        for place, found in one.found:
            groups[place].append(found)
    return groups


def _example(kind: Kind, part: Part, one: Answered) -> dict[str, Any]:
    question = {name: value for name, value in vars(one.question).items() if name not in ("token_ids", "kind")}
    return {
        "metric": kind.metric,
        "task": kind.name,
        "corpus": part.corpus,
        "scale": part.scale,
        **question,
        "depths": [round(depth, 6) for depth in one.question.depths],
        "prompt_tokens": len(one.question.token_ids),
        "answer": one.answer,
        "score": one.score,
    }
