"""benchmarks/loss_curves.py and its section of docs/training-speed.md: how far each way is from the plain reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts_of import load_script

from e2llm.records import Record

ROOT = Path(__file__).parents[1]
PLAIN, NOISE, FAST = "transformers, float32", "transformers, float32, other draws", "bfloat16, adamw_split"
TRAINED = {PLAIN: [3.0, 2.0, 1.0], NOISE: [3.1, 1.9, 1.1], "float32": [3.0, 2.0, 1.0], FAST: [3.0, 2.03, 0.97]}
HELD_OUT = {PLAIN: 2.0, NOISE: 2.01, "float32": 2.0, FAST: 1.98}


@pytest.fixture(scope="module")
def curves() -> ModuleType:
    return load_script(ROOT / "benchmarks" / "loss_curves.py")


def rows_of(curves: ModuleType, trained: Mapping[str, Sequence[float]] = TRAINED) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, losses in trained.items():
        common = {"metric": "loss", "unit": "nats", "n": 1, "seed": 0}
        run = [common | {"value": y, "split": "train", "step": s} for s, y in enumerate(losses, 1)]
        run.append(common | {"value": HELD_OUT[name], "split": "held_out", "step": len(losses), "scale": 4.0})
        found = {"config": {"data": {"window": 64}}, "rows": [*run, common | {"metric": "train_seconds", "value": 1.0}]}
        rows += curves.loss_rows(found, trainer=curves.WAYS[name].trainer, shape="tiny", arithmetic=name)
    return rows


def test_differences_are_from_the_plain_reference(curves: ModuleType) -> None:
    assert next(iter(curves.WAYS)) == PLAIN and [n for n, way in curves.WAYS.items() if way.noise] == [NOISE]
    made = curves.difference_rows(rows_of(curves))
    found = {(row["arithmetic"], row["metric"], row["over"]): row for row in made}
    assert {name for name, *_ in found} == set(TRAINED) - {PLAIN}
    values = {which: row["value"] for which, row in found.items() if which[0] == FAST}
    assert values == pytest.approx(
        {
            (FAST, "loss_difference", "train"): 0.0,
            (FAST, "absolute_loss_difference", "train"): 0.02,
            (FAST, "largest_loss_difference", "train"): 0.03,
            (FAST, "largest_loss_difference", "held_out"): 0.02,
        },
        abs=1e-12,
    )
    mean = found[FAST, "loss_difference", "train"]
    assert mean["low"] == pytest.approx(-0.03) and mean["high"] == pytest.approx(0.03)
    assert all(row.get("noise", False) == (row["arithmetic"] == NOISE) for row in made)
    assert all(row.keys() >= {"trainer", "shape", "window", "gpus", "parallelism"} for row in made)
    with pytest.raises(ValueError, match="float32: its steps are not those of transformers, float32"):
        curves.difference_rows(rows_of(curves, {PLAIN: [3.0, 2.0], "float32": [3.0]}))


def test_the_page_says_what_is_within_the_noise(curves: ModuleType, tmp_path: Path) -> None:
    training = load_script(ROOT / "scripts" / "docs_training.py")
    rows = rows_of(curves)
    config = {"recipe": "recommended", "steps": 3}
    record = Record("train_losses", config, [*rows, *curves.difference_rows(rows)], environment={"gpu": "G"})
    record.save(tmp_path / "train_losses.json")
    read = Record.load(tmp_path / "train_losses.json")
    page = training.training_page([read])
    assert f"`{PLAIN}` is the\nreference" in page and "The same run three times" not in page
    assert f"| apart from {PLAIN}, mean | the most | mean difference |" in page
    assert f"| {PLAIN} | 2.0000 | 2.0000 |  |  |  |" in page
    fast = f"| {FAST} | 2.0000 | 1.9800 | 0.0200 | 0.0300 | +0.0000 (-0.0300 to +0.0300) |"
    assert fast in page.replace("-0.0000", "+0.0000")
    assert "- `float32` is within the noise: 0.0000 a step against 0.1000, 0.0000 held out against 0.0100." in page
    assert (
        f"- `{FAST}` is **not** within the noise: 0.0200 a step against 0.1000, 0.0200 held out against 0.0100" in page
    )
    ((file, drawing),) = training.image_drawings([read]).items()
    text = drawing.save(tmp_path / file).read_text(encoding="utf-8")
    assert all(name in text for name in TRAINED)


def test_a_run_of_another_length_is_not_taken(curves: ModuleType, tmp_path: Path) -> None:
    Record("train", {"train": {"steps": 7}}, [], environment={}).save(tmp_path / "float32" / "train.json")
    arguments = type("Arguments", (), {"work": tmp_path, "steps": 8})
    with pytest.raises(SystemExit, match="a run of 7 steps; remove it"):
        curves.train("float32", curves.WAYS["float32"], arguments)
