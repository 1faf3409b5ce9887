"""Figures: what is drawn, that inline SVG is safe in a page, and that the same input gives the same bytes."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import pytest
import sample_records
from matplotlib.backends.backend_agg import FigureCanvasAgg

from e2llm.records import Record, make_row
from e2llm.report import perplexity_figure, retrieval_figure, scale_figure, training_figure
from e2llm.report.canvas import NARROW, WIDE
from e2llm.report.lines import Line, draw_lines, log_ticks, spread
from e2llm.report.palette import LIGHT
from e2llm.report.series import all_rows, grid_rows, sections, series_of

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def rows():
    return all_rows([sample_records.study(), sample_records.training()])


@pytest.fixture(scope="module")
def drawings(rows):
    (perplexity,) = sections(rows, "perplexity")
    (retrieval,) = sections(rows, "retrieval")
    extended = series_of(perplexity)[-1]
    losses = [row for row in rows if row["metric"] == "loss"]
    return {
        "perplexity": perplexity_figure(perplexity),
        "scales": scale_figure(perplexity, extended),
        "retrieval": retrieval_figure(retrieval),
        "training": training_figure(losses),
    }


@pytest.fixture(scope="module")
def svgs(drawings):
    """All figures at both widths, drawn once: (name, width) -> inline SVG."""
    return {(name, width): drawing.svg(width) for name, drawing in drawings.items() for width in (WIDE, NARROW)}


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", ["perplexity", "scales", "retrieval", "training"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_inline_svg_is_well_formed_and_self_contained(svgs, name, width):
    svg = svgs[name, width]
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    title, description = root[0], root[1]
    assert (title.tag, description.tag) == (f"{SVG}title", f"{SVG}desc")
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(set(ids)) == len(ids)
    assert all(found.startswith(f"{name}-{width}-") for found in ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= set(ids)
    assert not re.search(r"#[0-9a-f]{6}", svg), "every colour follows the page"
    assert "<style" not in svg and "font-family" not in svg and "http" not in svg.split(">", 1)[1]


def test_ids_differ_between_figures_and_widths(svgs):
    ids = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in svgs.values()]
    assert sum(map(len, ids)) == len(set().union(*ids))


def test_same_bytes_again_and_no_global_state(drawings, svgs):
    before = dict(matplotlib.rcParams)
    assert drawings["scales"].svg() == svgs["scales", WIDE]
    assert dict(matplotlib.rcParams) == before
    code = "import sys, e2llm.report.lines as l, e2llm.report.palette as p\n"
    code += "f = l.draw_lines([l.Line('a', (1, 2), (1, 2), ('hues', 0))], p.LIGHT, 700, y_name='y', x_name='x')\n"
    code += "print('matplotlib.pyplot' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_perplexity_figure_names_lines_and_windows(drawings, svgs):
    found = texts(svgs["perplexity", WIDE])
    assert {"4k", "8k", "128k", "recommended · yarn", "paper · linear", "base · ntk"} <= set(found)
    assert "base · none ↑ 244" in found  # leaves the chart, and says how far
    assert "recommended · yarn: 5.18 at 4k, 4.38 at 128k" in drawings["perplexity"].description


def test_scale_figure_has_a_line_a_scale(svgs):
    assert [text for text in texts(svgs["scales", WIDE]) if text.startswith("scale ")] == [
        f"scale {scale}" for scale in (1, 2, 4, 8, 16)
    ]


def test_scales_read_at_one_window_alone_are_no_lines():
    """A calibration tries other scales at each window: dots side by side say nothing that its table does not."""
    labels = {"base_model": "b", "checkpoint": "ours", "method": "yarn", "native_window": 512}
    places = [(1024, 1.5), (1024, 2.0), (2048, 3.0), (2048, 4.0)]
    rows = [make_row("perplexity", 3.0, "ratio", 1, window=w, scale=s, **labels) for w, s in places]
    (section,) = sections(all_rows([Record("evaluate", {}, rows, [], {})]), "perplexity")
    (series,) = series_of(section)
    assert len(grid_rows(section, series)) == 4 and scale_figure(section, series) is None
    rows += [make_row("perplexity", 3.0, "ratio", 1, window=w, scale=s, **labels) for w, s in ((2048, 1.5), (2048, 2))]
    (section,) = sections(all_rows([Record("evaluate", {}, rows, [], {})]), "perplexity")
    found = scale_figure(section, series_of(section)[0])
    assert found is not None and "scale 1.5: " in found.description and "scale 3" not in found.description


def test_retrieval_figure_draws_each_cell(svgs, rows):
    numbers = [text for text in texts(svgs["retrieval", WIDE]) if re.fullmatch(r"1|\.\d\d", text)]
    assert len(numbers) == len([row for row in rows if row["metric"] == "retrieval" and "depth" in row])


def test_training_figure_has_training_and_held_out(svgs):
    assert {"training", "held out · scale 1", "held out · scale 16"} <= set(texts(svgs["training", WIDE]))


def test_nothing_to_draw():
    row = make_row("perplexity", 3.0, "ratio", 1, window=512, checkpoint="base", method="none", scale=1.0)
    (section,) = sections(all_rows([Record("evaluate", {}, [row], [], {})]), "perplexity")
    (series,) = series_of(section)
    assert perplexity_figure(section) is None
    assert scale_figure(section, series) is None
    assert grid_rows(section, series) == []
    assert retrieval_figure(section) is None
    assert training_figure([make_row("loss", 1.0, "nats", 1, step=1)]) is None


def test_text_of_records_is_escaped_in_svg():
    rows = [
        make_row("perplexity", 3.0, "ratio", 1, window=w, checkpoint="<script>$x^2$&", method="yarn", scale=1.0)
        for w in (512, 1024)
    ]
    (section,) = sections(all_rows([Record("evaluate", {}, rows, [], {})]), "perplexity")
    svg = perplexity_figure(section).svg()
    assert "<script" not in svg
    assert "<script>$x^2$& · yarn" in texts(svg)  # and no formula is made of it


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([50], [50]),
        ([50, 80], [50, 80]),
        ([50, 50], [45, 55]),
        ([55, 50, 90], [57.5, 47.5, 90]),
        ([0, 1, 2], [0, 10, 20]),
        ([100, 99, 50], [100, 90, 50]),
        ([50, 55, 62], [45.666667, 55.666667, 65.666667]),
    ],
)
def test_spread(wanted, expected):
    assert spread(wanted, 10, 0, 100) == pytest.approx(expected)


def test_spread_keeps_gap_and_order():
    wanted = [12.0, 3.0, 3.1, 60.0, 59.0, 61.0, 100.0, 98.0]
    places = spread(wanted, 10, 0, 100)
    assert sorted(range(8), key=wanted.__getitem__) == sorted(range(8), key=places.__getitem__)
    assert min(b - a for a, b in pairwise(sorted(places))) >= 10 - 1e-9
    assert 0 <= min(places) and max(places) <= 100


@pytest.mark.parametrize(("low", "high"), [(3.5, 300), (80, 180), (1.01, 1.7), (4, 9), (900, 1e6)])
def test_log_ticks(low, high):
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)


def test_an_amount_is_drawn_from_zero() -> None:
    """Linear, and whole: gigabytes that differ by a third or by fifteen times."""
    for high in (135.0, 1500.0):
        lines = [Line("a", (4096.0, 8192.0), (95.0, high), ("hues", 0))]
        (axes,) = draw_lines(lines, LIGHT, 760, y_name="GB", x_name="x", from_zero=True).axes
        assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0 < high < axes.get_ylim()[1]


def test_names_at_line_ends_do_not_overlap():
    lines = [Line(f"line {i}", (512, 8192), (50.0, 40 + i * 0.1), ("hues", i % 6)) for i in range(8)]
    figure = draw_lines(lines, LIGHT, 760, y_name="y", x_name="x")
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts if text.get_text().startswith("line")]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert max(box.x1 for box in boxes) <= 760


LONG = "recommended_with_everything_that_the_study_of_planted_facts_added"


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_very_long_names_stay_in_the_figure(width):
    rows = [
        make_row("retrieval", 0.5, "share", 9, window=w, checkpoint=name, method="yarn", scale=1.0, depth=depth)
        for w in (512, 1024) for name in (LONG, LONG + "_again") for depth in (0.0, 0.5)
    ]  # fmt: skip
    (section,) = sections(all_rows([Record("evaluate", {}, rows, [], {})]), "retrieval")
    lines = [Line(LONG + more, (512, 8192), (50.0, 60.0), ("hues", 1), strong=not more) for more in ("", "_again")]
    for figure in (
        draw_lines(lines, LIGHT, width, y_name="y", x_name="x"),
        retrieval_figure(section).draw(LIGHT, width),
    ):
        said = "".join(text.get_text() for text in figure.texts)
        assert said.count(LONG) == said.replace(" ", "").count(LONG + "_again") + 1 == 2  # whole, over several lines
        named = [text for text in figure.texts if "_" in text.get_text()]
        # By the width that names are laid out with: fonts differ between machines.
        assert all(text.get_position()[0] * width + 7.7 * len(text.get_text()) <= width for text in named)
        assert all(0 < text.get_position()[1] < 1 for text in figure.texts)


@pytest.mark.parametrize("dark", [False, True])
def test_save(drawings, tmp_path, dark):
    png = drawings["scales"].save(tmp_path / "new" / "scales.png", dark=dark)
    assert png.read_bytes().startswith(b"\x89PNG")
    svg = drawings["scales"].save(tmp_path / "new" / "scales.svg", dark=dark).read_text()
    assert "var(" not in svg and ElementTree.fromstring(svg) is not None
    assert sorted(path.name for path in png.parent.iterdir()) == ["scales.png", "scales.svg"]
    with pytest.raises(ValueError, match="saved as"):
        drawings["scales"].save(tmp_path / "scales.pdf")
