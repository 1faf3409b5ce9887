"""Attention maps: where the answer looks, by layer over the prompt; which heads look at the value, and which copied it.

Flows in: Records with `attention_map` examples and `attention_…` rows. Flows out: drawings and a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from e2llm.records import INTERVAL_FIELDS, ROW_FIELDS, Record
from e2llm.report.beyond import beyond_mark, beyond_notes
from e2llm.report.canvas import SMALL, Drawing, new_axes, new_figure, words
from e2llm.report.formats import format_window, join_words, slug
from e2llm.report.palette import Palette
from e2llm.report.series import Row, sections
from e2llm.report.tables import Cell, Table, interval_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = {
    "attention_on_span": "asked value",
    "attention_on_others": "on another value",
    "attention_if_even": "even spread",
    "attention_of_best_head": "best head",
    "retrieval_heads": "retrieval heads",
}
FLOOR = -4.0
"""log10 of the share that is drawn as nothing: one ten-thousandth."""


def attention_tables(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """(title, one row a window, one column a number)."""
    found = []
    for section in sections(rows, "attention_on_span"):
        names = list(dict.fromkeys(_label(row) for row in section.rows))
        for name in names:
            own = sorted((row for row in section.rows if _label(row) == name), key=lambda r: (r["window"], r["scale"]))
            body = [
                (f"{format_window(r['window'])} at scale {r['scale']:g}, n = {r['n']}", list(_cells(rows, r)))
                for r in own
            ]
            title = join_words(name, section.title, section.base_model)
            head = ["window", *METRICS.values()]
            found.append((title, Table(f"Attention, {title}", head, body, notes=beyond_notes([own]))))
    return found


def _cells(rows: Sequence[Row], span: Row) -> Iterator[Cell | None]:
    same = {k: v for k, v in span.items() if k not in (*ROW_FIELDS, *INTERVAL_FIELDS)}
    for metric in METRICS:
        row = next((r for r in rows if r["metric"] == metric and all(r.get(k) == v for k, v in same.items())), None)
        if row is None:
            yield None
        else:
            form = "{:.0f}".format if metric == "retrieval_heads" else "{:.2%}".format
            ends, mark = interval_text(row, form), beyond_mark(row)
            yield Cell(form(row["value"]), note=f"n = {row['n']}", interval=ends, mark=mark)


def _label(row: Row) -> str:
    return " · ".join(str(row[k]) for k in ("checkpoint", "method") if row.get(k))


def attention_figures(records: Sequence[Record], sources: Sequence[str]) -> list[tuple[str, Drawing]]:
    """(heading, drawing): for each window a map of layers × prompt, and two of layers × heads: who looks at the asked
    value, and who copies it."""
    found = []
    for record, source in zip(records, sources, strict=True):
        label = " · ".join(str(record.config.get(k)) for k in ("checkpoint", "method") if record.config.get(k))
        for example in record.examples:
            if example.get("metric") == "attention_map":
                where = f"{format_window(example['window'])} at scale {example['scale']:g}"
                heading = join_words(label, str(example["corpus"]), where)
                found.append((heading, _drawing(example, heading, slug("attention", source, example["corpus"], where))))
    return found


def _drawing(example: dict[str, Any], heading: str, name: str) -> Drawing:
    looked, copied = _most(example["on_span"]), _most(example["head_score"])
    start, _end = example["spans"][0]
    description = (
        f"First: share of the answer's attention on each of {example['stretches']} stretches of the prompt, one row a "
        f"layer, darker is more, on a log scale from 0.01 %; the asked value stands {start:.0%} into it. Second: share "
        f"of each head's attention on the asked value, on the same scale; most by {looked}. Third: share of the value "
        f"that each head copied; most by {copied}."
    )

    def draw(palette: Palette, width: int) -> Figure:
        return _draw(example, palette, width)

    return Drawing(name, f"Attention of the answer, {heading}", description, draw)


def _most(by_head: list[list[float]]) -> str:
    value, layer, head = max((v, layer, head) for layer, row in enumerate(by_head) for head, v in enumerate(row))
    return f"head {head} of layer {layer}, {value:.2f}"


def _draw(example: dict[str, Any], palette: Palette, width: int) -> Figure:
    """The prompt's map and two of layers × heads: beside it, on a narrow page beneath it."""
    by_stretch = example["by_stretch"]
    layers, left, gap, head, foot = len(by_stretch), 36, 34, 40, 34
    height = max(120.0, min(300.0, 11.0 * layers))
    narrow = width < 500
    main = width - left - 10.0 if narrow else (width - left - 2 * gap) * 0.56
    side = (width - left - gap - 10) / 2 if narrow else (width - left - 2 * gap - main - 10) / 2
    second = head + height + foot
    figure = new_figure(width, second + (second if narrow else 0))
    axes = new_axes(figure, palette, left=left, top=head, width=main, height=height)
    _cells_of(axes, [[_level(value, palette) for value in row] for row in by_stretch], palette)
    for index, (start, end) in enumerate(example["spans"]):
        x = (start + end) / 2 * len(by_stretch[0])
        colour = palette.hues[1] if index == 0 else palette.muted
        axes.plot([x], [1.05], marker="v", color=colour, markersize=9 if index == 0 else 6, clip_on=False,
                  transform=axes.get_xaxis_transform(), linestyle="none")  # fmt: skip
    axes.set_xticks([0, len(by_stretch[0]) / 2, len(by_stretch[0])], ["start", "middle", "end"])
    axes.set_yticks([0.5, layers - 0.5], ["0", str(layers - 1)])
    words(figure, 0, 10, "Layer ↓ place in the prompt →" + ("" if narrow else " (▼ asked value)"), palette.muted,
          size=SMALL)  # fmt: skip
    x, top = (left, second) if narrow else (left + main + gap, 0.0)
    for title, field, level in (
        ("On it, by head →", "on_span", _level),
        ("Copied, by head →", "head_score", lambda value, palette: palette.heat_level(value)),
    ):
        levels = [[level(value, palette) for value in row] for row in example[field]]
        _heads(figure, levels, title, palette, left=x, top=top + head, width=side, height=height)
        if not any(value > 0 for row in example[field] for value in row):
            words(figure, x + side / 2, top + head + height / 2, "nothing", palette.muted, size=SMALL, ha="center")
        x += side + gap
    return figure


