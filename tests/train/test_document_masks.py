"""Documents kept apart by whole masks: what is said of it, and who says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from tiny_run import make_base, small

import e2llm.train.run as run
from e2llm.hf import install
from e2llm.train import train
from e2llm.train.distributed import Processes
from e2llm.train.masks import tell_of_masks


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


MASK, NEAR = "data.document_mask=true", "placement.far_weight=0"


@pytest.mark.parametrize(
    ("settings", "attention", "processes", "told"),
    [
        ((MASK, NEAR), "sdpa", Processes(), "model.attn_implementation=flex_attention holds none"),
        ((MASK,), "sdpa", Processes(), "=flex_attention and placement.far_weight=0, which it cannot weigh holds none"),
        ((MASK,), "flex_attention", Processes(), ""),
        ((), "sdpa", Processes(), ""),
        ((MASK,), "sdpa", Processes(rank=1, world=2, local_rank=1, local_world=2, launched=True), ""),
    ],
)
def test_a_slower_attention_is_said(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings: tuple[str, ...],
    attention: str,
    processes: Processes,
    told: str,
) -> None:
    model, recipe = tiny_model("llama", attn_implementation=attention), small(base, tmp_path, *settings)
    install(model)
    tell_of_masks(recipe, model, processes)
    assert not caplog.records, "a CPU has no faster one"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tell_of_masks(recipe, model, processes)
    assert bool(told) == bool(caplog.records) and told in caplog.text
    if told:
        assert "a mask of 48 x 48 for each row" in caplog.text


def test_training_says_it_before_attention_has_another_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(run, "tell_of_masks", lambda recipe, model, _: asked.append(model.config._attn_implementation))
    recipe = small(base, tmp_path / "run", MASK, "train.steps=1")
    assert recipe.placement.far_weight
    train(recipe, quiet=True)
    assert asked == ["sdpa"]
