"""Line charts: several named lines over windows or steps.

Flows in: `Line`s. Flows out: a matplotlib figure, 340 pixels wide for a phone or any greater width.
A wide chart names its lines at their ends, a narrow one, or one of very long names, in a legend below. Knows no Records
and no metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from e2llm.report.canvas import letter, new_axes, new_figure, ruled, words, wrapped
from e2llm.report.formats import format_count, format_number, format_window
from e2llm.report.palette import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.8)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)))
MARKERS = "osD^vP"
_NICE = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 10)
_LABEL_GAP = 17  # pixels between two names at the ends of lines
_NARROWEST = 240  # pixels of a plot that is left beside its names; with longer names they go below
_MOST_MARKED = 24  # points; a longer line is drawn without markers
_TALLEST = 8.0  # a log axis ends at this multiple of the lowest value: what runs away must not flatten the rest


@dataclass(frozen=True)
class Line:
    """One line: its name, x and y, and how it looks. `colour`: a name of the palette, such as ("hues", 0).

    `strong`: the line that the chart is about; `thin`: one of those that it is held against.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: tuple[str, int]
    dash: Any = "solid"
    marker: str = "o"
    strong: bool = False
    thin: bool = False
    hollow: frozenset[float] = frozenset()
    """x of points with hollow markers."""


def draw_lines(
    lines: Sequence[Line], palette: Palette, width: int, *, y_name: str, x_name: str, windows: bool = True,
    ticks: Sequence[float] = (), from_zero: bool = False,
) -> Figure:
    """The chart. `windows`: x is a window in tokens, each (or each of `ticks`) marked on a log2 axis, and y may be
    logarithmic; `from_zero`: y is linear from 0, for amounts."""
    cap = _cap(lines) if windows and not from_zero else math.inf
    names = [_named(line, cap) for line in lines]
    largest = max(min(y, cap) for line in lines for y in line.y)
    left = 44 + 8 * max(0, len(f"{largest:,.0f}") - len("1,000"))  # the value axis's numbers stand in it
    beside = 36 + max(map(_name_width, names, lines))
    narrow = width < max(500, left + _NARROWEST + beside)
    right = 14 if narrow else beside
    plot_width, plot_height = width - left - right, 230 if narrow else max(300, _LABEL_GAP * (len(lines) + 1))
    below = [wrapped(name, width - 46, strong=line.strong) for line, name in zip(lines, names, strict=True)]
    figure = new_figure(width, 34 + plot_height + 52 + (_legend_height(below) + 10 if narrow else 0))
    axes = ruled(new_axes(figure, palette, left=left, top=34, width=plot_width, height=plot_height), palette)
    for line in sorted(lines, key=lambda item: item.strong):
        leaves = max(line.y) > cap
        above = 4 if line.strong else 3
        axes.plot(line.x, line.y, **_look(line, palette), zorder=above, clip_on=leaves)
        empty = [(x, y) for x, y in zip(line.x, line.y, strict=True) if x in line.hollow]
        if empty:
            look = _look(line, palette) | {"linestyle": "none", "markerfacecolor": palette.paper}
            look["markeredgecolor"] = _colour(palette, line)
            axes.plot(*zip(*empty, strict=True), **look, zorder=above + 0.5, clip_on=leaves)
    if windows:
        _window_axis(axes, sorted({x for line in lines for x in line.x}), ticks)
    else:
        _count_axis(axes, max(max(line.x) for line in lines), most=4 if narrow else 7)
    values = [min(y, cap) for line in lines for y in line.y]
    logarithmic = _value_axis(axes, values, may_be_log=windows and not from_zero)
    if from_zero:
        axes.set_ylim(0, 1.08 * max(values))
    words(figure, 0, 10, y_name + (", log scale" if logarithmic else ""), palette.muted)
    words(figure, left + plot_width / 2, 34 + plot_height + 38, x_name, palette.muted, ha="center")
    if narrow:
        for index, (line, texts) in enumerate(zip(lines, below, strict=True)):
            y = 34 + plot_height + 66 + _legend_height(below[:index])
            _stroke(figure, [(4, y), (18, y), (32, y)], **_look(line, palette), markevery=[1])
            for row, text in enumerate(texts):
                _name(figure, 42, y + _LABEL_GAP * row, text, line, palette)
    else:
        places = [axes.transData.transform(_end(line, cap)) for line in lines]
        _end_labels(figure, places, names, lines, palette, left=left + plot_width + 30, span=(34, 34 + plot_height))
    return figure


def _cap(lines: Sequence[Line]) -> float:
    """The highest value that is drawn: what runs far away leaves the chart, and its name says how far."""
    low, high = min(min(line.y) for line in lines), max(max(line.y) for line in lines)
    return low * _TALLEST if low > 0 and high > 1.5 * low * _TALLEST else math.inf


def _named(line: Line, cap: float) -> str:
    return f"{line.label} ↑ {format_number(max(line.y))}" if max(line.y) > cap else line.label


def _name_width(name: str, line: Line) -> float:
    return len(name) * letter(line.strong)


