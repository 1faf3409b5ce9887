"""Windows beyond a checkpoint's training are refused unless asked for by their scale, and then marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from architectures import WINDOW, tiny_model
from checkpoints import checkpoint_info, save_checkpoint
from texts import character_tokenizer, random_documents

from e2llm.evaluate.choice import choice
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.run import evaluate, plan_parts
from e2llm.evaluate.trained import beyond_trained
from e2llm.hf import install
from e2llm.infer import Engine
from e2llm.positions.choose import Step

CORPORA = {"noise": random_documents(1, 16 * WINDOW)}
REFUSED = (
    r"windows = \[512, 1024\]: 1024 is above the checkpoint's trained range \(512 tokens\); lower windows, or .*scale"
)


def config(*windows: int, **options: Any) -> EvaluateConfig:
    return EvaluateConfig(windows=windows or (512, 1024), protocols=("whole",), **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Native window 64, trained to scale 8: 512 tokens."""
    return save_checkpoint(tmp_path_factory.mktemp("models") / "mine")[0]


def test_a_window_above_the_range_needs_a_scale_by_name(trained: str) -> None:
    engine = Engine.load(trained, device="cpu")
    with pytest.raises(ValueError, match=REFUSED):
        plan_parts(engine, CORPORA, config())
    assert [part.scale for part in plan_parts(engine, CORPORA, config(64, 512))] == [1, 8]
    # Only what is measured now counts: the others decide which tokens are scored.
    assert [part.window for part in plan_parts(engine, CORPORA, config(), windows=(512,))] == [512]
    with pytest.raises(ValueError, match=r"windows = \[1024\]: 1024 is above"):
        plan_parts(engine, CORPORA, config(), windows=(1024,))
    asked = plan_parts(engine, CORPORA, config(scales=(8.0, 16.0)))
    assert [(part.window, part.scale) for part in asked] == [(512, 8), (512, 16), (1024, 8), (1024, 16)]


def test_a_window_that_was_calibrated_is_read_at_its_scale_and_marked(trained: str) -> None:
    engine = Engine.load(trained, device="cpu")
    engine.extension.schedule = (Step(WINDOW, 1.0), Step(1024, 12.0))
    assert [(part.window, part.scale) for part in plan_parts(engine, CORPORA, config())] == [(512, 12.0), (1024, 12.0)]
    assert beyond_trained(engine, 1024, 12.0) == {"beyond_trained": True}


def test_rows_beyond_the_range_say_so(trained: str, tmp_path: Path) -> None:
    engine = Engine.load(trained, device="cpu")
    settings = config(256, 512, 1024, scales=(8.0, 16.0))
    for _ in range(2):  # measured, then taken from the file of finished parts
        rows = evaluate(engine, CORPORA, settings, partial=tmp_path / "x.jsonl").rows
        marked = {(row["window"], row["scale"]) for row in rows if row.get("beyond_trained")}
        assert marked == {(256, 16.0), (512, 16.0), (1024, 8.0), (1024, 16.0)}
        assert {(row["window"], row["scale"]) for row in rows if "beyond_trained" not in row} == {(256, 8), (512, 8)}


def test_weights_without_scaling_end_at_their_native_window(trained: str) -> None:
    engine = Engine.load(trained, method="none", device="cpu")
    with pytest.raises(ValueError, match=r"128 is above the checkpoint's trained range \(64 tokens\)"):
        plan_parts(engine, CORPORA, config(64, 128))
    assert len(plan_parts(engine, CORPORA, config(64, 128, scales=(1.0,)))) == 2
    assert beyond_trained(engine, 128, 1.0) and not beyond_trained(engine, 64, 1.0)


@pytest.mark.parametrize("method", ["none", "yarn", "self_extend"])
def test_models_without_a_trained_range_are_baselines(method: str) -> None:
    model = tiny_model("llama")
    install(model, method=method)
    engine = Engine(model, character_tokenizer(), info=checkpoint_info() if method == "self_extend" else None)
    assert len(plan_parts(engine, CORPORA, config(64, 256))) == 2
    rows = evaluate(engine, CORPORA, config(64, 256)).rows
    assert not any("beyond_trained" in row for row in rows)


def test_chosen_scales_of_choice_are_refused_too(trained: str, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("a b " * 400)
    named = {"model": trained, "corpora": {"noise": str(text)}, "device": "cpu", "out": str(tmp_path / "c.json")}
    with pytest.raises(ValueError, match=REFUSED):
        choice(config(**named), progress=False)
    rows = choice(config(scales=(8.0,), **named), methods=("yarn",), progress=False).rows
    assert {row["scale"] for row in rows if row.get("beyond_trained")} == {8.0, 16.0}
