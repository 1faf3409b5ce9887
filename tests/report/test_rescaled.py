"""The first figure: one checkpoint re-scaled for each window against the same weights at fixed scales."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import sample_records

from e2llm.records import Record, make_row
from e2llm.report import render_page
from e2llm.report.canvas import NARROW, WIDE
from e2llm.report.figures import rescaled_figure
from e2llm.report.lines import Line, draw_lines
from e2llm.report.palette import LIGHT
from e2llm.report.rescaled import rescaled
from e2llm.report.series import all_rows

WINDOWS = (8192, 16384, 32768)
NATIVE = 8192


def value(window: int, scale: float) -> float:
    """Lowest where the scale just covers the window, far up where it does not."""
    return 4.0 + 0.1 * scale if scale * NATIVE >= window else 50.0


def grid(checkpoint: str = "ours", kind: str = "evaluate", windows: tuple[int, ...] = WINDOWS, **more: Any) -> Record:
    about = {"base_model": "tiny", "checkpoint": checkpoint, "method": "yarn", "corpus": "novels", "protocol": "whole",
             "native_window": NATIVE} | more  # fmt: skip
    rows = [
        make_row("perplexity", value(window, scale), "ratio", 10, **about, window=window, scale=scale)
        for window in windows
        for scale in (1.0, 2.0, 4.0)
    ]
    return Record(kind, {}, rows, [], {})


def choice() -> Record:
    """Chosen: 1.5, 2.5 and 4, of which only 4 is one of the fixed ones, and not what a rule would choose."""
    about = {"base_model": "tiny", "checkpoint": "ours", "method": "yarn", "corpus": "novels", "protocol": "whole",
             "native_window": NATIVE}  # fmt: skip
    chosen = dict(zip(WINDOWS, (1.5, 2.5, 4.0), strict=True))
    rows = [
        make_row("perplexity", value(window, scale), "ratio", 10, **about, window=window, scale=scale, choice=which)
        for window in WINDOWS
        for which, scales in (("chosen", (chosen[window],)), ("fixed", (2.0, 4.0)))
        for scale in scales
    ]
    return Record("choice", {}, rows, [], {})


def drawn(found: Any) -> tuple[dict[int, float], list[float]]:
    return {window: row["scale"] for window, row in found.served.items()}, list(found.fixed)


def test_served_line_takes_the_scale_that_covers_each_window() -> None:
    found = rescaled(all_rows([grid()]))
    assert drawn(found) == ({8192: 1.0, 16384: 2.0, 32768: 4.0}, [1.0, 2.0, 4.0])


def test_served_line_of_a_choice_is_what_was_chosen() -> None:
    assert drawn(rescaled(all_rows([choice()]))) == ({8192: 1.5, 16384: 2.5, 32768: 4.0}, [2.0, 4.0])


@pytest.mark.parametrize(
    ("records", "label"),
    [
        (lambda: [grid("base"), grid("ours")], "ours · yarn"),
        (lambda: [grid("ours"), grid("recommended")], "recommended · yarn"),
        (lambda: [grid("ours", windows=WINDOWS[:2]), grid("mine")], "mine · yarn"),
        (lambda: [grid("mine", "calibrate"), grid("ours", windows=WINDOWS[:2])], "ours · yarn"),
        (lambda: [grid("mine", "calibrate")], "mine · yarn"),
    ],
)
def test_which_checkpoint_is_shown(records: Callable[[], list[Record]], label: str) -> None:
    found = rescaled(all_rows(records()))
    assert found is not None and found.label == label
    assert len({row["corpus"] for points in found.fixed.values() for row in points.values()}) == 1


@pytest.mark.parametrize(
    "record",
    [
        lambda: sample_records.quickstart(),  # one scale a window
        lambda: grid(windows=WINDOWS[:1]),
        lambda: grid(native_window=None),  # nobody knows which scale is served
    ],
)
def test_without_several_scales_the_page_is_as_before(record: Callable[[], Record]) -> None:
    assert rescaled(all_rows([record()])) is None
    assert 'id="rescaled"' not in render_page([record()])


def test_the_page_begins_with_the_figure_and_draws_these_lines_once() -> None:
    page = render_page([grid()])
    sections = re.findall(r'<section id="([^"]*)"', page)
    assert sections[:3] == ["rescaled", "perplexity", "scales"]
    assert page.count("<figure>") == 2 and page.count(">fixed at 4</text>") == 2  # both widths of one figure
    assert page.count(">scale 4</text>") == 0 and '<table class="heat">' in page


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_the_served_line_is_bold_and_the_fixed_ones_thin(width: int) -> None:
    found = rescaled(all_rows([grid()]))
    assert found is not None
    figure = rescaled_figure(found).draw(LIGHT, width)
    (axes,) = figure.axes
    widths = {tuple(line.get_ydata()): line.get_linewidth() for line in axes.lines}
    served = tuple(value(window, window / NATIVE) for window in WINDOWS)
    thin = [width for line, width in widths.items() if line != served]
    assert len(widths) == 4 and widths[served] > 2 * max(thin)


def test_a_thin_line_is_thinner_than_one_of_many() -> None:
    lines = [Line("a", (1, 2), (1, 2), ("hues", 0), thin=True), Line("b", (1, 2), (1, 3), ("hues", 1))]
    (axes,) = draw_lines(lines, LIGHT, WIDE, y_name="y", x_name="x").axes
    assert axes.lines[0].get_linewidth() < axes.lines[1].get_linewidth()
