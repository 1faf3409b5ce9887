"""Maps of depth × window as tables: every cell with its interval, for those who hear the page or want the numbers."""

from __future__ import annotations

import re

import sample_records

from e2llm.records import Record, make_row
from e2llm.report import render_page
from e2llm.report.depths import depth_maps, depth_table
from e2llm.report.series import all_rows, sections


def test_each_cell_is_a_row_of_the_record() -> None:
    record = sample_records.needles()
    (section,) = sections(all_rows([record]), "retrieval")
    maps = depth_maps(section)
    assert [one.label for one in maps] == ["base · none", "recommended · yarn"]
    for one, checkpoint in zip(maps, ("base", "recommended"), strict=True):
        table = depth_table(section, one)
        own = [row for row in record.rows if row["checkpoint"] == checkpoint and "depth" in row]
        assert [head for head, _ in table.body] == [f"{depth}%" for depth in range(0, 101, 10)]
        expected = {(f"{row['depth']:.0%}", row["window"]): row for row in own}
        windows = sorted({row["window"] for row in own})
        for head, cells in table.body:
            for window, cell in zip(windows, cells, strict=True):
                row = expected[head, window]
                assert cell is not None and cell.text == f"{row['value']:.2f}"
                assert cell.interval == f"{row['low']:.2f}–{row['high']:.2f}"
        assert table.foot == ("prompts", ["10"] * len(windows))


def failing() -> Record:
    """Fails at its native window; one place of the longer window was not asked."""
    labels = {"base_model": "m", "checkpoint": "base", "method": "yarn", "native_window": 64, "task": "pass_key"}
    places = [(64, 0.25), (64, 0.75), (128, 0.25)]
    rows = [make_row("retrieval", 0.1, "share", 5, **labels, window=w, scale=w / 64, depth=d) for w, d in places]
    return Record("evaluate", {}, rows, [], {})


def test_what_was_not_asked_is_no_zero_and_what_fails_is_marked() -> None:
    (section,) = sections(all_rows([failing()]), "retrieval")
    (one,) = depth_maps(section)
    table = depth_table(section, one)
    assert [[cell and cell.text for cell in cells] for _, cells in table.body] == [["0.10", "0.10"], ["0.10", None]]
    assert one.label.endswith("†") and any("fails inside its native window" in note for note in table.notes)


def test_the_page_holds_them_below_the_map_and_needs_no_script() -> None:
    page = render_page([sample_records.needles()])
    assert "<script" not in page
    opened = re.findall(r"<details><summary>Every depth, with intervals</summary>(.*?)</details>", page, re.DOTALL)
    assert len(opened) == 1 and opened[0].count("<table") == 2 and opened[0].count("<h4>") == 2
    assert '<th scope="row">50%</th>' in opened[0]
    flat = [row for row in sample_records.needles().rows if row.get("depth") in (None, 0.5) and row["window"] < 5000]
    assert "Every depth" not in render_page([Record("evaluate", {}, flat, [], {})])
