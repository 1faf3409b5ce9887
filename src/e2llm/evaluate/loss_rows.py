"""Rows and examples of the protocols that look at single tokens' losses: position, difference, key_tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.context import Context, Part, Results
from e2llm.evaluate.documents import Document
from e2llm.evaluate.key_tokens import KeyLoss, key_losses, key_tokens
from e2llm.evaluate.logits import TokenScorer
from e2llm.evaluate.perplexity import sliding_steps
from e2llm.evaluate.token_losses import Compared, PositionLoss, Reader, by_position, compare, whole_losses
from e2llm.hf.load import load_tokenizer
from e2llm.infer import Engine
from e2llm.intervals import document_fields, interval_of_perplexity, interval_of_ratio
from e2llm.records import make_row, portable

SHORT_CONTEXT = 4096
"""Short context of the key tokens (Fang et al. 2024, Sect. 4), where the smallest window is not shorter than twice
that."""

Progress = Callable[[int], None]


def _labels(context: Context, part: Part) -> dict[str, Any]:
    return context.labels | {
        "corpus": part.corpus,
        "protocol": part.protocol,
        "window": part.window,
        "scale": part.scale,
        "documents": len(context.corpora[part.corpus]),
    }


def _reader(context: Context, progress: Progress) -> Reader:
    if context.scorer is None:
        context.scorer = TokenScorer(context.engine, compiled=context.config.compile == "layers")
    return Reader(context.engine, context.scorer, context.first_token, progress)


def _with_blocks(kept: dict[str, Any]) -> dict[str, Any]:
    """From JSON, which has lists for tuples."""
    return kept | {"blocks": tuple((nats, tokens) for nats, tokens in kept["blocks"])}


def measure_position(context: Context, part: Part, progress: Progress) -> Results:
    """Loss by position in whole windows, one row a bucket; its label `position` is the bucket's last."""
    reader, length = _reader(context, progress), max(context.config.windows)
    found: dict[int, list[PositionLoss]] = {}
    examples = []
    documents = context.corpora[part.corpus]
    kept = context.kept(part)

    def measure(own: list[Document]) -> list[list[PositionLoss]]:
        return kept.each(
            own,
            lambda document: by_position(whole_losses(reader, document, length=length, window=part.window)),
            name=lambda document: document.name,
            dump=lambda buckets: {"buckets": [dataclasses.asdict(bucket) for bucket in buckets]},
            load=lambda result: [PositionLoss(**_with_blocks(bucket)) for bucket in result["buckets"]],
        )

    with context.engine.at_scale(part.scale):
        read = context.ranks.share(documents, measure)
    for document, buckets in zip(documents, read, strict=True):
        for bucket in buckets:
            found.setdefault(bucket.position, []).append(bucket)
        examples.append(
            {
                "metric": "loss",
                "corpus": part.corpus,
                "protocol": part.protocol,
                "window": part.window,
                "scale": part.scale,
                "document": document.name,
                "positions": [bucket.position for bucket in buckets],
                "nats": [round(bucket.nats, 6) for bucket in buckets],
                "tokens": [bucket.tokens for bucket in buckets],
            }
        )
    rows = [_position_row(position, buckets, _labels(context, part)) for position, buckets in found.items()]
    return {"rows": rows, "examples": examples}


def _position_row(position: int, buckets: Sequence[PositionLoss], labels: dict[str, Any]) -> dict[str, Any]:
    nats, tokens = [one.nats for one in buckets], [one.tokens for one in buckets]
    spread = document_fields(nats, tokens, buckets[0].blocks, of=interval_of_ratio)
    return make_row("loss", sum(nats) / sum(tokens), "nats", sum(tokens), **labels, position=position, **spread)


def measure_difference(context: Context, part: Part, progress: Progress) -> Results:
    """How much higher perplexity reads in whole windows than in the sliding window, over the same tokens."""
    config, reader = context.config, _reader(context, progress)
    common: dict[str, Any] = {
        "length": max(config.windows),
        "window": part.window,
        "windows": config.windows,
        "stride": config.stride,
        "max_strides": config.max_strides,
    }
    kept = context.kept(part)

    def measure(own: list[Document]) -> list[Compared]:
        return kept.each(
            own,
            lambda document: compare(reader, document, **common),
            name=lambda document: document.name,
            dump=dataclasses.asdict,
            load=lambda result: Compared(**_with_blocks(result)),
        )

    with context.engine.at_scale(part.scale):
        found = context.ranks.share(context.corpora[part.corpus], measure)
    tokens = sum(one.tokens for one in found)
    whole, sliding = sum(one.whole_nats for one in found), sum(one.sliding_nats for one in found)
    steps = sliding_steps(part.window, max(config.windows), config.stride, config.max_strides)
    labels = _labels(context, part) | {"stride": config.stride, "strides": len(steps)}
    each = [one.whole_nats - one.sliding_nats for one in found], [one.tokens for one in found]
    spread = document_fields(*each, found[0].blocks, of=interval_of_perplexity)
    value = math.exp((whole - sliding) / tokens)
    row = make_row("whole_over_sliding", value, "ratio", tokens, **labels, **spread)
    examples = [
        {
            "metric": "whole_over_sliding",
            "corpus": part.corpus,
            "window": part.window,
            "scale": part.scale,
            "document": one.document,
            "whole_nats": one.whole_nats,
            "sliding_nats": one.sliding_nats,
            "tokens": one.tokens,
        }
        for one in found
    ]
    return {"rows": [row], "examples": examples}


