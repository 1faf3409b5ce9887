"""What training and evaluation cost: a section of its own, a row a run, never two models in one table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from e2llm.records import Record, make_row
from e2llm.report import render_page, results_latex, results_markdown
from e2llm.report.cost import cost_tables
from e2llm.report.series import all_rows


def train(name: str = "ours", seconds: float = 7200.0, there: int | None = 1, **labels: Any) -> Record:
    about = {"checkpoint": name, "base_model": "tiny", "seed": 0} | labels
    rows = [
        make_row("tokens_per_second", 113_000.0, "tokens/s", 850, **about),
        make_row("train_seconds", seconds, "s", 850, **about),
        make_row("peak_memory_bytes", 3.5 * 2**30, "bytes", 1, **about),
    ]
    return Record("train", {}, rows, [], {"gpus": there} if there else {})


def speed(compiled: str) -> list[dict[str, Any]]:
    about = {"base_model": "tiny", "protocol": "sliding", "window": 32768, "compile": compiled}
    return [
        make_row("tokens_per_second", 1000.0, "tokens/s", 3, **about, low=900.0, high=1100.0),
        make_row("seconds_per_window", 0.318, "s", 3, **about),
    ]


def cells(records: list[Record]) -> dict[str, dict[str, str]]:
    """Row -> column -> text, of all tables."""
    found = {}
    for one in cost_tables(all_rows(records), records):
        for name, row in one.table.body:
            found[name] = {h: c.text for h, c in zip(one.table.head[1:], row, strict=True) if c is not None}
    return found


def test_a_training_has_speed_seconds_gpu_hours_and_memory() -> None:
    assert cells([train()]) == {
        "ours": {"tokens/s": "113,000", "seconds": "7,200", "GPU hours": "2.00", "peak memory a GPU": "3.50 GiB"}
    }


@pytest.mark.parametrize(
    ("there", "labels", "hours"),
    [(1, {}, "2.00"), (8, {}, None), (8, {"gpus": 4}, "8.00"), (None, {}, None), (8, {"gpus": "one"}, None)],
)
def test_gpu_hours_are_never_guessed(there: int | None, labels: dict[str, Any], hours: str | None) -> None:
    record = train(there=there, **labels)
    assert cells([record])["ours"].get("GPU hours") == hours
    assert "else none." in results_markdown([record])


def test_models_and_purposes_stand_in_tables_of_their_own() -> None:
    evaluation = Record("evaluate_speed", {}, [*speed("none"), *speed("layers")], [], {})
    records = [evaluation, train(), train("plain"), train("ours", base_model="other")]
    found = cost_tables(all_rows(records), records)
    assert [one.title for one in found] == [
        "Training, tiny, seed 0", "Training, other, seed 0", "Evaluation, tiny, sliding, window 32k",
    ]  # fmt: skip
    assert [[name for name, _ in one.table.body] for one in found] == [
        ["ours", "plain"], ["ours"], ["compile none", "compile layers"],
    ]  # fmt: skip
    assert "| compile none | 1,000 (900–1,100) | 0.318 |" in results_markdown(records)


def test_two_runs_of_one_name_are_told_apart_by_seed_or_file(tmp_path: Path) -> None:
    assert list(cells([train(), train(seed=1)])) == ["ours, seed 0", "ours, seed 1"]
    saved = [Record.load(train().save(tmp_path / f"{name}.json")) for name in ("a", "b")]
    assert list(cells(saved)) == ["ours, a", "ours, b"]


@pytest.mark.parametrize("render", [results_markdown, results_latex, render_page])
def test_every_output_has_the_section(render: Any) -> None:
    text = render([train()])
    assert re.search(r'## Cost|section\*\{Cost\}|<section id="cost"', text) and "3.50 GiB" in text
    assert "Other measurements" not in text


def test_each_column_says_of_how_many() -> None:
    records = [Record("evaluate_speed", {}, [*speed("none"), *speed("layers")], [], {}), train()]
    training, evaluation = (one.table for one in cost_tables(all_rows(records), records))
    assert evaluation.foot == ("n", ["3", "3"]) and training.foot == ("n", ["850", "850", "850", "1"])
    assert "| n | 3 | 3 |" in results_markdown(records) and '<th scope="row">n</th>' in render_page(records)


def test_serving_is_measured_elsewhere() -> None:
    row = make_row("peak_memory_bytes", 2.0**30, "bytes", 1, base_model="tiny", engine="e2llm", window=640)
    page = render_page([Record("serve", {}, [row], [], {})])
    assert 'id="cost"' not in page and "peak_memory_bytes" in page
