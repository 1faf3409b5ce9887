"""What the page draws from measured rows: lines over windows, lines over steps, maps of depth and length.

Flows in: series and sections (`series.py`). Flows out: `Drawing`s; None where there is nothing to draw.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from e2llm.report.beyond import beyond_mark
from e2llm.report.canvas import SMALL, Drawing, letter, new_axes, new_figure, words, wrapped
from e2llm.report.depths import depth_maps
from e2llm.report.formats import METRIC_NAMES, format_scale, format_value, format_window, join_words, slug
from e2llm.report.lines import DASHES, MARKERS, Line, draw_lines
from e2llm.report.native import failing_note, fails
from e2llm.report.palette import NUM_STEPS, Palette
from e2llm.report.rescaled import Rescaled
from e2llm.report.series import Row, Section, Series, grid_rows, hero, series_of
from e2llm.report.shared_documents import apart_words, comparison_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


HOLLOW = "Hollow points are beyond what the checkpoint was trained for: a larger window or scale."


def perplexity_figure(section: Section, *, name: str = "perplexity") -> Drawing | None:
    """Value against window, one line a (checkpoint, method), each point at the scale that serves its window."""
    every = series_of(section)
    series = [one for one in every if len(one.points) > 1]
    if not series:
        return None
    columns = _columns([row for one in every for row in one.points.values()])
    lines: list[Line] = []
    main = hero(series)
    grey = hue = 0
    for one in series:
        if one.is_base:
            colour, dash, marker, grey = (
                ("greys", min(grey, 4)),
                DASHES[(grey + 1) % 5],
                MARKERS[(grey + 1) % 6],
                grey + 1,
            )
        elif one is main:
            colour, dash, marker = ("hues", 0), "solid", "o"
        else:
            colour, dash, marker, hue = ("hues", 1 + hue % 5), "solid", MARKERS[(hue + 1) % 6], hue + 1
        label = join_words(one.label, apart_words(one.points.values(), columns))
        lines.append(_line(label, one.points, colour, dash, marker, strong=one is main))
    return _line_chart(
        lines,
        section,
        name=name,
        title=f"{METRIC_NAMES.get(section.metric, section.metric)} against window, {section.title}",
        notes=comparison_notes(list(columns.values())),
    )


def scale_figure(section: Section, series: Series, *, name: str = "scales") -> Drawing | None:
    """Value against window for one checkpoint, one line a scale that is held fixed, of those that were read at two
    windows or more; None below two such scales."""
    rows = grid_rows(section, series)
    scales = [scale for scale, count in sorted(Counter(row["scale"] for row in rows).items()) if count > 1]
    lines = []
    for index, scale in enumerate(scales):
        points = {row["window"]: row for row in sorted(rows, key=lambda r: r["window"]) if row["scale"] == scale}
        lines.append(
            _line(f"scale {format_scale(scale)}", points, _ordinal(index, len(scales)), "solid", MARKERS[index % 6])
        )
    if len(lines) < 2:
        return None
    title = f"{METRIC_NAMES.get(section.metric, section.metric)} against window at fixed scales, {series.label}"
    return _line_chart(lines, section, name=name, title=title, notes=comparison_notes(list(_columns(rows).values())))


def rescaled_figure(found: Rescaled, *, name: str = "rescaled") -> Drawing:
    """Value against window of one checkpoint: re-scaled for each window, bold, and held at each scale, thin."""
    lines = [
        _line(f"fixed at {format_scale(scale)}", points, _ordinal(index, len(found.fixed)), "solid",
              MARKERS[(index + 1) % 6], thin=True)
        for index, (scale, points) in enumerate(found.fixed.items())
    ]  # fmt: skip
    lines.append(_line("re-scaled", found.served, ("hues", 0), "solid", "o", strong=True))
    metric = METRIC_NAMES.get(found.section.metric, found.section.metric)
    title = f"{metric} against window of {found.label}: re-scaled for each window, and at fixed scales"
    rows = [row for points in (found.served, *found.fixed.values()) for row in points.values()]
    return _line_chart(
        lines, found.section, name=name, title=title, notes=comparison_notes(list(_columns(rows).values()))
    )


def retrieval_figure(section: Section, *, name: str = "retrieval") -> Drawing | None:
    """One depth × length map a (checkpoint, method); None where no row has a depth or a single window was measured."""
    panels = [
        (one.label, {place: row["value"] for place, row in one.cells.items()}) for one in depth_maps(section)
    ]
    if not panels:
        return None
    places = {place for _, cells in panels for place in cells}
    depths, windows = sorted({depth for depth, _ in places}), sorted({window for _, window in places})

    def draw(palette: Palette, width: int) -> Figure:
        return _heat_panels(panels, depths, windows, palette, width)

    worst = "; ".join(f"{label}: lowest cell {min(cells.values()):.2f}" for label, cells in panels)
    description = f"Share of prompts answered by depth of the answer (rows) and window (columns). {worst}."
    if any(fails(one) for one in series_of(section)):
        description += f" {failing_note(section)}"
    return Drawing(name, f"Retrieval by depth and length, {section.title}", description, draw)


def training_figure(rows: Sequence[dict[str, Any]], *, name: str = "training") -> Drawing | None:
    """Loss against step for the rows of one training run: its own loss, and held-out loss at each scale."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["metric"] == "loss" and row.get("step") is not None:
            groups[str(row.get("split") or "train"), row.get("scale")].append(row)
    order = sorted(groups, key=lambda key: (key[0] != "train", key[0], key[1] or 0.0))
    scales = sorted({scale for split, scale in order if split != "train" and scale is not None})
    lines: list[Line] = []
    for split, scale in order:
        points = {row["step"]: row for row in sorted(groups[split, scale], key=lambda r: r["step"])}
        what = split.replace("_", " ") + ("" if scale is None else f" · scale {format_scale(scale)}")
        colour = (
            ("greys", 3) if split == "train" else _ordinal(scales.index(scale) if scale in scales else 0, len(scales))
        )
        marker = MARKERS[len(lines) % 6]
        lines.append(_line("training" if split == "train" else what, points, colour, "solid", marker))
    if not any(len(line.x) > 1 for line in lines):
        return None

    def draw(palette: Palette, width: int) -> Figure:
        return draw_lines(lines, palette, width, y_name="Loss, nats a token", x_name="Step", windows=False)

    ends = "; ".join(
        f"{line.label}: {line.y[0]:.3f} at step {line.x[0]}, {line.y[-1]:.3f} at step {line.x[-1]}" for line in lines
    )
    return Drawing(slug(name), "Loss against training step", f"One line each, first and last point: {ends}.", draw)