def difference_tokens(config: EvaluateConfig, documents: int, window: int) -> int:
    steps = sliding_steps(window, max(config.windows), config.stride, config.max_strides)
    return documents * (sum(step.end - step.start for step in steps) + max(config.windows))


def check_stride(engine: Engine, documents: Sequence[Document], config: EvaluateConfig) -> None:
    if config.stride >= min(config.windows):
        raise ValueError(f"stride = {config.stride}: use less than the smallest window ({min(config.windows)})")


def short_context(config: EvaluateConfig) -> int:
    """Tokens of the short context: at most half the smallest window."""
    return min(SHORT_CONTEXT, min(config.windows) // 2)


def measure_key_tokens(context: Context, part: Part, progress: Progress) -> Results:
    """The share of tokens that need the context, and perplexity on them where there are any."""
    config = context.config

    def measure(own: list[Document]) -> list[KeyLoss]:
        keys = context.memory.get(("keys", part.corpus))
        if keys is None:  # of this process's documents, which are the same in every part
            keys = context.memory["keys", part.corpus] = _find_keys(context, own)
        return key_losses(_reader(context, progress), own, keys, window=part.window, scale=part.scale)

    found = context.ranks.share(context.corpora[part.corpus], measure)
    tokens, scored = sum(one.tokens for one in found), sum(one.scored for one in found)
    labels = _labels(context, part) | {
        "key_model": portable(config.key_model) or "itself",
        "short_context": short_context(config),
    }
    counts = [one.tokens for one in found]
    blocks = found[0].blocks
    shares = [(float(keys), scored) for _, keys, scored in blocks]
    spread = document_fields(counts, [one.scored for one in found], shares, of=interval_of_ratio)
    rows = [make_row("key_share", tokens / scored, "share", scored, **labels, **spread)]
    if tokens:
        value = math.exp(sum(one.nats for one in found) / tokens)
        within = [(nats, keys) for nats, keys, _ in blocks]
        spread = document_fields([one.nats for one in found], counts, within, of=interval_of_perplexity)
        rows.append(make_row("key_perplexity", value, "ratio", tokens, **labels, **spread))
    examples = [
        {
            "metric": "key_perplexity",
            "corpus": part.corpus,
            "window": part.window,
            "scale": part.scale,
            "document": one.document,
            "nats": one.nats,
            "tokens": one.tokens,
            "scored": one.scored,
        }
        for one in found
    ]
    return {"rows": rows, "examples": examples}


def _find_keys(context: Context, documents: Sequence[Document]) -> list[np.ndarray]:
    from e2llm.evaluate.run import scale_of

    config = context.config
    length = max(config.windows)
    sizes = {"length": length, "short_context": short_context(config), "smallest": min(config.windows)}
    if not config.key_model:
        reader = _reader(context, lambda tokens: None)
        return key_tokens(reader, documents, scale=scale_of(context.engine, length), **sizes)
    # Loaded, asked, and let go: two models are held only while keys are looked for.
    other = Engine.load(config.key_model, dtype=config.dtype, device=config.device)
    _check_same_tokenizer(context.engine.tokenizer, other.tokenizer, config.key_model)
    reader = Reader(other, TokenScorer(other), context.first_token)
    return key_tokens(reader, documents, scale=scale_of(other, length), **sizes)


def check_key_model(name: str) -> Any:
    """The key model's tokenizer, which is there where the model is. ValueError for a name that is no model's."""
    try:
        return load_tokenizer(name)
    except ValueError as error:
        raise ValueError(f"key_{error}; leave key_model out to ask the measured model itself") from error


def check_keys(engine: Engine, documents: Sequence[Document], config: EvaluateConfig) -> None:
    """ValueError for a key model of another tokenizer, before weights of it are read."""
    if config.key_model:
        _check_same_tokenizer(engine.tokenizer, check_key_model(config.key_model), config.key_model)


def _check_same_tokenizer(own: Any, other: Any, name: str) -> None:
    if own is None or other is None or own.get_vocab() != other.get_vocab():
        raise ValueError(
            f"key_model = {name!r}: its tokenizer is another one, so its tokens are not this model's; use a model of "
            "the same family, or leave key_model out"
        )
