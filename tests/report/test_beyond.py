"""Values beyond a checkpoint's training are marked in every table that shows them, and the mark is explained."""

from __future__ import annotations

from typing import Any

import pytest

from e2llm.records import Record, make_row
from e2llm.report import perplexity_figure, perplexity_table
from e2llm.report.attention import METRICS, attention_tables
from e2llm.report.canvas import WIDE
from e2llm.report.choice import choice_tables
from e2llm.report.context import metric_tables, position_sections, position_table
from e2llm.report.palette import LIGHT
from e2llm.report.ruler import ruler_tables
from e2llm.report.series import all_rows, sections, series_of
from e2llm.report.tables import Table, scale_table
from e2llm.report.task_tables import task_sections

NOTE = "\n# beyond what the checkpoint was trained for: a larger window or scale.\n"


def rows_of(metric: str, **more: Any) -> list[dict[str, Any]]:
    """512 inside the range, 1024 beyond it."""
    labels = {"base_model": "tiny", "checkpoint": "mine", "method": "yarn", "native_window": 64, "corpus": "noise"}
    labels |= {name: value for name, value in more.items() if name != "share"}
    value = 0.5 if "share" in more else 1.0
    inside, beyond = (make_row(metric, value, "share", 5, window=w, scale=w / 64, **labels) for w in (512, 1024))
    return [inside, beyond | {"beyond_trained": True}]


def record(rows: list[dict[str, Any]]) -> list[Record]:
    return [Record("evaluate", {}, rows, [], {})]


def marked(table: Table) -> list[str]:
    """What stands in the cells, where the note is beneath."""
    assert NOTE in table.markdown() and "beyond what the checkpoint" in table.html() and "<sup>#</sup>" in table.html()
    return [cell.text + cell.mark for _, cells in table.body for cell in cells if cell is not None]


def test_a_table_of_windows() -> None:
    table = perplexity_table(record(rows_of("perplexity")))
    assert "| mine · yarn | 1.00 | 1.00# |" in table and NOTE in table
    inside = perplexity_table(record(rows_of("perplexity")[:1]))
    assert "#" not in inside


def test_the_label_makes_no_line_of_its_own() -> None:
    """The same checkpoint measured twice, once by a version that did not mark: told apart by file alone."""
    new = rows_of("perplexity")[1:]
    old = [{k: v for k, v in row.items() if k != "beyond_trained"} for row in new]
    (section,) = sections(all_rows([*record(new), *record(old)]), "perplexity")
    assert all("beyond" not in one.label for one in series_of(section)) and len(series_of(section)) == 2


def test_a_grid_of_scales() -> None:
    rows = [row | {"scale": scale} for row in rows_of("perplexity") for scale in (8.0, 16.0)]
    (section,) = sections(all_rows(record(rows)), "perplexity")
    table = scale_table(section, series_of(section)[0])
    assert table is not None and marked(table) == ["1.00", "1.00#"] * 2


def test_points_of_a_chart_are_hollow_and_the_axis_says_why() -> None:
    figures = [
        perplexity_figure(*sections(all_rows(record(rows)), "perplexity"))
        for rows in (rows_of("perplexity"), [row | {"beyond_trained": False} for row in rows_of("perplexity")])
    ]
    beyond, inside = (figure for figure in figures if figure is not None)
    assert "hollow: beyond training" in beyond.svg() and "Hollow points" in beyond.description
    assert "hollow" not in inside.svg().lower()
    shown = beyond.draw(LIGHT, WIDE)
    whole, empty = shown.axes[0].get_lines()
    assert list(whole.get_xdata()) == [512, 1024] and list(empty.get_xdata()) == [1024]
    assert empty.get_markerfacecolor() == LIGHT.paper


@pytest.mark.parametrize("kind", ["ruler", "context", "position", "choice", "attention", "tasks"])
def test_the_other_tables(kind: str) -> None:
    if kind == "ruler":
        (found,) = ruler_tables(all_rows(record(rows_of("string_match", task="vt", protocol="ruler", share=1))))
        assert marked(found.means) == marked(found.kinds[0][1]) == ["0.50", "0.50#"]
    elif kind == "context":
        ((_, table),) = metric_tables(all_rows(record(rows_of("key_perplexity"))), "key_perplexity")
        assert marked(table) == ["1.00", "1.00#"]
    elif kind == "position":
        rows = [row | {"position": row["window"] - 1} for row in rows_of("loss")]
        (section,) = position_sections(all_rows(record(rows)))
        assert marked(position_table(section)) == ["1.00", "1.00#"]
    elif kind == "choice":
        rows = [row | {"choice": "chosen"} for row in rows_of("perplexity")]
        ((_, table),) = choice_tables(all_rows(record(rows)))
        assert marked(table) == ["1.00", "1.00#"]
    elif kind == "attention":
        rows = [row for metric in METRICS for row in rows_of(metric, share=1)]
        ((_, table),) = attention_tables(all_rows(record(rows)))
        assert marked(table)[-1].endswith("#") and not marked(table)[0].endswith("#")
    else:
        rows = rows_of("accuracy", suite="leval", task="coursera", share=1)
        (found,) = task_sections(all_rows(record(rows)))
        assert marked(found.tables[0]) == ["50.0", "50.0#"]