def _legend_height(names: Sequence[Sequence[str]]) -> int:
    return sum(22 + _LABEL_GAP * (len(lines) - 1) for lines in names)


def _end(line: Line, cap: float) -> tuple[float, float]:
    """The last point, or where the line leaves the chart for good."""
    if line.y[-1] <= cap:
        return line.x[-1], line.y[-1]
    for (x0, y0), (x1, y1) in reversed(list(pairwise(zip(line.x, line.y, strict=True)))):
        if y0 <= cap:
            share = math.log(cap / y0) / math.log(y1 / y0)
            return x0 * (x1 / x0) ** share, cap
    return line.x[-1], cap


def _colour(palette: Palette, line: Line) -> str:
    group, index = line.colour
    return getattr(palette, group)[index]


def _window_axis(axes: Axes, windows: Sequence[float], ticks: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks or windows, [format_window(window) for window in ticks or windows])
    axes.minorticks_off()
    margin = (windows[-1] / windows[0]) ** 0.03
    axes.set_xlim(windows[0] / margin, windows[-1] * margin)


def _count_axis(axes: Axes, last: float, *, most: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: format_count(round(value)))


def _value_axis(axes: Axes, values: Sequence[float], *, may_be_log: bool) -> bool:
    """Logarithmic if it may be and values differ by more than half, else linear around them; True if logarithmic."""
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low > 1.5:
        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** 0.08, high * (high / low) ** 0.04)
        ticks = log_ticks(*axes.get_ylim())
        axes.set_yticks(ticks, [format(tick, ",g") for tick in ticks])
        axes.minorticks_off()
        return True
    from matplotlib.ticker import MaxNLocator

    pad = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - pad, high + pad)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return False


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers within low … high, about evenly spaced on a log scale, at most `most` of them."""
    for steps in (_NICE[:-1], (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        ticks = [round(step * 10.0**exponent, 10) for exponent in exponents for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near `wanted`, at least `gap` apart, in the same order and within low … high as far as there is room.

    Neighbours that would overlap are put side by side around their common middle, so no name drifts from its line.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    clusters: list[tuple[float, list[int]]] = []
    for index in order:
        cluster = (min(max(wanted[index], low), high), [index])
        while clusters and _top(clusters[-1], gap) + gap > cluster[0] - gap * (len(cluster[1]) - 1) / 2:
            before = clusters.pop()
            members = before[1] + cluster[1]
            middle = sum(wanted[i] for i in members) / len(members)
            half = gap * (len(members) - 1) / 2
            cluster = (max(low + half, min(middle, high - half)), members)
        clusters.append(cluster)
    places = [0.0] * len(wanted)
    for middle, members in clusters:
        for rank, index in enumerate(members):
            places[index] = middle + gap * (rank - (len(members) - 1) / 2)
    return places


def _top(cluster: tuple[float, list[int]], gap: float) -> float:
    return cluster[0] + gap * (len(cluster[1]) - 1) / 2


def _end_labels(
    figure: Figure,
    ends: Sequence[Any],
    names: Sequence[str],
    lines: Sequence[Line],
    palette: Palette,
    *,
    left: float,
    span: tuple[float, float],
) -> None:
    """Each line's name right of the plot at the height of its end, with a thin leader between."""
    total_height = figure.get_size_inches()[1] * 72
    places = spread([total_height - end_y for _, end_y in ends], _LABEL_GAP, *span)
    for line, name, (end_x, end_y), y in zip(lines, names, ends, places, strict=True):
        if end_x < left - 80:  # it ends early: a sample of the line says more than a leader across the others
            _stroke(figure, [(left - 27, y), (left - 6, y)], **_look(line, palette), markevery=[])
        else:
            path = [(end_x + 6, total_height - end_y), (left - 14, total_height - end_y), (left - 4, y)]
            _stroke(figure, path, color=_colour(palette, line), linewidth=0.8, alpha=0.55)
        _name(figure, left, y, name, line, palette)


def _look(line: Line, palette: Palette) -> dict[str, Any]:
    """matplotlib's settings of a line, the same in the plot and in the legend."""
    return {
        "color": _colour(palette, line),
        "linestyle": line.dash,
        "linewidth": 2.6 if line.strong else 1.0 if line.thin else 1.7,
        "marker": line.marker if len(line.x) <= _MOST_MARKED else None,
        "markersize": 6.5 if line.strong else 4 if line.thin else 5.5,
        "markeredgecolor": palette.paper,
        "markeredgewidth": 1.1,
    }


def _stroke(figure: Figure, path: Sequence[tuple[float, float]], **look: Any) -> None:
    """A line through points counted in pixels from the figure's left top corner."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches() * 72
    figure.add_artist(Line2D([x / width for x, _ in path], [1 - y / height for _, y in path], **look))


def _name(figure: Figure, x: float, y: float, name: str, line: Line, palette: Palette) -> None:
    colour, weight = (palette.ink, "bold") if line.strong else (palette.muted, "normal")
    words(figure, x, y, name, colour, weight=weight)
