"""What `whole`, `sliding`, `pass_key` and `uuid_kv` are joined by: one row a protocol, with all that running it needs.

Flows in: a protocol's name. Flows out: how it is measured, what it costs, what its result depends on, what must hold
before the first forward pass. A new protocol is a row of `FURTHER` (or a `Kind` of question) and a name in
`config.PROTOCOLS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from e2llm.evaluate import attention_rows, loss_rows, question_rows
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.context import Context, Part, Results
from e2llm.evaluate.documents import Document
from e2llm.evaluate.fit import make_frame
from e2llm.evaluate.key_values import kv_kind
from e2llm.evaluate.needle import NEEDLE_MAPS
from e2llm.evaluate.questions import Kind, Texts, draw_question, make_question
from e2llm.evaluate.ruler.tasks import ruler_kinds
from e2llm.infer import Engine

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Further:
    """One protocol."""

    measure: Callable[[Context, Part, Progress], Results]
    tokens: Callable[[EvaluateConfig, int, int], int]
    """(config, documents, window) -> tokens read."""
    settings: Callable[[EvaluateConfig], Any]
    """What, besides weights, text, window and scale, its result depends on."""
    check: Callable[[Engine, Sequence[Document], EvaluateConfig], None]
    """Raises ValueError for what cannot be measured, before anything is."""


def further(config: EvaluateConfig) -> dict[str, Further]:
    """Name -> protocol. Reads the files that questions come from; raises ValueError for malformed ones."""
    found = dict(_LOSSES)
    kinds = question_kinds(tuple(sorted(config.qa.items())), tuple(config.kv_files))
    missing = [name for name in config.protocols if name in ("qa_1", "qa_2") and name not in kinds]
    if missing:
        raise ValueError(f"protocols = {missing}: questions over documents need a file; give qa = {missing[0]}=FILE")
    for name, kind in kinds.items():
        found[name] = Further(
            measure=functools.partial(question_rows.measure, kind),
            tokens=lambda config, documents, window: config.prompts * window,
            settings=functools.partial(_question_settings, kind),
            check=functools.partial(_check_questions, kind),
        )
    return found


@functools.lru_cache(maxsize=4)
def question_kinds(qa: tuple[tuple[str, str], ...], kv_files: tuple[str, ...]) -> dict[str, Kind]:
    """Name -> kind of question, of those that there is material for."""
    return {**NEEDLE_MAPS, "kv_pairs": kv_kind(kv_files), **ruler_kinds(dict(qa))}


def wordings(config: EvaluateConfig) -> dict[str, str]:
    """What each kind of question asks, as written into a Record."""
    kinds = question_kinds(tuple(sorted(config.qa.items())), tuple(config.kv_files))
    return {name: kinds[name].wording for name in config.protocols if name in kinds}


def _question_settings(kind: Kind, config: EvaluateConfig) -> Any:
    files = [config.qa.get(kind.name, "")] if kind.suite == "ruler" else list(config.kv_files)
    return kind.wording, kind.answer_tokens, config.prompts, config.seed, config.chat, config.batch_size > 1, files


def _check_questions(kind: Kind, engine: Engine, documents: Sequence[Document], config: EvaluateConfig) -> None:
    frame, texts = make_frame(engine.tokenizer, config.chat), Texts(documents, engine.tokenizer)
    for window in {min(config.windows), max(config.windows) if kind.score == "part" else min(config.windows)}:
        make_question(kind, texts, frame, window=window, index=0, seed=config.seed)
    for index in range(1, config.prompts):  # questions of files differ in what they are written with
        draw_question(kind, texts, window=min(config.windows), index=index, seed=config.seed)


def _read_once(config: EvaluateConfig, documents: int, window: int) -> int:
    return documents * max(config.windows)


_LOSSES = {
    "position": Further(
        measure=loss_rows.measure_position,
        tokens=_read_once,
        settings=lambda config: (),
        check=lambda engine, documents, config: None,
    ),
    "difference": Further(
        measure=loss_rows.measure_difference,
        tokens=loss_rows.difference_tokens,
        settings=lambda config: (config.stride, config.max_strides),
        check=loss_rows.check_stride,
    ),
    "key_tokens": Further(
        measure=loss_rows.measure_key_tokens,
        tokens=_read_once,
        settings=lambda config: (config.key_model, loss_rows.short_context(config)),
        check=loss_rows.check_keys,
    ),
    "attention": Further(
        measure=attention_rows.measure,
        tokens=lambda config, documents, window: config.prompts * window,
        settings=lambda config: (config.prompts, config.seed, config.chat),
        check=attention_rows.check,
    ),
}
