"""The committed Records of evaluations: every row says of how many, and how sure; what was asked is named."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from e2llm.records import Record

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PATHS = sorted(RESULTS.glob("evaluate_*.json"))
LEAST_PROMPTS = 100
"""Prompts a length, over all depths."""


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_every_row_has_its_number_and_its_interval(path: Path) -> None:
    rows = Record.load(path).rows
    assert [row for row in rows if not ("low" in row and row["n"] >= 1)] == []
    assert [row for row in rows if not row["low"] <= row["value"] <= row["high"]] == []
    asked = [row for row in rows if row["metric"] == "retrieval" and "depth" not in row]
    assert [row for row in asked if not row.get("task") or row["n"] < LEAST_PROMPTS] == []
    kinds: Counter[tuple[Any, ...]] = Counter()  # RULER's count together: a few prompts of each of thirteen
    for row in rows:
        if row["metric"] == "string_match":
            kinds[row["checkpoint"], row["method"], row["corpus"], row["window"], row["scale"]] += row["n"]
    assert {cell: n for cell, n in kinds.items() if n < LEAST_PROMPTS} == {}
    tasks = [row for row in rows if row.get("suite") in ("longbench", "leval") and row["metric"] != "average"]
    assert [row for row in tasks if not (row.get("task") and row.get("language"))] == []


@pytest.mark.parametrize("path", [path for path in PATHS if "_speed_" in path.stem], ids=lambda path: path.stem)
def test_a_speed_is_the_median_of_its_rounds_and_lies_among_them(path: Path) -> None:
    record = Record.load(path)
    cells = ("metric", "window", "compile")

    def cell(row: dict[str, Any]) -> list[Any]:
        return [row[name] for name in cells]

    rounds = {
        tuple(key): [one["value"] for one in own]
        for key, own in itertools.groupby(sorted(record.examples, key=cell), key=cell)
    }
    for row in record.rows:
        values = rounds[tuple(cell(row))]
        assert row["n"] == len(values) and row["value"] == statistics.median(values)
        # The median of three rounds drawn again is any of the three, each end in 7 of 27 draws: the ends are theirs.
        assert len(values) != 3 or (row["low"], row["high"]) == (min(values), max(values))
