"""One document's losses by blocks of its tokens, and the interval that is made of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_model
from texts import character_tokenizer, random_documents

from e2llm.evaluate.blocks import BlockSums, array_blocks
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.logits import TokenScorer
from e2llm.evaluate.perplexity import sliding_windows, whole_windows
from e2llm.evaluate.run import evaluate
from e2llm.evaluate.token_losses import Reader, sliding_losses, whole_losses
from e2llm.infer import Engine
from e2llm.intervals import BLOCKS, document_fields, interval_of_perplexity, interval_of_ratio
from e2llm.records import Record, check_row, make_row
from e2llm.report import perplexity_table


@pytest.mark.parametrize("tokens", [31, 32, 1000, 1024, 5000])
@pytest.mark.parametrize("piece", [1, 7, 300, 10_000])
def test_pieces_add_up_to_the_blocks_of_the_whole(tokens: int, piece: int) -> None:
    values = np.random.default_rng(0).random(tokens)
    whole = array_blocks(values)
    assert len(whole) == (min(64, tokens // 16) if tokens >= 32 else 0)
    sums = BlockSums(100, 100 + tokens)
    for start in reversed(range(0, tokens, piece)):  # as the sliding window does, from the end
        sums.add(100 + start, torch.from_numpy(values[start : start + piece]))
    found = sums.blocks(lambda low, high: high - low)
    assert [n for _, n in found] == [n for _, n in whole]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in whole])
    if whole:
        assert sum(n for _, n in whole) == tokens and max(n for _, n in whole) - min(n for _, n in whole) <= 1


@pytest.mark.parametrize("windows", [(64, 256, 1024), (1024,)])
def test_losses_by_blocks_are_those_of_the_tokens(windows: tuple[int, ...]) -> None:
    """Against the protocols that keep the loss of every token."""
    engine = Engine(tiny_model("llama"), character_tokenizer())
    (document,) = documents = random_documents(1, 1024)
    edges = np.linspace(0, 1024, 65).astype(int)
    for window in windows:
        common: dict[str, Any] = {"window": window, "scale": 1.0, "windows": windows}
        (whole,) = whole_windows(engine, documents, **common)
        reader = Reader(engine, TokenScorer(engine))
        with engine.at_scale(1.0):
            each = whole_losses(reader, document, length=1024, window=window).reshape(-1)
        each[np.arange(1024) % min(windows) == 0] = np.nan
        own = [each[low:high][~np.isnan(each[low:high])] for low, high in itertools.pairwise(edges)]
        assert [n for _, n in whole.blocks] == [len(one) for one in own]
        assert [nats for nats, _ in whole.blocks] == pytest.approx([one.sum() for one in own], rel=1e-5)
        assert sum(n for _, n in whole.blocks) == whole.tokens
        (sliding,) = sliding_windows(engine, documents, **common, stride=32, max_strides=16)
        with engine.at_scale(1.0):
            each = sliding_losses(reader, document, length=1024, window=window, stride=32, max_strides=16)
        expected = array_blocks(each)
        assert len(expected) == 32 and [n for _, n in sliding.blocks] == [n for _, n in expected]
        assert [nats for nats, _ in sliding.blocks] == pytest.approx([nats for nats, _ in expected], rel=1e-5)


def test_an_interval_of_blocks_covers_what_neighbours_share() -> None:
    """Losses that stay alike for 50 tokens: drawn token by token the interval would hold the truth far too seldom."""
    held = {"blocks": 0, "tokens": 0}
    for seed in range(100):
        random = np.random.default_rng(seed)
        losses = np.repeat(random.normal(3.0, 1.0, 200), 50) + random.normal(0, 0.1, 10_000)
        blocks = array_blocks(losses)
        found = document_fields([losses.sum()], [len(losses)], blocks, of=interval_of_ratio)
        assert found["interval"] == BLOCKS
        held["blocks"] += found["low"] <= 3.0 <= found["high"]
        half = 1.96 * losses.std() / math.sqrt(len(losses))
        held["tokens"] += abs(losses.mean() - 3.0) <= half
    assert held["blocks"] >= 88 and held["tokens"] < 50


def test_one_document_has_blocks_and_several_have_documents() -> None:
    blocks = [(1.0, 1.0), (3.0, 1.0)]
    one = document_fields([4.0], [2.0], blocks, of=interval_of_perplexity)
    assert one == {"low": pytest.approx(math.e), "high": pytest.approx(math.exp(3)), "interval": "blocks"}
    assert "interval" not in document_fields([4.0, 2.0], [2.0, 2.0], blocks, of=interval_of_perplexity)
    assert document_fields([4.0], [2.0], (), of=interval_of_perplexity) == {}


def test_every_loss_of_one_document_has_an_interval() -> None:
    engine = Engine(tiny_model("llama"), character_tokenizer())
    protocols = ("whole", "sliding", "position", "difference", "key_tokens")
    config = EvaluateConfig(windows=(256, 1024), protocols=protocols, stride=32)
    alone = evaluate(engine, {"noise": random_documents(1, 1024)}, config)
    for row in alone.rows:
        if row["n"] >= 32:
            assert row["low"] <= row["value"] <= row["high"] and row["interval"] == "blocks", row
        else:
            assert row["metric"] in ("loss", "key_perplexity") and "low" not in row
    assert {row["protocol"] for row in alone.rows if "low" in row} == set(protocols)
    several = evaluate(engine, {"noise": random_documents(2, 1024)}, config)
    assert not any("interval" in row for row in several.rows)
    table = perplexity_table([Record("evaluate", alone.config, alone.rows, alone.examples)], protocol="whole")
    assert "Intervals of one document are over blocks of its tokens" in table
    assert "blocks" not in perplexity_table([several], protocol="whole")


def test_a_kind_without_an_interval_is_no_row() -> None:
    row = make_row("loss", 1.0, "nats", 5, low=0.5, high=2.0, interval="blocks")
    check_row(row, where="x")
    for wrong in ({"low": None, "high": None}, {"interval": ""}, {"interval": 3}):
        with pytest.raises(ValueError, match="interval = "):
            check_row(row | wrong, where="x")
