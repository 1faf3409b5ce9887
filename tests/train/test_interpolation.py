"""Saved weights between the base's and the trained ones, against that line drawn from the files of two runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_run import make_base, small, weights
from transformers import AutoModelForCausalLM

from e2llm.cli import main
from e2llm.hf import CheckpointInfo
from e2llm.train import train
from e2llm.train.interpolate import interpolate


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


WAYS = {
    "all weights": ("train.learning_rate=1e-2",),
    "16-bit weights": (
        *("model.dtype=bfloat16", "train.optimizer=adamw_split"),
        *("train.precision=bfloat16", "train.learning_rate=1e-2"),
    ),
    "adapters": ("lora.rank=4", "train.learning_rate=1e-2"),
    "adapters, norms and embeddings": (
        *("lora.rank=4", "lora.train_norms=true", "lora.train_embeddings=true", "train.learning_rate=1e-2"),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_lies_on_the_line(way: str, base: Path, tmp_path: Path) -> None:
    more = (*WAYS[way], "train.save_every=3", "train.evaluate_every=3")
    whole = train(small(base, tmp_path / "whole", *more, "train.interpolation=1"), quiet=True)
    part = train(small(base, tmp_path / "part", *more, "train.interpolation=0.25"), quiet=True)
    start = weights(base / "model")
    for folder in ("model", "best"):
        trained, found = weights(whole.folder / folder), weights(part.folder / folder)
        assert start.keys() == trained.keys() == found.keys()
        moved = 0.0
        for name, value in found.items():
            first = start[name].to(value.dtype).float()
            expected = first + 0.25 * (trained[name].float() - first)
            torch.testing.assert_close(value.float(), expected, atol=1e-6, rtol=2**-7 if "16" in way else 1e-5)
            moved = max(moved, float((trained[name].float() - first).abs().max()))
        assert moved > 0.005
    info = CheckpointInfo.load(part.folder / "model")
    assert info is not None and info.interpolation == 0.25
    # What can be resumed, and what was measured while training, is the same run.
    rows = [(run.folder / "metrics.jsonl").read_text().splitlines() for run in (whole, part)]
    losses = [[json.loads(row).get("eval_loss_scale_4") for row in one] for one in rows]
    assert losses[0] == losses[1] and any(losses[0])


def test_the_adapter_says_the_same_as_the_whole_weights(base: Path, tmp_path: Path) -> None:
    more = WAYS["adapters, norms and embeddings"]
    result = train(small(base, tmp_path / "run", *more, "train.interpolation=0.5"), quiet=True)
    plain = AutoModelForCausalLM.from_pretrained(base / "model")
    merged = PeftModel.from_pretrained(plain, str(result.folder / "adapter")).merge_and_unload()
    found = weights(result.folder / "model")
    for name, value in merged.named_parameters():
        torch.testing.assert_close(value, found[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("share", [0, 1.5, float("nan")])
def test_a_share_beyond_the_line_is_refused(share: float, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.interpolation = .*use a share above 0"):
        small(base, tmp_path, f"train.interpolation={share}")


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"base = Linear: has no parameter weight"):
        interpolate(torch.nn.Linear(2, 3), torch.nn.Linear(2, 4), 0.5)


def test_the_command_draws_the_same_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("train.learning_rate=1e-2",)
    whole = train(small(base, tmp_path / "whole", *settings, "train.interpolation=1"), quiet=True)
    part = train(small(base, tmp_path / "part", *settings, "train.interpolation=0.4"), quiet=True)
    info = CheckpointInfo.load(whole.folder / "model")
    assert info is not None
    dataclasses.replace(info, schedule=[{"window": 128, "scale": 2.0}]).save(whole.folder / "model")
    out = tmp_path / "out"
    argv = ["interpolate", str(whole.folder / "model"), "--base", str(base / "model"), "--out", str(out), "--share"]
    assert main([*argv, "0.4"]) == 0
    said = capsys.readouterr()
    assert said.out.strip().endswith(str(out)) and "e2llm calibrate" in said.err
    made, expected = weights(out), weights(part.folder / "model")
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
    info = CheckpointInfo.load(out)
    assert info is not None and info.interpolation == 0.4 and info.schedule == [] and (out / "tokenizer.json").is_file()
    for words, message in (([*argv, "1"], "share = 1"), ([*argv, "0.5"], "is there already")):
        assert main(words) == 2 and message in capsys.readouterr().err
    argv[1], argv[5] = str(base / "model"), str(tmp_path / "other")
    assert main([*argv, "0.5"]) == 2
    assert "no e2llm.json there" in capsys.readouterr().err
