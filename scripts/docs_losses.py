"""The section "Losses of the fast arithmetic" of docs/training-speed.md.

Flows in: Records of kind `train_losses` (benchmarks/loss_curves.py). Flows out: Markdown and a plot. Losses of two
runs are of the same windows, scales and offsets step by step, so they are subtracted one from the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from e2llm.records import Record
from e2llm.report.canvas import Drawing
from e2llm.report.lines import Line, draw_lines

LAST = 20
"""Steps at the end whose mean is shown."""
POINTS = 50
"""Points of a curve: means over neighbouring steps."""
TEXT = """The same run three times: the same windows, scales and offsets, step for step. The first computes in float32
throughout; the second, as most trainers do, in bfloat16 over float32 weights; the third holds bfloat16 weights with
masters cut in two. Noise is what the second differs from the first by."""


def loss_blocks(records: Sequence[Record]) -> list[str]:
    """Markdown blocks; none without a Record."""
    blocks: list[str] = []
    for record in _found(records):
        where = record.environment.get("gpu") or record.environment.get("cpu")
        steps = f"{record.config['steps']} steps of `{record.config['recipe']}`"
        (file, drawing) = _drawing(record)
        blocks += [f"## Losses of the fast arithmetic: {steps}, {where}", TEXT, _table(record)]
        blocks += [f"![{drawing.title}](images/{file})"]
    return blocks


def loss_drawings(records: Sequence[Record]) -> dict[str, Drawing]:
    """File name -> plot."""
    return dict(_drawing(record) for record in _found(records))


def differences(record: Record) -> dict[str, list[float]]:
    """Arithmetic -> its training loss minus the reference's, step by step, nats. The reference is the first."""
    curves = _curves(record)
    reference = next(iter(curves.values()))
    return {name: [curve[step] - reference[step] for step in sorted(reference)] for name, curve in curves.items()}


def _found(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.kind == "train_losses" and record.rows]


def _curves(record: Record) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    for row in record.rows:
        if row["split"] == "train":
            curves.setdefault(row["arithmetic"], {})[row["step"]] = row["value"]
    return curves


def _table(record: Record) -> str:
    held: dict[str, dict[float, float]] = {}
    for row in record.rows:
        if row["split"] == "held_out":  # the last step's stay
            held.setdefault(row["arithmetic"], {})[row["scale"]] = row["value"]
    scales = sorted(next(iter(held.values()))) if held else []
    head = ["arithmetic", f"last {LAST} steps", *(f"held out, scale {scale:g}" for scale in scales)]
    head += ["apart from float32, mean", "the most"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    apart = differences(record)
    for name, curve in _curves(record).items():
        last = [curve[step] for step in sorted(curve)][-LAST:]
        cells = [name, f"{sum(last) / len(last):.4f}", *(f"{held[name][scale]:.4f}" for scale in scales)]
        far = [abs(value) for value in apart[name]]
        reference = not any(far)
        lines.append(cells + (["", ""] if reference else [f"{sum(far) / len(far):.4f}", f"{max(far):.4f}"]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _drawing(record: Record) -> tuple[str, Drawing]:
    """(file, plot of the training losses, means over neighbouring steps)."""
    lines = []
    for index, (name, curve) in enumerate(_curves(record).items()):
        steps = sorted(curve)
        size = max(1, len(steps) // POINTS)
        groups = [steps[i : i + size] for i in range(0, len(steps) - size + 1, size)]
        x = tuple(group[-1] for group in groups)
        y = tuple(sum(curve[step] for step in group) / size for group in groups)
        lines.append(Line(name, x, y, ("hues", index), strong=index == 0, marker="os^"[index % 3]))
    title = "Training loss by arithmetic"

    def draw(palette: Any, width: int) -> Any:
        return draw_lines(lines, palette, width, y_name="Loss, nats", x_name="Step", windows=False)

    ends = "; ".join(f"{line.label}: {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines)
    assert record.path is not None, "read from a folder"
    key = f"losses-{record.path.stem.replace('_', '-')}"
    return f"{key}.svg", Drawing(key, title, f"First and last point: {ends}.", draw)
