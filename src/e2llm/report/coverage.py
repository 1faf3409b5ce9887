"""The coverage of a recipe, drawn: the positions, distances and scales its draws show (paper, Figs. 2 and 3).

Flows in: histograms and a few draws as plain arrays. Flows out: a `Drawing`. Knows no sampler and no recipe.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2llm.report.canvas import SMALL, Drawing, new_axes, new_figure, words
from e2llm.report.formats import format_scale, format_window, slug
from e2llm.report.palette import HEAT_LEVELS, Palette

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DECADES = 4.0  # shares this many powers of ten below the largest are as pale as it gets


def coverage_figure(
    *,
    distance_edges: np.ndarray,
    scale_edges: np.ndarray,
    distance_scale: np.ndarray,
    position_edges: np.ndarray,
    position_counts: np.ndarray,
    scale_counts: np.ndarray,
    native_window: int,
    examples: Sequence[tuple[float, np.ndarray]] = (),
    leading: bool = False,
    title: str = "What training sees",
    name: str = "coverage",
) -> Drawing:
    """Heat map of distance × scale with the positions above, the scales beside and example draws below.

    distance_edges (N+1,) and position_edges (P+1,): tokens, before division by the scale; scale_edges (M+1,): ratios,
    drawn on a logarithmic axis where their ratios are equal. distance_scale (N, M): share of token pairs;
    position_counts (P,) and scale_counts (M,): shares. examples: (scale, positions (T,) in tokens), one strip each.
    leading: the first tokens stay where they are, so a token's position is its distance from them, and the pairs are
    those of the other tokens. ValueError if the shapes do not fit.
    """
    shape = (len(distance_edges) - 1, len(scale_edges) - 1)
    sizes = (len(position_edges) - 1, len(scale_edges) - 1)
    if distance_scale.shape != shape or (len(position_counts), len(scale_counts)) != sizes:
        raise ValueError(
            f"distance_scale has shape {distance_scale.shape}, position_counts {len(position_counts)} and scale_counts "
            f"{len(scale_counts)} entries: the edges ask for {shape}, {sizes[0]} and {sizes[1]}"
        )

    def draw(palette: Palette, width: int) -> Figure:
        import numpy as np

        narrow = width < 500
        left, right, top, gap = (44, 58, 100, 12) if narrow else (60, 110, 100, 14)
        plot_width, plot_height = width - left - right - gap, 220 if narrow else 300
        strips_top = top + plot_height + (106 if narrow else 92)
        figure = new_figure(width, strips_top + (17 * len(examples) + 38 if examples else -16))
        place = {"left": left, "width": plot_width}
        heat = new_axes(figure, palette, top=top, height=plot_height, **place)
        _heat(heat, distance_edges, scale_edges, distance_scale, native_window, palette)
        above = new_axes(figure, palette, top=top - gap - 16, height=16, sharex=heat, **place)
        _cells(above, position_edges, np.array([0.0, 1.0]), position_counts[:, None], palette)
        above.set(ylim=(0, 1), yticks=[])
        above.tick_params(labelbottom=False)
        side = new_axes(
            figure, palette, left=left + plot_width + gap, top=top, width=right - 6, height=plot_height, sharey=heat
        )
        side.stairs(scale_counts, scale_edges, fill=True, color=palette.greys[3], orientation="horizontal")
        side.set(xlim=(0, max(scale_counts) * 1.05), xticks=[])
        if _is_geometric(scale_edges):
            heat.set_yscale("log")
        marks = _scale_ticks(scale_edges)
        heat.set_yticks(marks, [format_scale(mark) for mark in marks])
        heat.set_yticks([], minor=True)
        side.tick_params(labelleft=False)
        reach = max(distance_edges[-1], position_edges[-1])
        ticks = _token_ticks(reach, 4 if narrow else 8)
        heat.set_xticks(ticks, [format_window(tick) for tick in ticks])
        heat.set_xlim(0, reach)
        words(figure, 8, 18, title, palette.ink, weight="bold")
        words(figure, left, top - gap - 30, _position_words(leading, narrow), palette.muted)
        words(figure, left + plot_width + gap, top - 12, "Scales", palette.muted)
        words(figure, 8, top - 12, "Scale", palette.muted)
        pair = "Distance between two other tokens" if leading else "Distance between two tokens"
        words(figure, left, top + plot_height + 36, f"{pair}, in tokens", palette.muted)
        ramp = (left, top + plot_height + 58) if narrow else (left + plot_width - 165, top + plot_height + 36)
        _ramp_key(figure, *ramp, palette)
        if examples:
            words(figure, left, strips_top - 14, "Example windows: where their tokens stand", palette.muted)
            axes = new_axes(figure, palette, top=strips_top, height=17 * len(examples), **place)
            _strips(axes, examples, native_window, reach, ticks, palette)
        return figure

    seen = float((distance_scale > 0).mean())
    description = (
        f"Heat map of the share of token pairs by distance (0 to {format_window(distance_edges[-1])} tokens) and scale "
        f"({format_scale(float(scale_edges[0]))} to {format_scale(float(scale_edges[-1]))}); {seen:.0%} of its cells "
        "are seen. The dashed line is scale times native window, the longest distance at inference."
    )
    return Drawing(slug(name), title, description, draw)


def write_coverage(coverage: Any, name: str, path: str | os.PathLike[str]) -> Path:
    """Draw `coverage`, of the recipe `name`, into `path` (.png or .svg).

    `coverage` has the fields of `positions.coverage.Coverage`, which this module does not import.
    """
    drawing = coverage_figure(
        distance_edges=coverage.distance_edges,
        scale_edges=coverage.scale_edges,
        distance_scale=coverage.distance_scale,
        position_edges=coverage.position_edges,
        position_counts=coverage.position_counts,
        scale_counts=coverage.scale_counts,
        native_window=coverage.native_window,
        examples=[(one.scale, one.positions) for one in coverage.examples],
        leading=bool(coverage.leading_distance.sum() > 0),
        title=f"{name}: what training sees",
        name=f"coverage-{name}",
    )
    return drawing.save(path)


def _heat(
    axes: Axes, distances: np.ndarray, scales: np.ndarray, shares: np.ndarray, native: int, palette: Palette
) -> None:
    """The cells, and the longest distance that each scale serves."""
    import numpy as np

    _cells(axes, distances, scales, shares, palette)
    served = np.linspace(scales[0], scales[-1], 64)  # a curve where the axis is logarithmic
    axes.plot(native * served, served, color=palette.ink, linewidth=1, dashes=(4, 3))
    axes.text(0.985, 0.03, "dashed: scale × native window", transform=axes.transAxes, color=palette.muted,
              fontsize=SMALL, ha="right", va="bottom", parse_math=False)  # fmt: skip
    axes.set(xlim=(0, distances[-1]), ylim=(scales[0], scales[-1]))
    for name in ("left", "bottom"):
        axes.spines[name].set(visible=True, color=palette.rule, linewidth=1)


def _cells(axes: Axes, distances: np.ndarray, scales: np.ndarray, shares: np.ndarray, palette: Palette) -> None:
    """Cells by logarithm of density (share a token of distance and unit of height); what is never seen stays empty."""
    import numpy as np
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    heights = np.diff(np.log(scales)) if _is_geometric(scales) else np.diff(scales)
    density = shares / np.outer(np.diff(distances), heights)
    with np.errstate(divide="ignore"):
        depth = np.log10(density / density.max())
    levels = np.clip(((1 + depth / _DECADES) * HEAT_LEVELS), 0, HEAT_LEVELS - 1)
    levels = np.where(density > 0, levels, -1).astype(int)
    rectangles: dict[int, list[Outline]] = {}
    for column in range(len(scales) - 1):  # runs of one level become one rectangle: a small file without seams
        starts = [0, *(np.flatnonzero(np.diff(levels[:, column])) + 1), len(distances) - 1]
        for start, end in pairwise(starts):
            corners = [(distances[start], scales[column]), (distances[end], scales[column])]
            corners += [(distances[end], scales[column + 1]), (distances[start], scales[column + 1])]
            rectangles.setdefault(int(levels[start, column]), []).append(Outline([*corners, corners[0]], closed=True))
    for level, paths in sorted(rectangles.items()):
        if level >= 0:
            shape = Outline.make_compound_path(*paths)
            axes.add_patch(
                PathPatch(shape, facecolor=palette.heat[level], edgecolor=palette.heat[level], linewidth=0.4)
            )


def _is_geometric(edges: np.ndarray) -> bool:
    import numpy as np

    return len(edges) > 2 and edges[0] > 0 and np.allclose(edges[1:] / edges[:-1], edges[1] / edges[0])


def _scale_ticks(edges: np.ndarray) -> list[float]:
    """1 and a few round scales up to the largest: multiples, or powers of two on a logarithmic axis."""
    import numpy as np

    top = float(edges[-1])
    if _is_geometric(edges):
        return [float(2**k) for k in range(int(np.log2(top) + 1e-9) + 1)]
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, top) if top / s <= 8 or s is top)
    return [1.0, *(float(k) for k in np.arange(step, top + 1e-9, step) if k > 1)]


def _position_words(leading: bool, narrow: bool) -> str:
    if not leading:
        return "Positions drawn"
    return "Positions = distances from the start" if narrow else "Positions drawn = distances from the leading tokens"


def _strips(
    axes: Axes,
    examples: Sequence[tuple[float, np.ndarray]],
    native: int,
    reach: float,
    ticks: Sequence[float],
    palette: Palette,
) -> None:
    """One row an example: a bar for each run of neighbouring positions, on a rule of the length its scale can serve."""
    import numpy as np

    hair = reach / 400  # a run of four tokens is still to be seen
    for row, (scale, positions) in enumerate(examples):
        where = np.sort(np.asarray(positions))
        cuts = np.flatnonzero(np.diff(where) > max(2, reach / 2000)) + 1
        runs = [(float(run[0]), float(run[-1])) for run in np.split(where, cuts)]
        axes.plot([0, min(scale * native, reach)], [row + 0.5, row + 0.5], color=palette.rule, linewidth=1, zorder=1)
        axes.broken_barh(
            [(start, max(end - start, hair)) for start, end in runs],
            (row + 0.22, 0.56),
            facecolor=palette.hues[0],
            linewidth=0,
        )
        axes.text(1.015, row + 0.5, f"g = {scale:.3g}", transform=axes.get_yaxis_transform(), color=palette.muted,
                  fontsize=SMALL, va="center", parse_math=False)  # fmt: skip
    axes.set(xlim=(0, reach), ylim=(len(examples), 0), yticks=[])
    axes.set_xticks(ticks, [format_window(tick) for tick in ticks])


def _ramp_key(figure: Figure, x: float, y: float, palette: Palette) -> None:
    """The heat levels side by side between "fewer" and "more", 165 pixels wide from x on."""
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches() * 72
    words(figure, x + 36, y, "fewer", palette.muted, size=SMALL, ha="right")
    for level, colour in enumerate(palette.heat):
        place = ((x + 42 + 7 * level) / width, 1 - (y + 5) / height)
        figure.add_artist(Rectangle(place, 7 / width, 10 / height, facecolor=colour, linewidth=0))
    words(figure, x + 48 + 7 * len(palette.heat), y, "more", palette.muted, size=SMALL)


def _token_ticks(reach: float, most: int) -> list[float]:
    """0 and multiples of a power of two up to `reach`, at most `most` steps."""
    import numpy as np

    step = 2.0 ** np.ceil(np.log2(max(reach, 1) / most))
    return [float(tick) for tick in np.arange(0, reach * (1 + 1e-9), step)]
