"""The coverage figure: shapes are checked, empty cells stay empty, examples become strips."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest

from e2llm.report import coverage_figure, write_coverage
from e2llm.report.palette import LIGHT


def _arrays(**changes):
    grid = np.zeros((8, 4))
    grid[:, 3] = 1 / 16
    grid[:2, 0] = 1 / 4
    return {
        "distance_edges": np.linspace(0, 4096, 9),
        "scale_edges": np.linspace(1, 5, 5),
        "distance_scale": grid,
        "position_edges": np.linspace(0, 4096, 9),
        "position_counts": np.full(8, 1 / 8),
        "scale_counts": np.array([0.5, 0.0, 0.0, 0.5]),
        "native_window": 1024,
        "examples": [(1.0, np.arange(512)), (4.0, np.r_[0:4, 1000:1508])],
        **changes,
    }


def test_draws_strips_and_says_what_is_seen():
    drawing = coverage_figure(**_arrays())
    assert "31% of its cells are seen" in drawing.description  # 10 of 32
    svg = drawing.svg()
    assert {"g = 1", "g = 4", "4k"} <= set(re.findall(r">([^<>]+)</text>", svg))
    assert not re.search(r"#[0-9a-f]{6}", svg)


def test_colour_is_density_not_share():
    # two runs of equal density in cells of different width: one level, so one path
    edges = np.array([0.0, 100.0, 1100.0])
    shares = np.array([[1 / 11], [10 / 11]])
    drawing = coverage_figure(
        **_arrays(
            distance_edges=edges, scale_edges=np.array([1.0, 2.0]), distance_scale=shares, scale_counts=np.ones(1)
        )
    )
    heat = drawing.svg()
    # once in the map, in the positions above it and in the key; the eleven other levels in the key alone
    assert len(re.findall(r"fill: var\(--heat-11\)", heat)) == 3
    assert len(re.findall(r"fill: var\(--heat-5\)", heat)) == 1


@pytest.mark.parametrize("name", ["distance_scale", "position_counts", "scale_counts"])
def test_shapes_have_to_fit(name):
    with pytest.raises(ValueError, match="the edges ask for"):
        coverage_figure(**_arrays(**{name: _arrays()[name][:-1]}))


def _ticks(drawing) -> list[str]:
    figure = drawing.draw(LIGHT, 760)
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_the_scale_axis_follows_the_edges():
    integers = coverage_figure(**_arrays(scale_edges=np.array([0.5, 1.5, 2.5, 3.5, 4.5])))
    assert _ticks(integers) == ["1", "2", "3", "4"]
    geometric = coverage_figure(**_arrays(scale_edges=np.array([1.0, 2.0, 4.0, 8.0, 16.0])))
    assert _ticks(geometric) == ["1", "2", "4", "8", "16"]
    axes = geometric.draw(LIGHT, 760).axes[0]
    assert axes.get_yscale() == "log"
    x, y = axes.lines[0].get_data()
    np.testing.assert_allclose(x, 1024 * y), "the longest distance is scale times native window on any axis"


def test_leading_tokens_are_named():
    assert "other tokens" in coverage_figure(**_arrays(leading=True)).svg()
    assert "leading" not in coverage_figure(**_arrays()).svg()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_write_coverage(tmp_path, suffix):
    arrays = {key: value for key, value in _arrays().items() if key != "examples"}
    draws = [SimpleNamespace(scale=scale, positions=positions) for scale, positions in _arrays()["examples"]]
    path = tmp_path / f"cover.{suffix}"
    found = write_coverage(SimpleNamespace(**arrays, leading_distance=np.ones(8) / 8, examples=draws), "paper", path)
    assert found == path and [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == "png":
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        assert "paper: what training sees" in path.read_text() and "leading tokens" in path.read_text()


def test_write_coverage_refuses_other_formats(tmp_path):
    arrays = SimpleNamespace(**_arrays(examples=()), leading_distance=np.zeros(8))
    with pytest.raises(ValueError, match=r"saved as \.svg or \.png"):
        write_coverage(arrays, "paper", tmp_path / "cover.jpg")


def test_without_examples():
    assert "Example" not in coverage_figure(**_arrays(examples=())).svg()
