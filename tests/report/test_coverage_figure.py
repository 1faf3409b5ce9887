"""The coverage figure: shapes are checked, empty cells stay empty, examples become strips."""

from __future__ import annotations

import re

import numpy as np
import pytest

from e2llm.report import coverage_figure


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
    # once in the map, once in the key; the eleven other levels in the key alone
    assert len(re.findall(r"fill: var\(--heat-11\)", heat)) == 2
    assert len(re.findall(r"fill: var\(--heat-5\)", heat)) == 1


@pytest.mark.parametrize("name", ["distance_scale", "position_counts", "scale_counts"])
def test_shapes_have_to_fit(name):
    with pytest.raises(ValueError, match="the edges ask for"):
        coverage_figure(**_arrays(**{name: _arrays()[name][:-1]}))


def test_without_examples():
    assert "Example" not in coverage_figure(**_arrays(examples=())).svg()
