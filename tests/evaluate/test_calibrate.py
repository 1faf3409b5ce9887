"""Calibration finds the scale with the lowest loss, writes it where serving reads it, and refuses what it cannot do."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import WINDOW, tiny_model
from texts import character_tokenizer, random_documents

from e2llm.cli import main
from e2llm.evaluate.calibrate import best_scale, between, calibrate, run
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.documents import load_documents
from e2llm.evaluate.perplexity import whole_windows
from e2llm.evaluate.run import scale_of
from e2llm.hf import CheckpointInfo, save_model
from e2llm.infer import Engine
from e2llm.positions.choose import Step
from e2llm.records import Record

INFO = CheckpointInfo(method="yarn", native_window=WINDOW, training_window=WINDOW, max_scale=4.0, checkpoint="mine")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_model(tiny_model("llama"), character_tokenizer(), tmp_path / "model", INFO)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for seed in range(2):
        (folder / f"{seed}.txt").write_text("".join(random.Random(seed).choices("abcdefgh ", k=5 * WINDOW)))
    return folder


def settings(checkpoint: Path, texts: Path, **options: Any) -> EvaluateConfig:
    out = str(checkpoint.parent / "calibration.json")
    return EvaluateConfig(model=str(checkpoint), corpora={"noise": str(texts)}, device="cpu", out=out, **options)


def test_the_best_scale_of_each_window_is_served(checkpoint: Path, texts: Path) -> None:
    found = run(settings(checkpoint, texts), ratios=(0.75, 1.0), progress=False)
    assert [step.window for step in found.schedule] == [WINDOW, 2 * WINDOW, 4 * WINDOW]
    assert found.schedule[0].scale == 1.0, "the native window stays the model as it was"
    engine = Engine.load(str(checkpoint), device="cpu")
    assert engine.extension.schedule == found.schedule and engine.info.checkpoint == "mine"
    record = Record.load(checkpoint.parent / "calibration.json")
    assert record.kind == "calibrate" and not list(checkpoint.parent.glob("*.partial*"))
    documents = load_documents(texts, engine.tokenizer, num_tokens=4 * WINDOW)
    for step in found.schedule[1:]:
        losses = {}
        for ratio in (0.75, 1.0):
            scale = ratio * step.window / WINDOW
            measured = whole_windows(engine, documents, window=step.window, scale=scale, windows=(step.window,))
            losses[scale] = sum(loss.nats for loss in measured)
        assert step.scale == min(losses, key=losses.__getitem__)
        assert engine.plan(step.window - 5, max_new_tokens=5).scale == step.scale
        assert engine.plan(step.window - 5, max_new_tokens=5).window == step.window
        assert scale_of(engine, step.window) == step.scale
        assert {row["scale"] for row in record.rows if row["window"] == step.window} == set(losses)


def test_candidates_are_never_below_one(checkpoint: Path) -> None:
    engine = Engine.load(str(checkpoint), device="cpu")
    documents = {"noise": random_documents(1, 4 * WINDOW)}
    config = EvaluateConfig(device="cpu")
    honest = calibrate(engine, documents, config, windows=[2 * WINDOW], ratios=(0.25, 0.5, 1.0))
    rows = {row["scale"]: row["value"] for row in honest.record.rows}
    assert set(rows) == {1.0, 2.0}
    assert honest.schedule[1] == Step(2 * WINDOW, min(rows, key=rows.__getitem__))
    assert all(math.isfinite(value) for value in rows.values())


def test_windows_between_two_measured_ones_get_scales_between_theirs(checkpoint: Path) -> None:
    # By hand: halfway in both logarithms is the root of the product, of 1 * 3.24 and of 3.24 * 12.96.
    measured = (Step(100, 1.0), Step(400, 3.24), Step(1600, 12.96))
    filled = (measured[0], Step(200, 1.8), measured[1], Step(800, 6.48), measured[2])
    assert between(measured, 16.0) == filled
    assert between(filled, 16.0) == filled, "nothing is added twice"
    assert between(measured[:2], 2.0) == filled[:3], "the ladder's own windows"
    assert between((Step(100, 1.0), Step(800, 1.0)), 8.0)[1:3] == (Step(200, 1.0), Step(400, 1.0))
    engine = Engine.load(str(checkpoint), device="cpu")
    found = calibrate(engine, {"noise": random_documents(1, 4 * WINDOW)}, EvaluateConfig(), windows=[4 * WINDOW])
    assert [step.window for step in found.schedule] == [WINDOW, 2 * WINDOW, 4 * WINDOW]
    assert found.schedule[1].scale <= found.schedule[2].scale
    assert {row["window"] for row in found.record.rows} == {4 * WINDOW}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": [WINDOW]}, "calibrate windows longer than the native one"),
        ({"ratios": ()}, r"ratios = \[\]"),
        ({"ratios": (0.5, -1)}, r"ratios = \[0\.5, -1\]"),
        ({"windows": [64 * WINDOW]}, "shorter than the window"),
        ({"prompts": -1}, "prompts = -1"),
    ],
)
def test_what_cannot_be_calibrated(checkpoint: Path, options: dict, message: str) -> None:
    engine = Engine.load(str(checkpoint), device="cpu")
    with pytest.raises(ValueError, match=message):
        calibrate(engine, {"noise": random_documents(1, 4 * WINDOW)}, EvaluateConfig(), **options)


def test_what_has_nothing_to_calibrate(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    engine = Engine.load(str(checkpoint), device="cpu", method="none")
    with pytest.raises(ValueError, match="method = 'none': it has no scale"):
        calibrate(engine, {"noise": random_documents(1, 4 * WINDOW)}, EvaluateConfig())
    engine = Engine.load(str(checkpoint), device="cpu")
    with pytest.raises(ValueError, match="nothing between the native window"):
        calibrate(engine, {"noise": random_documents(1, WINDOW)}, EvaluateConfig())
    with pytest.raises(ValueError, match=r"model = .*written into a checkpoint folder"):
        run(settings(tmp_path / "nowhere", texts))
    (checkpoint / "e2llm.json").unlink()
    with pytest.raises(ValueError, match=r"no e2llm\.json to write a schedule into"):
        run(settings(checkpoint, texts))


def test_the_command(checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    arguments = ["calibrate", str(checkpoint), "--corpus", f"noise={texts}", "--windows", str(2 * WINDOW)]
    arguments += ["--prompts", "0"]
    assert main([*arguments, "--ratios", "0.5", "1", "--device", "cpu", "--out", str(out)]) == 0
    assert f"up to {2 * WINDOW:>9,} tokens: scale" in capsys.readouterr().out
    assert len(CheckpointInfo.load(checkpoint).schedule) == 2 and len(Record.load(out).rows) == 2
    assert np.isfinite([row["value"] for row in Record.load(out).rows]).all()
    assert main(["calibrate", str(checkpoint), "--device", "cpu"]) == 2
    assert "corpora = {}" in capsys.readouterr().err


def rows_of(*found: tuple[float, float, float | None], asked: int = 10) -> list[dict[str, Any]]:
    """Rows of one window: (scale, perplexity, share of keys or None where none were asked)."""
    rows: list[dict[str, Any]] = []
    for scale, perplexity, keys in found:
        where = {"window": 128, "scale": scale}
        rows.append({"metric": "perplexity", "value": perplexity, "n": 100, **where})
        if keys is not None:
            rows.append({"metric": "retrieval", "value": keys, "n": asked, **where})
            rows.append({"metric": "retrieval", "value": 1.0, "n": 1, "depth": 0.5, **where})
    return rows


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([(12, 3.7, None), (16, 3.8, None)], 12),
        ([(12, 3.7, 0.3), (14, 3.75, 0.9), (16, 3.8, 1.0)], 14),
        ([(12, 3.7, 0.3), (14, 3.75, 0.8), (16, 3.8, 1.0)], 16),
        ([(12, 3.7, 0.0), (16, 3.8, 0.0)], 12),
        ([(12, 3.7, 0.05), (16, 3.8, 0.1)], 12),
    ],
)
def test_a_scale_that_loses_the_keys_is_not_the_best(found: list[Any], best: float) -> None:
    assert best_scale(rows_of(*found), 128) == best


@pytest.mark.parametrize(("asked", "best"), [(4, 1.0), (5, 2.0), (100, 2.0)])
def test_one_key_of_a_few_is_luck(asked: int, best: float) -> None:
    assert best_scale(rows_of((1.0, 9.0, 0.75), (2.0, 10.0, 1.0), asked=asked), 128) == best


def test_keys_are_asked_at_every_scale(tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=512)
    folder = save_model(model, character_tokenizer(), tmp_path / "model", dataclasses.replace(INFO, native_window=512))
    engine = Engine.load(str(folder), device="cpu")
    config = EvaluateConfig(device="cpu")
    found = calibrate(
        engine, {"noise": random_documents(1, 1024)}, config, windows=[1024], ratios=(0.5, 1.0), prompts=2
    )
    asked = [row for row in found.record.rows if row["metric"] == "retrieval" and "depth" not in row]
    assert [(row["scale"], row["n"]) for row in asked] == [(1.0, 2), (2.0, 2)]
    examples = [e for e in found.record.examples if e.get("metric") == "retrieval"]
    by_scale = [[e["expected"] for e in examples if e["scale"] == scale] for scale in (1.0, 2.0)]
    assert by_scale[0] == by_scale[1], "the same prompts at every scale"
