"""Training with far keys that count for more: it reaches the steps, in every way of training, and leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import make_base, small, weights

from e2llm.config import load_recipe
from e2llm.hf import CheckpointInfo, load_model
from e2llm.train import train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


WAYS = {
    "plain": (),
    "recomputed": ("train.gradient_checkpointing=true",),
    "whole logits": ("train.logits_tokens=0",),
    "adapters": ("lora.rank=4",),
    "distilled": ("train.distill=0.5",),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_weight_reaches_the_steps_and_the_model_is_plain_again(way: str, base: Path, tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 1.0):
        recipe = small(base, tmp_path / f"{weight}", f"placement.far_weight={weight}", *WAYS[way])
        result = train(recipe, quiet=True)
        assert result.model_folder is not None
        found[weight] = losses(tmp_path / f"{weight}")
        assert "e2llm_far" not in (result.model_folder / "config.json").read_text()
        info = CheckpointInfo.load(result.model_folder)
        assert info is not None and info.placement["far_weight"] == weight
    assert len(found[0.0]) == len(found[1.0]) == 6
    # The same windows and placements: what differs is how far keys count.
    assert found[0.0][0] != found[1.0][0] and found[1.0][0] == pytest.approx(found[0.0][0], abs=0.1)
    model, _, _ = load_model(str(tmp_path / "1.0" / "model"))
    assert model.config._attn_implementation == "sdpa"


def test_recomputing_changes_nothing_but_memory(base: Path, tmp_path: Path) -> None:
    for name, more in (("kept", ()), ("recomputed", ("train.gradient_checkpointing=true",))):
        train(small(base, tmp_path / name, "placement.far_weight=0.7", *more), quiet=True)
    kept, recomputed = (weights(tmp_path / name / "model") for name in ("kept", "recomputed"))
    assert all(torch.allclose(kept[name], recomputed[name], atol=1e-6) for name in kept)


def test_what_cannot_weigh_far_keys_is_refused_before_training(base: Path, tmp_path: Path) -> None:
    recipe = small(base, tmp_path / "run", "placement.far_weight=1", "model.attn_implementation=eager")
    with pytest.raises(ValueError, match=r"placement.far_weight: attention 'eager'"):
        train(recipe, quiet=True)
    with pytest.raises(ValueError, match=r"placement.far_weight = 1: needs a placement of at most 64 segments"):
        load_recipe("randpos", ["placement.far_weight=1"])
