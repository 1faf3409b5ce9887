"""Baselines of the study that lean on a property: that a scale can drop positions, and that methods meet at scale 1."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, tiny_model
from scripts_of import load_script

import e2llm
from e2llm.config import load_recipe
from e2llm.hf import install
from e2llm.records import Record

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "study.py"
TINY = Path(e2llm.__file__).parent / "assets" / "tiny-512"


class NoRotation(torch.nn.Module):
    """cos 1 and sin 0 for every position, in the shapes of the module it stands for."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cos, sin = self.inner(*args, **kwargs)
        return torch.ones_like(cos), torch.zeros_like(sin)


def test_the_drope_like_scale_is_no_rotation() -> None:
    recipe = load_recipe("drope-like")
    model: Any = tiny_model("llama")
    tokens = torch.randint(3, VOCABULARY, (1, 48), generator=torch.Generator().manual_seed(0))
    turned = model(tokens).logits
    own = model.model.rotary_emb
    model.model.rotary_emb = NoRotation(own)
    wanted = model(tokens).logits
    model.model.rotary_emb = own
    extension = install(model, method=recipe.method, attention=recipe.attention)
    extension.set_scale(recipe.scales.max_scale)
    far = torch.arange(48)[None] + torch.tensor([0] * 24 + [131_000] * 24)
    for positions in (None, far):
        torch.testing.assert_close(model(tokens, position_ids=positions).logits, wanted, atol=1e-4, rtol=0)
    assert (turned - wanted).abs().max() > 1e-2
    assert recipe.placement.kind == "none" and recipe.scales.distribution == "fixed"


def test_methods_share_one_training_at_scale_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study: Any = load_script(SCRIPT)
    words, letters = "def return self value import for in while if not none true list".split(), random.Random(0)
    for name, count in (("train/a.txt", 30_000), ("dev/code/a.txt", 4000)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(" ".join(letters.choices(words, k=count)))
    plan = tmp_path / "plan.toml"
    settings = {"plain-linear": "method=linear", "plain-yarn": "method=yarn", "adapters": "lora.rank=4"}
    settings["longer"] = "train.steps=3"  # all weights again, after a run that had frozen them
    plan.write_text("".join(f'[[runs]]\nname="{n}"\nrecipe="plain"\nset=["{s}"]\n' for n, s in settings.items()))
    small = ["train.steps=2", "train.batch_size=2", "data.window=128", "train.workers=0", "train.precision=float32"]
    argv = ["study.py", "--model", str(TINY), "--text", str(tmp_path), "--plan", str(plan), "--base-model", "t"]
    argv += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--windows", "512", "1024"]
    argv += ["--prompts", "1", "--key-windows", "512", *(part for one in small for part in ("--set", one))]
    monkeypatch.setattr(sys, "argv", argv)
    began, train = [], study.train_loaded

    def watched(recipe: Any, *rest: Any, **options: Any) -> Any:
        began.append(recipe.name)
        return train(recipe, *rest, **options)

    monkeypatch.setattr(study, "train_loaded", watched)
    study.main()
    assert began == ["plain-linear", "adapters", "longer"]
    found = {
        name: {
            (row["window"]): (row["value"], row["method"])
            for row in Record.load(tmp_path / "out" / f"study_{name}.json").rows
            if row["metric"] == "perplexity"
        }
        for name in settings
    }
    linear, yarn = found["plain-linear"], found["plain-yarn"]
    assert linear[512][0] == yarn[512][0]  # the same weights, read at scale 1
    assert len({linear[512][0], found["adapters"][512][0], found["longer"][512][0]}) == 3
    assert linear[1024][0] != yarn[1024][0] and (linear[512][1], yarn[512][1]) == ("linear", "yarn")
