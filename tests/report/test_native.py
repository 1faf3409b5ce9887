"""What fails inside the native window is marked: one rule for pass keys, pairs, needles and RULER."""

from __future__ import annotations

from typing import Any

import pytest
import sample_records

from e2llm.records import Record, make_row
from e2llm.report import render_page, results_latex, results_markdown, retrieval_figure
from e2llm.report.headline import headline
from e2llm.report.native import FAILED, cannot, fails, native_row
from e2llm.report.ruler import ruler_tables
from e2llm.report.series import Series, all_rows, sections

WINDOWS = (2048, 4096, 16384)
TASKS = ("pass_key", "uuid_kv", "needle", "kv_pairs", "key_values")


def series(*values: float, native: int | None = 4096, windows: tuple[int, ...] = WINDOWS) -> Series:
    points = {w: {"value": v, "native_window": native} for w, v in zip(windows, values, strict=True)}
    return Series({"checkpoint": "base", "method": "yarn"}, points)


def retrieval(task: str, metric: str = "retrieval", native: int | None = 4096, **shares: tuple[float, ...]) -> Record:
    rows = [
        make_row(metric, share, "share", 20, base_model="tiny", checkpoint=checkpoint, method="yarn", corpus="novels",
                 window=window, scale=max(1.0, window / 4096), task=task, native_window=native)
        for checkpoint, own in shares.items()
        for window, share in zip(WINDOWS, own, strict=True)
    ]  # fmt: skip
    return Record("evaluate", {}, rows, [], {})


@pytest.mark.parametrize(
    ("values", "native", "failed"),
    [
        ((1.0, 0.2, 1.0), 4096, True),  # the native window counts, not a shorter or a longer one
        ((0.0, FAILED, 0.0), 4096, False),
        ((0.2, 1.0, 1.0), None, True),  # not known: the smallest
        ((1.0, 0.0, 0.0), None, False),
        ((1.0, 0.0, 1.0), 8192, True),  # not measured itself: the longest below it
        ((0.0, 0.0, 0.0), 1024, False),  # only longer ones were measured: not known
    ],
)
def test_the_share_at_the_native_window_decides(values: tuple[float, ...], native: int | None, failed: bool) -> None:
    assert fails(series(*values, native=native)) is failed


def test_the_native_row_is_not_known_from_longer_windows() -> None:
    assert native_row(series(0.0, 0.0, 0.0, native=1024)) is None
    assert cannot([series(0.0, 0.0, 0.0, native=1024)]) == (False, False)


def test_a_base_that_manages_by_one_method_can() -> None:
    assert cannot([series(1.0, 0.0, 0.0), series(1.0, 1.0, 0.0)]) == (False, True)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("render", [results_markdown, results_latex, render_page])
def test_rows_that_fail_are_marked_in_every_output(task: str, render: Any) -> None:
    text = render([retrieval(task, base=(0.5, 0.1, 0.0), ours=(0.9, 0.8, 0.7))]).replace("\u00a0", " ")
    assert "base · yarn †" in text and "ours · yarn †" not in text
    assert text.count("† fails inside its native window") == 1
    assert "longer windows say nothing about the extension: base · yarn." in text
    assert "†" not in render([retrieval(task, base=(0.5, 0.3, 0.0), ours=(0.9, 0.8, 0.7))])


@pytest.mark.parametrize("metric", ["retrieval", "string_match"])
def test_where_no_native_window_was_measured_that_is_said(metric: str) -> None:
    """A row of zeros beyond the native window may be a base that cannot do it at all."""
    unknown = results_markdown([retrieval("vt", metric, native=1024, base=(0.0, 0.0, 0.0), ours=(0.9, 0.8, 0.7))])
    assert unknown.count("what the base cannot do at all is not known") == 1 and "†" not in unknown
    assert "not known" not in results_markdown([retrieval("vt", metric, base=(0.5, 0.0, 0.0), ours=(0.9, 0.8, 0.7))])


def test_a_checkpoint_that_fails_where_its_base_does_not_is_marked_alone() -> None:
    text = results_markdown([retrieval("needle", base=(1.0, 0.9, 0.0), ours=(0.9, 0.1, 0.7))])
    assert "| ours · yarn † |" in text and "| base · yarn |" in text and "say nothing" not in text


def test_maps_and_headline_say_it_too() -> None:
    record = sample_records.quickstart()
    for row in record.rows:
        if row["metric"] == "retrieval" and row["checkpoint"] == "base":
            row["value"] = 0.1
    assert headline(all_rows([record]), 1).tiles[-1][1].endswith("base · none below 0.25 at the native window already")
    rows = all_rows([retrieval("needle", base=(0.5, 0.1, 0.0))])
    rows = [row | {"depth": depth} for row in rows for depth in (0.0, 0.5)]
    drawing = retrieval_figure(*sections(rows, "retrieval"))
    assert drawing is not None and "base · yarn\u00a0†</text>" in drawing.svg()
    assert "fails inside its native window" in drawing.description


def test_ruler_follows_the_same_rule() -> None:
    (found,) = ruler_tables(all_rows([retrieval("vt", "string_match", base=(1.0, 0.2, 0.9))]))
    assert found.kinds[0][1].body[0][0] == "vt\u00a0†"