def _columns(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Window -> its rows, by window."""
    return {window: [r for r in rows if r["window"] == window] for window in sorted({row["window"] for row in rows})}


def _ordinal(index: int, count: int) -> tuple[str, int]:
    """Colour of the index-th of `count` lines that a number orders."""
    return "steps", round(index * (NUM_STEPS - 1) / max(1, count - 1))


def _line(
    label: str,
    points: dict[int, dict[str, Any]],
    colour: tuple[str, int],
    dash: Any,
    marker: str,
    *,
    strong: bool = False,
    thin: bool = False,
) -> Line:
    values = tuple(row["value"] for row in points.values())
    hollow = frozenset(x for x, row in points.items() if beyond_mark(row))
    return Line(label, tuple(points), values, colour, dash, marker, strong, thin, hollow)


def _line_chart(
    lines: Sequence[Line], section: Section, *, name: str, title: str, notes: Sequence[str] = ()
) -> Drawing:
    ends = "; ".join(
        f"{line.label}: {format_value(section.metric, line.y[0])} at {format_window(line.x[0])}, "
        f"{format_value(section.metric, line.y[-1])} at {format_window(line.x[-1])}"
        for line in lines
    )
    hollow = [HOLLOW] if any(line.hollow for line in lines) else []
    description = " ".join([f"One line each, first and last point: {ends}.", *notes, *hollow])
    metric = METRIC_NAMES.get(section.metric, section.metric)

    def draw(palette: Palette, width: int) -> Figure:
        x_name = "Window, tokens" + ("; hollow: beyond training" if hollow else "")
        return draw_lines(lines, palette, width, y_name=metric, x_name=x_name)

    return Drawing(slug(name), title, description, draw)


def _heat_panels(
    panels: Sequence[tuple[str, dict]], depths: Sequence[float], windows: Sequence[int], palette: Palette, width: int
) -> Figure:
    across = 1 if width < 500 else min(len(panels), 2 if len(windows) > 4 else 3)
    left, between, foot = 44, 36, 46
    room = (width - left * across - between * (across - 1)) / across
    names = [wrapped(label, room, strong=True) for label, _ in panels]
    head = 46 + 17 * (max(map(len, names)) - 1)
    cell = min(64.0, room / len(windows))
    row_height = max(20.0, min(30.0, cell * 0.75))
    panel_width, panel_height = cell * len(windows), row_height * len(depths)
    # A panel of few windows is narrower than its name.
    named_width = max(panel_width, min(room, max(len(text) for lines in names for text in lines) * letter(True)))
    down = math.ceil(len(panels) / across)
    figure = new_figure(width, down * (head + panel_height + foot))
    for index, (_label, cells) in enumerate(panels):
        column, row = index % across, index // across
        x, y = left + column * (named_width + left + between), head + row * (head + panel_height + foot)
        axes = new_axes(figure, palette, left=x, top=y, width=panel_width, height=panel_height)
        _heat_cells(axes, cells, depths, windows, palette, with_numbers=cell >= 30)
        for line, text in enumerate(names[index], start=1 - len(names[index])):
            words(figure, x, y - 33 + 17 * line, text, palette.ink, weight="bold")
        words(figure, x, y - 14, "Depth ↓  window →", palette.muted, size=SMALL)
    return figure


def _heat_cells(
    axes: Axes, cells: dict, depths: Sequence[float], windows: Sequence[int], palette: Palette, *, with_numbers: bool
) -> None:
    """Depth 0 (the start of the prompt) on top; a place without a row stays empty."""
    from matplotlib.patches import Rectangle

    for (depth, window), value in cells.items():
        x, y, level = windows.index(window), depths.index(depth), palette.heat_level(value)
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=palette.heat[level], edgecolor=palette.paper, linewidth=1.5))
        if with_numbers:
            text = f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"
            axes.text(
                x + 0.5, y + 0.5, text, color=palette.on_level(level), fontsize=SMALL, ha="center", va="center_baseline"
            )
    axes.set(xlim=(0, len(windows)), ylim=(len(depths), 0))
    axes.set_xticks([i + 0.5 for i in range(len(windows))], [format_window(window) for window in windows])
    axes.set_yticks([i + 0.5 for i in range(len(depths))], [f"{depth:.0%}" for depth in depths])
