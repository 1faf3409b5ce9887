"""Losses of single tokens equal the model's own, and add up to what the perplexity protocols report."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import tiny_model
from texts import character_tokenizer, random_documents

from e2llm.evaluate import key_tokens, loss_rows
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.logits import TokenScorer
from e2llm.evaluate.perplexity import sliding_windows, whole_windows
from e2llm.evaluate.run import evaluate
from e2llm.evaluate.token_losses import (
    Reader,
    by_position,
    compare,
    position_edges,
    sliding_losses,
    whole_losses,
)
from e2llm.hf import install
from e2llm.infer import Engine


@pytest.fixture(scope="module")
def reader() -> Reader:
    model = tiny_model("llama")
    install(model, method="yarn")
    engine = Engine(model, character_tokenizer())
    return Reader(engine, TokenScorer(engine))


def own_losses(reader: Reader, tokens: np.ndarray) -> np.ndarray:
    """transformers' logits of one window, and the loss of each token after the first."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    logits = reader.engine.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return -logits.gather(-1, ids[0, 1:, None])[:, 0].numpy()


def test_whole_windows_are_the_models_own_losses(reader: Reader) -> None:
    document = random_documents(1, 256)[0]
    with reader.engine.at_scale(2.0):
        found = whole_losses(reader, document, length=256, window=64)
        expected = own_losses(reader, document.tokens[64:128])
    assert found.shape == (4, 64) and np.isnan(found[:, 0]).all()
    np.testing.assert_allclose(found[1, 1:], expected, rtol=1e-4)
    total = whole_windows(reader.engine, [document], window=64, scale=2.0, windows=(64, 256))[0]
    assert np.nansum(found) == pytest.approx(total.nats, rel=1e-5)


def test_sliding_windows_are_the_models_own_losses(reader: Reader) -> None:
    document = random_documents(1, 256)[0]
    options = {"stride": 16, "max_strides": 5}
    with reader.engine.at_scale(2.0):
        found = sliding_losses(reader, document, length=256, window=64, **options)
        expected = own_losses(reader, document.tokens[192:256])[-16:]
    assert np.isnan(found[: 256 - 80]).all() and not np.isnan(found[256 - 80 :]).any()
    np.testing.assert_allclose(found[-16:], expected, rtol=1e-4)
    total = sliding_windows(reader.engine, [document], window=64, scale=2.0, windows=(64, 256), **options)[0]
    assert np.nansum(found) == pytest.approx(total.nats, rel=1e-5)


def test_exact_up_to_sixty_four_strides_and_the_end_of_longer_documents(reader: Reader) -> None:
    document = random_documents(1, 512)[0]
    with reader.engine.at_scale(1.0):
        short = sliding_losses(reader, document, length=128, window=16, stride=2, max_strides=64)
        long = sliding_losses(reader, document, length=512, window=16, stride=2, max_strides=64)
    assert np.isnan(short).sum() == 1 and (~np.isnan(long)).sum() == 128


def test_positions_hold_every_token_once() -> None:
    for window in (8, 64, 100, 4096):
        edges = position_edges(window)
        assert edges[0] == 1 and edges[-1] == window and edges == sorted(set(edges))
    losses = np.arange(2 * 64, dtype=np.float32).reshape(2, 64)
    losses[:, 0] = np.nan
    found = by_position(losses)
    assert sum(one.tokens for one in found) == 2 * 63
    assert sum(one.nats for one in found) == pytest.approx(np.nansum(losses))
    assert found[0].position == 1 and found[0].nats == 1 + 65
    assert found[-1].position == 63 and found[-1].tokens == 2 * (63 - 44)


def test_the_difference_compares_the_same_tokens(reader: Reader) -> None:
    document = random_documents(1, 256)[0]
    options = {"stride": 16, "max_strides": 6}
    with reader.engine.at_scale(2.0):
        found = compare(reader, document, length=256, window=64, windows=(32, 64, 256), **options)
        whole = whole_losses(reader, document, length=256, window=64).reshape(-1)
        sliding = sliding_losses(reader, document, length=256, window=64, **options)
    scored = [i for i in range(160, 256) if i % 32]
    assert found.tokens == len(scored) == 96 - 3
    assert found.whole_nats == pytest.approx(whole[scored].sum(), rel=1e-6)
    assert found.sliding_nats == pytest.approx(sliding[scored].sum(), rel=1e-6)


