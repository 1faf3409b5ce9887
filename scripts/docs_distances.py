"""Which distances between tokens a placement trains: a table for docs/study.md, drawn from recipes alone.

Flows in: shipped recipes, whose placements are drawn. Flows out: Markdown. Nothing is measured on a model.
"""

from __future__ import annotations

import numpy as np

from e2llm.config import load_recipe
from e2llm.positions.placement import PositionSampler
from e2llm.positions.scales import ScalesConfig

SCALE, NATIVE, PARTS = 16, 8192, 8
"""Drawn at one scale, for SmolLM2's window; the target window is cut into so many equal parts."""
RECIPES = ("without-offset", "paper", "end-anchor", "pose", "jumps", "recommended-yarn", "recommended", "randpos")
DRAWS, PAIRS = 1000, 512

TEXT = """## What training sees

Two tokens of a served window of 128k stand anywhere from 1 to 131,072 positions apart. A training window has 4096
tokens, so the placement decides which of these distances are ever met. Share of pairs of ordinary tokens (the leading
four left out) by their distance, in eighths of the target window, drawn at scale 16:

{table}

Below 0.1 % is 0. `served` is a whole window of 128k: longer distances are rarer there, as fewer places have room for
them. One offset (`paper`) moves all ordinary tokens together, so that only the leading four ever stand far from the
others; an end anchor adds eighteen tokens at the far end. Jumps reach every distance, and the share of near pairs
comes nearest to a served window's; random positions have it exactly, and no neighbours. Over all scales, with the
distance in tokens across and the scale upwards, `e2llm coverage paper` and `e2llm coverage recommended` draw

![Distances and scales that the paper's recipe trains](images/coverage-paper.svg)

![Distances and scales that recommended trains](images/coverage-recommended.svg)"""


def distances_block() -> str:
    """The section."""
    head = ["placement", *(f"{i}/{PARTS}–{i + 1}/{PARTS}" for i in range(PARTS))]
    lines = [head, ["---", *["---:"] * PARTS]]
    for name in RECIPES:
        lines.append([f"`{name}`", *map(_percent, shares(name))])
    served = [(2 * (PARTS - i) - 1) / PARTS**2 for i in range(PARTS)]
    lines.append(["served", *map(_percent, served)])
    return TEXT.format(table="\n".join("| " + " | ".join(line) + " |" for line in lines))


def shares(name: str) -> np.ndarray:
    """Of the pairs of ordinary tokens that a recipe's placement makes at `SCALE`, by eighths of g * L; sums to 1."""
    recipe = load_recipe(name)
    sampler = PositionSampler(
        native_window=NATIVE,
        training_window=recipe.data.window,
        scales=ScalesConfig(distribution="fixed", max_scale=SCALE),
        placement=recipe.placement,
    )
    edges = np.linspace(0, SCALE * NATIVE, PARTS + 1)
    rng, leading = np.random.Generator(np.random.Philox(key=0)), sampler.placement.sinks
    found = np.zeros(PARTS)
    for index in range(DRAWS):
        where = sampler.draw(index).positions
        first, second = rng.integers(leading, len(where), size=(2, PAIRS))
        apart = np.abs(where[first] - where[second])
        found += np.histogram(apart[apart > 0], edges)[0]
    return found / found.sum()


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else "0"
