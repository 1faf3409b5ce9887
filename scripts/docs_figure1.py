"""Figure 1 of the paper, measured: a table, what serving costs, and two plots a shape in docs/training-speed.md.

Flows in: Records of kind `benchmark_train` that were made with `--figure1`. Flows out: Markdown and drawings. Several
Records of one shape on one kind of card are one figure: windows are measured apart where a machine is held for minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from docs_train_runs import Row, benchmarks, cell, left_out, markdown, shape_and_card

from e2llm.benchmark.train_contestants import FULL_LENGTH, Contestant
from e2llm.records import Record
from e2llm.report.canvas import Drawing
from e2llm.report.formats import format_count, format_window, slug
from e2llm.report.lines import Line, draw_lines

OURS = "e2llm"
RECOMPUTED = ", recomputed"
Key = tuple[str, bool, int]
"""(trainer, whether activations are recomputed, window)."""


@dataclass(frozen=True)
class Figure:
    """One shape on one kind of card."""

    name: str
    records: list[Record] = field(default_factory=list)
    cells: dict[Key, dict[str, Row]] = field(default_factory=dict)
    """Metric -> row of what was measured."""
    too_large: set[Key] = field(default_factory=set)
    """What ran out of memory."""

    @property
    def full(self) -> list[int]:
        """Windows of full-length training that a Record was to measure, and those it did."""
        asked = {window for record in self.records for window in record.config["full_windows"]}
        return sorted(asked | self.windows(FULL_LENGTH))

    def windows(self, trainer: str, recompute: bool | None = None) -> set[int]:
        """Measured ones; `recompute` None: in either way."""
        return {w for who, how, w in self.cells if who == trainer and recompute in (None, how)}


def figures(records: Sequence[Record]) -> list[Figure]:
    """One for each shape and card, in the order of the Records."""
    found: dict[str, Figure] = {}
    for record in benchmarks(records, figure1=True):
        figure = found.setdefault(shape_and_card(record), Figure(shape_and_card(record)))
        figure.records.append(record)
        for row in record.rows:
            if "serves" not in row:
                key = (row["trainer"], row["checkpointing"], row["window"])
                figure.cells.setdefault(key, {})[row["metric"]] = row
        for window in (*record.config["windows"], *record.config["full_windows"]):
            for key in ((who, how, window) for who in (OURS, FULL_LENGTH) for how in (False, True)):
                if _contestant(record, key) in record.config["out_of_memory"]:
                    figure.too_large.add(key)
    return list(found.values())


def _contestant(record: Record, key: Key) -> str:
    trainer, recompute, window = key
    sizes = {"shape": record.config["shape"], "window": window, "batch_size": 1, "steps": 1, "warmup": 1}
    return Contestant(trainer=trainer, checkpointing=recompute, **sizes).name


def figure1_blocks(records: Sequence[Record]) -> list[str]:
    """Markdown blocks of all shapes; none without a Record."""
    blocks: list[str] = []
    for figure in figures(records):
        blocks += [f"## Figure 1 of the paper, measured: {figure.name}", _table(figure), *_recomputation(figure)]
        blocks += _costs(figure)
        blocks += [f"![{title}, {figure.name}](images/{file})" for file, title, _ in _drawings(figure)]
        for record in figure.records:
            shown = {_contestant(record, key) for key in {*figure.cells, *figure.too_large}}
            blocks += left_out(record, [], shown)
    return blocks


def _table(figure: Figure) -> str:
    head = ["training", "window", "peak memory", "tokens/s", "seconds for a million tokens", "activations"]
    table = [head, ["---"] + ["---:"] * 4 + ["---"]]
    keys = {*figure.cells, *figure.too_large}
    for key in sorted(keys, key=lambda key: (key[0] == FULL_LENGTH, key)):
        trainer, recompute, window = key
        values = ["out of memory", "", ""]
        if key in figure.cells:
            cells = figure.cells[key]
            values = [
                cell(cells["peak_memory_bytes"]),
                format_count(round(cells["tokens_per_second"]["value"])),
                f"{cells['seconds_per_million_tokens']['value']:.1f}",
            ]
        name = "ours, random scales" if trainer == OURS else "full length, YaRN"
        table.append([name, format_window(window), *values, "recomputed" if recompute else "kept"])
    return markdown(table)


def _recomputation(figure: Figure) -> list[str]:
    """Where full length recomputed activations and ours did not: then not all of the difference is the window's."""
    recomputed = {window for who, how, window in {*figure.cells, *figure.too_large} if how and who == FULL_LENGTH}
    ours = figure.windows(OURS, False)
    if not recomputed or not ours:
        return []
    tried = {window for window in recomputed if (FULL_LENGTH, False, window) in figure.too_large}
    parts = []
    if recomputed - tried:
        parts.append(f"at {_list(recomputed - tried)} from the start: it was not tried with activations kept")
    if tried:
        parts.append(f"at {_list(tried)} because memory ran out with activations kept")
    text = f"Full length was made to recompute activations {'; '.join(parts)}. Ours kept them at {_list(ours)}"
    same = figure.windows(OURS, True)
    if same:
        return [f"{text}, and recomputed them at {_list(same)}: rows that recompute compare like with like."]
    return [f"{text}: part of the difference in speed is that, and in memory full length is favoured by it."]


