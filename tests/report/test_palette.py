"""Colours can be read and told apart: WCAG contrast, and distance under simulated colour-vision deficiency."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from e2llm.report.palette import DARK, HEAT_LEVELS, LIGHT

# Machado, Oliveira, Fernandes 2009, severity 1.0, on linear RGB
DEFICIENCIES = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
PALETTES = pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])


def linear(colour: str) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@PALETTES
def test_text_contrast(palette):
    for ground in (palette.paper, palette.panel):
        assert contrast(palette.ink, ground) >= 7
        assert contrast(palette.muted, ground) >= 4.5
        assert contrast(palette.hues[0], ground) >= 4.5  # links and best values


@PALETTES
def test_numbers_on_heat(palette):
    for level in range(HEAT_LEVELS):
        assert contrast(palette.on_level(level), palette.heat[level]) >= 4.5, level


@PALETTES
def test_lines_stand_out(palette):
    for colour in (*palette.hues, *palette.greys, *palette.steps):
        assert contrast(colour, palette.paper) >= 3, colour


@PALETTES
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_hues_differ_for_everyone(palette, deficiency):
    seen = [lab(np.array(DEFICIENCIES[deficiency]) @ linear(colour)) for colour in palette.hues[:4]]
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(one - other) > 11


@PALETTES
def test_colours_are_different_from_each_other(palette):
    colours = list(palette.names().values())
    assert len(set(colours)) == len(colours)


def test_both_palettes_have_the_same_names():
    assert LIGHT.names().keys() == DARK.names().keys()
