"""Attention maps: where the answer looks, layer by layer over the prompt, and which heads copied the value.

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
    """(heading, drawing): one map of layers × prompt and one of layers × heads for each window."""
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
    by_stretch, heads = example["by_stretch"], example["head_score"]
    best = max((score, layer, head) for layer, row in enumerate(heads) for head, score in enumerate(row))
    start, _end = example["spans"][0]
    description = (
        f"Left: share of the answer's attention on each of {example['stretches']} stretches of the prompt, one row a "
        f"layer, darker is more, on a log scale from 0.01 %; the asked value stands {start:.0%} into it. Right: share "
        f"of the value that each head copied, a row a layer; most by head {best[2]} of layer {best[1]}, {best[0]:.2f}."
    )

    def draw(palette: Palette, width: int) -> Figure:
        return _draw(example, by_stretch, heads, palette, width)

    return Drawing(name, f"Attention of the answer, {heading}", description, draw)


def _draw(
    example: dict[str, Any], by_stretch: list[list[float]], heads: list[list[float]], palette: Palette, width: int
) -> Figure:
    layers, left, gap, head, foot = len(by_stretch), 36, 34, 40, 34
    height = max(120.0, min(300.0, 11.0 * layers))
    side = (width - left - gap) * 0.30
    main = width - left - gap - side - 10
    figure = new_figure(width, head + height + foot)
    axes = new_axes(figure, palette, left=left, top=head, width=main, height=height)
    _cells_of(axes, [[_level(value, palette) for value in row] for row in by_stretch], palette)
    for index, (start, end) in enumerate(example["spans"]):
        x = (start + end) / 2 * len(by_stretch[0])
        colour = palette.hues[1] if index == 0 else palette.muted
        axes.plot([x], [1.05], marker="v", color=colour, markersize=9 if index == 0 else 6, clip_on=False,
                  transform=axes.get_xaxis_transform(), linestyle="none")  # fmt: skip
    axes.set_xticks([0, len(by_stretch[0]) / 2, len(by_stretch[0])], ["start", "middle", "end"])
    words(figure, 0, 10, "Layer ↓ place in the prompt →" + (" (▼ asked value)" if width >= 500 else ""), palette.muted,
          size=SMALL)  # fmt: skip
    right = new_axes(figure, palette, left=left + main + gap, top=head, width=side, height=height)
    _cells_of(right, [[palette.heat_level(value) for value in row] for row in heads], palette)
    right.set_xticks([0.5, len(heads[0]) - 0.5], ["0", str(len(heads[0]) - 1)])
    words(figure, left + main + gap, 10, "Copied, by head →", palette.muted, size=SMALL)
    if not any(value > 0 for row in heads for value in row):
        middle = left + main + gap + side / 2
        words(figure, middle, head + height / 2, "nothing", palette.muted, size=SMALL, ha="center")
    for one in (axes, right):
        one.set_yticks([0.5, layers - 0.5], ["0", str(layers - 1)])
    return figure


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
