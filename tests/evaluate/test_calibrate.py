"""Calibration finds the scale with the lowest loss, writes it where serving reads it, and refuses what it cannot do."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import WINDOW, tiny_model
from texts import character_tokenizer, random_documents

from e2llm.cli import main
from e2llm.evaluate import measure
from e2llm.evaluate.calibrate import RATIOS, between, calibrate, run
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.documents import load_documents
from e2llm.evaluate.perplexity import DocumentLoss, whole_windows
from e2llm.evaluate.run import scale_of
from e2llm.hf import CheckpointInfo, save_model
from e2llm.infer import Completion, Engine
from e2llm.positions.choose import Step
from e2llm.records import Record
from e2llm.report import retrieval_table, write_report

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


class Reader:
    """In place of a model: reads a text at scale 0.875 * window / L half a percent better than at window / L. Finds a
    key where it reaches, or of every four so many fewer as the scale is eighths of window / L away from `best`. Counts
    what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, native: int, *, best: float | None = None) -> None:
        self.native, self.best, self.stop_at = native, best, math.inf
        self.prompts: list[tuple[float, str]] = []
        monkeypatch.setattr(measure, "whole_windows", self.read)
        monkeypatch.setattr(Engine, "complete", self.complete)

    def read(self, engine: Engine, documents: Any, *, window: int, scale: float, **more: Any) -> list[DocumentLoss]:
        ratio = scale * self.native / window
        nats = {0.5: 2.3, 0.625: 1.9, 0.75: 1.7, 0.875: 1.595, 1.0: 1.6, 1.25: 1.62}[ratio]
        return [DocumentLoss(one.name, nats * window, window, 1, ((nats * window, window),)) for one in documents]

    def complete(self, token_ids: Any, plan: Any, **more: Any) -> Completion:
        if len(self.prompts) == self.stop_at:
            raise KeyboardInterrupt
        text = character_tokenizer().decode(list(token_ids))
        found = re.search(r"The pass key is (\d{5})\.", text)
        assert found is not None
        self.prompts.append((plan.scale, text))
        near = len(text) - found.start() < plan.scale * self.native
        if self.best is not None:
            away = abs(plan.scale * self.native / plan.window - self.best) / 0.125
            near = int(found[1]) % 4 >= away
        answer = f" {found[1]}" if near else " 00000"
        return Completion([], answer, "length", plan.scale, plan.window, len(token_ids), 0.0, None)


NATIVE = 4096
"""Large beside the words around the text, so that a part of the text is nearly that part of the window."""


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    info = dataclasses.replace(INFO, native_window=NATIVE)
    model = tiny_model("llama", max_position_embeddings=NATIVE)
    return Engine.load(str(save_model(model, character_tokenizer(), tmp_path / "model", info)), device="cpu")


def found_keys(record: Record, window: int) -> dict[float, tuple[float, int]]:
    """scale -> share found, prompts."""
    rows = [row for row in record.rows if row["metric"] == "retrieval" and "depth" not in row]
    return {row["scale"]: (row["value"], row["n"]) for row in rows if row["window"] == window}


def test_a_scale_that_covers_the_window_and_finds_keys_is_taken(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(monkeypatch, NATIVE)
    texts = {"noise": random_documents(2, 4 * NATIVE), "more": random_documents(1, 4 * NATIVE)}
    found = calibrate(engine, texts, EvaluateConfig(device="cpu"), prompts=10)
    record = found.record
    assert [(step.window, step.scale) for step in found.schedule] == [(4096, 1.0), (8192, 2.0), (16384, 4.0)]
    assert record.config["chosen"] == [dataclasses.asdict(step) for step in found.schedule]
    for window in (8192, 16_384):
        g = window / NATIVE
        assert found_keys(record, window) == {g: (1.0, 10)}
        scales = {row["scale"] for row in record.rows if row["window"] == window and row["metric"] == "perplexity"}
        assert scales == {ratio * g for ratio in RATIOS}
    assert len(reader.prompts) == 2 * 10, "not 2 * 6 * 10"
    assert record.config["prompts"] == 10 and record.config["protocols"] == ["whole", "pass_key"]
    assert set(record.config["corpora"]) == {"noise", "more"} and "pass key" in record.config["prompt"]
    unasked = calibrate(engine, texts, EvaluateConfig(device="cpu"), windows=[2 * NATIVE])
    assert unasked.schedule[-1] == Step(2 * NATIVE, 1.75), "without keys perplexity alone"


def test_a_model_that_finds_more_at_less_is_read_there(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(monkeypatch, NATIVE, best=0.75)
    texts = {"noise": random_documents(1, 2 * NATIVE)}
    found = calibrate(engine, texts, EvaluateConfig(device="cpu"), windows=[2 * NATIVE], prompts=10)
    assert found.schedule[-1] == Step(2 * NATIVE, 1.5)
    asked = list(dict.fromkeys(scale for scale, _ in reader.prompts))
    assert asked == [2.0, 2.5, 1.75, 1.5, 1.25, 1.0], "what could be taken, by perplexity"
    of = {scale: [text for s, text in reader.prompts if s == scale] for scale in asked}
    assert all(of[scale] == of[2.0] for scale in asked), "the same prompts at every scale"
    keys = found_keys(found.record, 2 * NATIVE)
    assert 0 < keys[2.0][0] < 0.9 and keys[1.5][0] > keys[1.75][0] > keys[2.0][0]


def test_a_stopped_calibration_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reader, partial = Reader(monkeypatch, NATIVE), tmp_path / "c.json.partial.jsonl"
    texts = {"noise": random_documents(1, 2 * NATIVE)}
    options: dict[str, Any] = {"windows": [2 * NATIVE], "prompts": 10}
    unbroken = calibrate(engine, texts, EvaluateConfig(device="cpu"), **options)
    in_all = reader.prompts
    assert len(in_all) == 10
    reader.prompts = []
    for stop in (3, 5, 8):
        reader.stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            calibrate(engine, texts, EvaluateConfig(device="cpu"), partial=partial, **options)
    reader.stop_at = math.inf
    again = calibrate(engine, texts, EvaluateConfig(device="cpu"), partial=partial, **options)
    assert reader.prompts == in_all, "each question once"
    assert again.schedule == unbroken.schedule and again.record.rows == unbroken.record.rows
    assert again.record.examples == unbroken.record.examples and again.record.config == unbroken.record.config


def test_keys_that_cannot_be_asked_are_refused_first(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "whole_windows", lambda *args, **options: pytest.fail("read before"))
    engine = Engine.load(str(checkpoint), device="cpu")
    with pytest.raises(ValueError, match="already takes"):
        calibrate(engine, {"noise": random_documents(1, 4 * WINDOW)}, EvaluateConfig(), prompts=4)


def test_the_report_holds_scales_that_were_not_asked(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Reader(monkeypatch, NATIVE)
    found = calibrate(engine, {"noise": random_documents(1, 4 * NATIVE)}, EvaluateConfig(device="cpu"), prompts=24)
    table = retrieval_table([found.record], task="pass_key")
    assert "| mine · yarn | 1.00 (0.86–1.00) | 1.00 (0.86–1.00) |" in table  # of the scales that cover the windows
    file = found.record.save(tmp_path / "calibration.json")
    assert "scale 3.5" in write_report([file], tmp_path / "page.html").read_text()
