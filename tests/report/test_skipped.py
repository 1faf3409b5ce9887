"""What was left out stands under the table of tasks, in every output: also a task that has no row at all."""

from __future__ import annotations

import html
from typing import Any

import pytest
from test_task_tables import ENVIRONMENT, task_row

from e2llm.records import Record
from e2llm.report import render_page, results_latex, results_markdown
from e2llm.report.series import all_rows
from e2llm.report.task_tables import task_sections

NO_FIELD = "line 1: no field 'input'; a row has input, context, answers"
SKIPPED = {"qasper": {"count": 12, "reasons": [NO_FIELD, "line 2: other"]}, "lcc": {"count": 7, "reasons": ["x: long"]}}


def record(config: dict[str, Any], *more: dict[str, Any]) -> Record:
    rows = [task_row("hotpotqa", 0.4), task_row("lcc", 0.5, "edit_similarity", skipped=7), *more]
    return Record("evaluate", config, rows, [], dict(ENVIRONMENT))


def notes(*records: Record) -> tuple[str, ...]:
    return task_sections(all_rows(records), records)[0].tables[0].notes


@pytest.mark.parametrize("render", [results_markdown, results_latex, render_page])
def test_a_task_without_a_row_is_named_with_its_counts_and_reason(render: Any) -> None:
    text = html.unescape(render([record({"skipped": SKIPPED})]))
    assert "qasper 12 of 12 (no field" in text and "lcc 7 of 207 (long)" in text
    assert "Skipped" not in render([record({"skipped": {}})])


def test_windows_that_differ_are_counted_apart() -> None:
    other = {"window": 4096, "scale": 1.0}
    found = notes(record({"skipped": SKIPPED}, task_row("lcc", 0.5, "edit_similarity", skipped=9, n=198, **other)))
    assert "lcc 7 of 207 at 16k, 9 of 207 at 4k (long)" in found[0]
    found = notes(record({"skipped": SKIPPED}, task_row("hotpotqa", 0.4, **other)))
    assert "lcc 7 of 207 at 16k, all at 4k (long)" in found[0]


def test_each_record_says_whose_it_is_and_only_its_own() -> None:
    base = [task_row("hotpotqa", 0.3, checkpoint="base", method="none")]
    other = Record("evaluate", {"skipped": {"qasper": {"count": 3, "reasons": ["a: b"]}}}, base, [], dict(ENVIRONMENT))
    assert notes(record({"skipped": SKIPPED}), other)[1] == "Skipped, base · none: qasper 3 of 3 (b)."
    leval = record({"skipped": SKIPPED})
    for row in leval.rows:
        row["suite"] = "leval"
    sections = task_sections(all_rows([leval, record({})]), [leval, record({})])
    assert [len(section.tables[0].notes) for section in sections] == [1, 0]


@pytest.mark.parametrize(
    ("absent", "text"),
    [
        (["gov_report", "qmsum"], "No data, paper · linear: gov_report; qmsum."),
        ({"wsc": "not in reach"}, "No data, paper · linear: wsc (not in reach)."),
    ],
)
def test_tasks_without_data_are_named(absent: Any, text: str) -> None:
    assert notes(record({"tasks_without_data": absent})) == (text,)


def test_a_long_reason_is_cut() -> None:
    (line,) = notes(record({"skipped": {"qasper": {"count": 1, "reasons": ["a: " + "x" * 500]}}}))
    assert len(line) < 200 and line.endswith("x…).")