def _heads(
    figure: Figure, levels: list[list[int]], title: str, palette: Palette, *, left: float, top: float, width: float,
    height: float,
) -> None:
    """One map of layers × heads under its title."""
    axes = new_axes(figure, palette, left=left, top=top, width=width, height=height)
    _cells_of(axes, levels, palette)
    axes.set_xticks([0.5, len(levels[0]) - 0.5], ["0", str(len(levels[0]) - 1)])
    axes.set_yticks([0.5, len(levels) - 0.5], ["0", str(len(levels) - 1)])
    words(figure, left, top - 30, title, palette.muted, size=SMALL)


def _level(share: float, palette: Palette) -> int:
    return palette.heat_level(0.0 if share <= 0 else max(0.0, 1 - math.log10(share) / FLOOR))


def _cells_of(axes: Axes, levels: list[list[int]], palette: Palette) -> None:
    """One rectangle for each run of equal colours in a row: a page holds many maps."""
    from matplotlib.patches import Rectangle

    for y, row in enumerate(levels):
        x = 0
        while x < len(row):
            end = x
            while end < len(row) and row[end] == row[x]:
                end += 1
            axes.add_patch(Rectangle((x, y), end - x, 1, facecolor=palette.heat[row[x]], linewidth=0))
            x = end
    axes.set(xlim=(0, len(levels[0])), ylim=(len(levels), 0))