def _list(windows: set[int] | Sequence[int]) -> str:
    return ", ".join(format_window(window) for window in sorted(windows))


def _costs(figure: Figure) -> list[str]:
    """One run of ours serves all windows; training at full length needs a run for each. What a sum leaves out is
    said: a window without a figure has no cost."""
    seconds = {key: cells["seconds_per_million_tokens"]["value"] for key, cells in figure.cells.items()}
    full: dict[int, float] = {}
    for (trainer, _, window), value in seconds.items():
        if trainer == FULL_LENGTH:
            full[window] = min(value, full.get(window, value))
    ours = {key[1:]: value for key, value in seconds.items() if key[0] == OURS}
    if not full or not ours:
        return []
    total = sum(full.values())
    missing = []
    for window in sorted(set(figure.full) - full.keys()):
        too_large = any((FULL_LENGTH, how, window) in figure.too_large for how in (False, True))
        why = "ran out of memory on this card" if too_large else "was not measured"
        missing.append(f" {format_window(window)} is not in it: full length there {why}.")
    lines = [
        f"- at windows of {format_window(window)}{RECOMPUTED * recompute}: {value:.1f} s, {value / total:.3f} of that"
        for (recompute, window), value in sorted(ours.items())
    ]
    text = f"To serve {_list(list(full))}, at a million tokens a run: full length, a run for each, {total:.1f} s."
    return [f"{text}{''.join(missing)} Ours, one run\n\n" + "\n".join(lines)]


def _drawings(figure: Figure) -> Iterator[tuple[str, str, Drawing]]:
    """(file, title, drawing) of memory and of speed against the training window."""
    for metric, unit, name, short, from_zero in (
        ("peak_memory_bytes", 1e-9, "Peak memory, GB", "memory", True),
        ("tokens_per_second", 1.0, "Tokens a second", "speed", False),
    ):
        lines = []
        for index, key in enumerate((who, recompute) for who in (OURS, FULL_LENGTH) for recompute in (False, True)):
            mine = {w: cells[metric]["value"] for (*which, w), cells in figure.cells.items() if tuple(which) == key}
            if mine:
                x, y = tuple(sorted(mine)), tuple(mine[window] * unit for window in sorted(mine))
                label = ("ours" if key[0] == OURS else "full length") + RECOMPUTED * key[1]
                lines.append(Line(label, x, y, ("hues", index), strong=index == 0, marker="os^D"[index]))
        if len({x for line in lines for x in line.x}) < 2:
            continue
        title = f"{name.split(',')[0]} against the training window"

        looks = {"y_name": name, "x_name": "Training window, tokens", "from_zero": from_zero}

        def draw(palette: Any, width: int, lines: list[Line] = lines, looks: dict[str, Any] = looks) -> Any:
            return draw_lines(lines, palette, width, **looks)

        ends = "; ".join(f"{line.label}: {line.y[0]:.4g} at {format_window(line.x[0])}" for line in lines)
        key = slug("figure1", figure.name, short)
        yield f"{key}.svg", title, Drawing(key, title, f"First point of each line: {ends}.", draw)


def figure1_drawings(records: Sequence[Record]) -> dict[str, Drawing]:
    """File name -> plot."""
    return {file: drawing for figure in figures(records) for file, _, drawing in _drawings(figure)}
