"""benchmarks/plain_trainer.py: plain transformers learns what our trainer does, loss by loss."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts_of import load_script
from tiny_run import make_base, small

from e2llm.config import Recipe, load_recipe, parse_recipe, to_plain
from e2llm.records import Record
from e2llm.train import train

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    return load_script(BENCHMARKS / "plain_trainer.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), num_attention_heads=4, num_key_value_heads=2)


def of_recipe(name: str, base: Path, output: Path, *more: str) -> Recipe:
    """`small` with the sampling of another shipped recipe."""
    ours, other = to_plain(small(base, output, *more)), to_plain(load_recipe(name))
    ours |= {key: other[key] for key in ("method", "scales", "attention")}
    ours["placement"] = other["placement"] | ({"max_jumps": 7} if name in ("recommended-yarn", "jumps") else {})
    return parse_recipe({key: value for key, value in ours.items() if value is not None})


def losses(record: Record) -> dict[tuple[str, int, float], float]:
    rows = [row for row in record.rows if row["metric"] == "loss"]
    return {(row["split"], row["step"], row.get("scale", 0.0)): row["value"] for row in rows}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("recommended-yarn", ()),
        ("jumps", ("train.schedule=linear", "train.weight_decay=0.1", "train.gradient_accumulation=2")),
        ("paper", ("train.max_grad_norm=0.05", "train.schedule=constant")),
        ("pose-yarn", ("train.logits_tokens=0",)),
    ],
)
def test_our_trainer_has_the_losses_of_plain_transformers(
    name: str, more: tuple[str, ...], plain: ModuleType, base: Path, tmp_path: Path
) -> None:
    """Same windows, scales, offsets and far keys; on the other side nothing of ours computes."""
    recipe = of_recipe(name, base, tmp_path / "run", "train.warmup_steps=2", "train.learning_rate=5e-3", *more)
    ours = train(recipe, quiet=True).record
    assert ours is not None
    expected, found = losses(plain.run(recipe)), losses(ours)
    assert len(expected) == recipe.train.steps + 2 and found.keys() == expected.keys()
    for which, value in expected.items():
        assert found[which] == pytest.approx(value, abs=2e-5), which
    assert expected["train", 6, 0.0] < expected["train", 1, 0.0] - 0.05, "it learns"


def test_it_leaves_the_base_as_it_was_and_other_draws_differ(plain: ModuleType, base: Path, tmp_path: Path) -> None:
    first, again, other = (
        losses(plain.run(small(base, tmp_path / "run", "train.steps=2", f"seed={seed}"))) for seed in (0, 0, 1)
    )
    assert first == again and first["train", 1, 0.0] != other["train", 1, 0.0]
    assert first["train", 1, 0.0] == pytest.approx(other["train", 1, 0.0], abs=0.05), "the windows are the same"


@pytest.mark.parametrize(
    "setting",
    ["lora.rank=4", "data.document_mask=true", "data.planted_weight=4", "train.distill=0.5", "method=longrope"],
)
def test_what_it_does_not_do_is_refused(setting: str, plain: ModuleType, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{setting.split('=')[0]} = .*: the plain reference knows"):
        plain.run(small(base, tmp_path / "run", setting))
    assert not torch.is_autocast_enabled("cpu")
