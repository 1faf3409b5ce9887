"""benchmarks/results/train_*.json: every row has the labels that tell it apart, and so do those that scripts make."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts_of import load_script

from e2llm.records import Record

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LABELS = {"trainer", "shape", "window", "gpus", "parallelism"}


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("train_*.json")), ids=lambda path: path.stem)
def test_every_row_has_its_labels(path: Path) -> None:
    for index, row in enumerate(Record.load(path).rows):
        assert row.keys() >= LABELS, f"rows[{index}]"
        assert isinstance(row["gpus"], int) or row["metric"] == "largest_loss_difference"


def test_losses_by_arithmetic() -> None:
    rows = [
        {"metric": "loss", "value": 2.0, "unit": "nats", "n": 1, "split": "train", "step": 1, "checkpoint": "jumps"},
        {"metric": "train_seconds", "value": 9.0, "unit": "s", "n": 1},
    ]
    found = {"config": {"data": {"window": 4096}}, "rows": rows}
    (row,) = load_script(BENCHMARKS / "loss_curves.py").loss_rows(found, shape="smollm2-135m", arithmetic="float32")
    labels = {"trainer": "e2llm", "shape": "smollm2-135m", "window": 4096, "gpus": 1, "parallelism": "none"}
    assert row == rows[0] | labels | {"arithmetic": "float32"}


def test_a_run_that_moves_has_the_gpus_of_each_step() -> None:
    script = load_script(BENCHMARKS / "resume_gpus.py")
    curves = {"one": [3.0, 2.0, 1.0], "two": [3.0, 2.5, 1.0], "two, then one": [3.0, 2.5, 1.25]}
    rows = script.loss_rows(curves, 2)
    assert all(row.keys() >= LABELS | {"run"} for row in rows)
    gpus = {run: [r["gpus"] for r in rows if r["run"] == run and r["metric"] == "loss"] for run in curves}
    assert gpus == {"one": [1, 1, 1], "two": [2, 2, 2], "two, then one": [2, 2, 1]}
    apart = {r["run"]: (r["value"], r["gpus"]) for r in rows if r["metric"] == "largest_loss_difference"}
    assert apart == {"one": (0.0, 1), "two": (0.5, 2), "two, then one": (0.5, None)}
    assert {r["parallelism"] for r in rows if r["run"] == "one"} == {"none"}
    Record("train_resume", {}, rows, environment={})  # no two rows with the same labels