def test_rows_of_position_difference_and_key_tokens(lenient: None) -> None:
    model = tiny_model("llama")
    engine = Engine(model, character_tokenizer())
    documents = random_documents(2, 256)
    config = EvaluateConfig(
        windows=(64, 256), protocols=("whole", "position", "difference", "key_tokens"), stride=16, base_model="tiny"
    )
    record = evaluate(engine, {"noise": documents}, config)
    for window in (64, 256):
        rows = [r for r in record.rows if r["window"] == window]
        by_metric = {r["metric"]: r for r in rows if r.get("position") is None}
        positions = [r for r in rows if r.get("position") is not None]
        strides = {64: 13, 256: 1}[window]  # (256 - 64) / 16 + 1
        assert (by_metric["whole_over_sliding"]["n"], by_metric["whole_over_sliding"]["strides"]) == (504, strides)
        total = sum(r["n"] for r in positions)
        assert total == 2 * 256 // window * (window - 1)
        if window == 64:  # here both count the same tokens
            mean = sum(r["value"] * r["n"] for r in positions) / total
            assert np.exp(mean) == pytest.approx(by_metric["perplexity"]["value"], rel=1e-5)
        assert by_metric["key_perplexity"]["n"] == round(by_metric["key_share"]["value"] * by_metric["key_share"]["n"])
    keys = {r["window"]: r for r in record.rows if r["metric"] == "key_perplexity"}
    assert keys[64]["n"] == keys[256]["n"] > 10 and keys[64]["value"] > keys[256]["value"]
    assert keys[64]["short_context"] == 32 and keys[64]["key_model"] == "itself"
    assert all(r["low"] <= r["value"] <= r["high"] for r in record.rows)
    # Two documents: the ends of an interval are the one and the other alone.
    own = [e for e in record.examples if e["window"] == 64 and e["metric"] == "key_perplexity"]
    alone = sorted(np.exp(e["nats"] / e["tokens"]) for e in own)
    assert (keys[64]["low"], keys[64]["high"]) == pytest.approx(tuple(alone))
    own = [e for e in record.examples if e["window"] == 64 and e["metric"] == "whole_over_sliding"]
    alone = sorted(np.exp((e["whole_nats"] - e["sliding_nats"]) / e["tokens"]) for e in own)
    row = next(r for r in record.rows if r["window"] == 64 and r["metric"] == "whole_over_sliding")
    assert (row["low"], row["high"]) == pytest.approx(tuple(alone))
    own = [e for e in record.examples if e["window"] == 64 and "positions" in e]
    alone = sorted(e["nats"][-1] / e["tokens"][-1] for e in own)
    row = next(r for r in record.rows if r["window"] == 64 and r.get("position") == 63)
    assert (row["low"], row["high"]) == pytest.approx(tuple(alone), abs=1e-5)


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds that a random model's tokens pass; the published ones are for models that can read."""
    assert (key_tokens.GAIN, key_tokens.LEAST_LOG_PROBABILITY) == (2.0, -2.0)
    monkeypatch.setattr(key_tokens, "GAIN", 0.1)
    monkeypatch.setattr(key_tokens, "LEAST_LOG_PROBABILITY", -6.0)


def test_key_tokens_by_hand(lenient: None) -> None:
    model = tiny_model("llama")
    engine = Engine(model, character_tokenizer())
    reader = Reader(engine, TokenScorer(engine))
    document = random_documents(1, 128)[0]
    found = key_tokens.key_tokens(reader, [document], length=128, short_context=32, scale=2.0, smallest=64)[0]
    with engine.at_scale(2.0):
        long = own_losses(reader, document.tokens)
    expected = np.zeros(128, dtype=bool)
    with engine.at_scale(1.0):
        for end in range(128, 0, -16):  # each window of 32 scores its last 16
            start = max(0, end - 32)
            short = own_losses(reader, document.tokens[start:end])
            for place in range(max(end - 16, 1), end):
                gain = short[place - start - 1] - long[place - 1]
                expected[place] = gain > 0.1 and -long[place - 1] > -6 and place % 64 != 0
    assert 5 < expected.sum() < 100 and (found == expected).all()


def test_no_key_tokens_leave_the_share_alone() -> None:
    engine = Engine(tiny_model("llama"), character_tokenizer())
    config = EvaluateConfig(windows=(64,), protocols=("key_tokens",), base_model="tiny")
    rows = evaluate(engine, {"noise": random_documents(1, 64)}, config).rows
    assert [(r["metric"], r["value"], r["n"]) for r in rows] == [("key_share", 0.0, 63)]


def test_another_tokenizers_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="its tokenizer is another one"):
        loss_rows._check_same_tokenizer(character_tokenizer(), None, "other")
