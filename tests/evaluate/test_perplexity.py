"""Both protocols against a brute force over the model's own logits, one window at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import tiny_model
from texts import random_documents

from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.documents import Document
from e2llm.evaluate.perplexity import DocumentLoss, perplexity, sliding_steps, sliding_windows, whole_windows
from e2llm.hf import install
from e2llm.infer import Engine

WINDOWS = (16, 32, 128)


def make_engine(model_type: str = "llama", **overrides: Any) -> Engine:
    model = tiny_model(model_type, **overrides)
    install(model, method="yarn")
    return Engine(model, None, max_scale=8.0)


def brute_force(
    engine: Engine, tokens: np.ndarray, target: int, start: int, end: int, first: int | None = None
) -> float:
    """Nats of token `target` in the window start…end-1, from the model's logits."""
    ids = torch.tensor(tokens[start:end].astype(np.int64))[None]
    if first is not None:
        ids[0, 0] = first
    logits = engine.model(input_ids=ids).logits[0, target - start - 1]
    return float(F.cross_entropy(logits.double(), torch.tensor(int(tokens[target]))))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scale", [1.0, 2.375, 4.0])
@pytest.mark.parametrize("first_token", [None, 1])
def test_whole_equals_brute_force(window: int, scale: float, first_token: int | None) -> None:
    engine, documents = make_engine(), random_documents(2, 140)
    found = whole_windows(
        engine, documents, window=window, scale=scale, windows=WINDOWS, first_token=first_token, tokens_per_forward=64
    )
    targets = [i for i in range(128) if i % 16]
    with engine.at_scale(scale):
        for loss, document in zip(found, documents, strict=True):
            parts = [(i, i // window * window) for i in targets]
            nats = sum(brute_force(engine, document.tokens, i, s, s + window, first_token) for i, s in parts)
            assert loss.tokens == len(targets) == 120
            assert loss.nats == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("window", [32, 96, 200])
@pytest.mark.parametrize("max_strides", [None, 3])
def test_sliding_equals_brute_force(window: int, max_strides: int | None) -> None:
    engine, documents = make_engine(), random_documents(1, 200)
    options = {"stride": 24, "max_strides": max_strides, "tokens_per_forward": 2 * window}
    found = sliding_windows(engine, documents, window=window, scale=2.0, windows=(32, 96, 200), **options)[0]
    targets = range(1 if max_strides is None else 200 - 72, 200)
    with engine.at_scale(2.0):
        nats = 0.0
        for i in targets:
            end = 200 - (199 - i) // 24 * 24  # the last token of i's stride, counted from the document's end
            start = max(0, end - window)
            nats += brute_force(engine, documents[0].tokens, i, start, end)
    assert found.tokens == len(targets)
    assert found.nats == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize(("window", "passes"), [(4096, 61), (16_384, 13), (65_536, 1)])
def test_sliding_steps_score_every_token_once(window: int, passes: int) -> None:
    length = 65_536 if window != 16_384 else 16_384 + 3 * 4096
    steps = sliding_steps(window, length, 1024, None)
    scored = [t for step in steps for t in range(step.start + step.first, step.end)]
    assert sorted(scored) == list(range(1, length))
    assert len(steps) == passes
    assert all(step.end - step.start == window for step in steps)
    assert all(step.first >= window - 1024 for step in steps if step.start)


def test_the_papers_protocol_is_the_default() -> None:
    """Stride 256, exact up to 16k: every token but the first; above that 64 strides, 16,384 tokens."""
    config = EvaluateConfig()
    for length, scored in ((16_384, 16_383), (65_536, 64 * 256)):
        steps = sliding_steps(8192, length, config.stride, config.max_strides)
        assert sum(step.end - step.start - step.first for step in steps) == scored


def test_batching_and_chunking_do_not_change_the_sum() -> None:
    engine, documents = make_engine("gemma3_text"), random_documents(2, 128)
    whole = whole_windows(engine, documents, window=32, scale=1.0, windows=(32, 128), tokens_per_forward=10_000)
    single = whole_windows(engine, documents, window=32, scale=1.0, windows=(32, 128), tokens_per_forward=1)
    engine.chunk_tokens = 12
    chunked = whole_windows(engine, documents, window=32, scale=1.0, windows=(32, 128))
    for a, b, c in zip(whole, single, chunked, strict=True):
        assert a.nats == pytest.approx(b.nats, rel=1e-6)
        assert a.nats == pytest.approx(c.nats, rel=1e-5)


def test_corpus_perplexity_weighs_tokens_not_documents() -> None:
    losses = [DocumentLoss("a", 30.0, 10, 1), DocumentLoss("b", 10.0, 30, 1)]
    assert perplexity(losses) == pytest.approx(math.e)


def test_one_pass_needs_no_mask_and_holds_few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    masks, rows = [], []
    attention = F.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        masks.append(options["attn_mask"])
        return attention(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr("e2llm.evaluate.logits.ROWS", 50)
    engine.model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[:-1].numel()))
    whole_windows(engine, random_documents(1, 128), window=64, scale=2.0, windows=(16, 64, 128))
    assert masks and all(mask is None for mask in masks)
    assert max(rows) == 50 and sum(rows) == 8 + 8 + 126  # the check of the output step (twice 8), then 2 × 63 targets


def test_short_documents_and_bad_strides_are_refused() -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=r"0\.txt has 100 tokens"):
        whole_windows(engine, random_documents(1, 100), window=32, scale=1.0, windows=(32, 128))
    with pytest.raises(ValueError, match="stride = 32"):
        sliding_windows(engine, random_documents(1, 128), window=32, scale=1.0, windows=(32, 128), stride=32)
    with pytest.raises(ValueError, match="documents"):
        whole_windows(engine, list[Document](), window=32, scale=1.0, windows=(32,))
