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
PLAIN = """The same run several times: the same windows, scales and offsets, step for step. `{reference}` is the
reference: transformers' own model and PyTorch's AdamW in a plain loop (`benchmarks/plain_trainer.py`), which is given
each row's positions, frequencies and far keys, and shares nothing else with our trainer. `{noise}` is the reference
again with other scales and offsets on the same windows: what another seed changes, which is the noise. The others are
our trainer: in float32 throughout; as most trainers do, in bfloat16 over float32 weights; and with bfloat16 weights and
masters cut in two, the fast one. Amounts are means over steps of how far a loss is from the reference's; the mean
difference has a 95 % interval over steps."""


def loss_blocks(records: Sequence[Record]) -> list[str]:
    """Markdown blocks; none without a Record."""
    blocks: list[str] = []
    for record in _found(records):
        where = record.environment.get("gpu") or record.environment.get("cpu")
        steps = f"{record.config['steps']} steps of `{record.config['recipe']}`"
        (file, drawing) = _drawing(record)
        noise, (reference, *_) = noise_of(record), _curves(record)
        text = TEXT if noise is None else PLAIN.format(reference=reference, noise=noise)
        blocks += [f"## Losses of the fast arithmetic: {steps}, {where}", text, _table(record), *_verdict(record)]
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


def noise_of(record: Record) -> str | None:
    """The way that differs from the reference by chance alone; None in a Record that has none."""
    return next((row["arithmetic"] for row in record.rows if row.get("noise")), None)


def apart(record: Record) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """Arithmetic -> (metric, train or held_out) -> the row that says how far it is from the reference."""
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in record.rows:
        if row["metric"] != "loss":
            found.setdefault(row["arithmetic"], {})[row["metric"], row["over"]] = row
    return found


def _verdict(record: Record) -> list[str]:
    """Which ways are within the noise: no farther from the reference than it, in training and held out."""
    noise, rows = noise_of(record), apart(record)
    if noise is None:
        return []
    lines = []
    of = (("absolute_loss_difference", "train", "a step"), ("largest_loss_difference", "held_out", "held out"))
    for name, own in rows.items():
        if name == noise:
            continue
        pairs = [(own[m, over]["value"], rows[noise][m, over]["value"], say) for m, over, say in of if (m, over) in own]
        within = all(mine <= chance for mine, chance, _ in pairs)
        told = ", ".join(f"{mine:.4f} {say} against {chance:.4f}" for mine, chance, say in pairs)
        lines.append(f"- `{name}` is {'within' if within else '**not** within'} the noise: {told}.")
    return ["\n".join(lines)]


def _found(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.kind == "train_losses" and record.rows]


def _curves(record: Record) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    for row in record.rows:
        if row["metric"] == "loss" and row["split"] == "train":
            curves.setdefault(row["arithmetic"], {})[row["step"]] = row["value"]
    return curves


def _table(record: Record) -> str:
    held: dict[str, dict[float, float]] = {}
    for row in record.rows:
        if row["metric"] == "loss" and row["split"] == "held_out":  # the last step's stay
            held.setdefault(row["arithmetic"], {})[row["scale"]] = row["value"]
    scales = sorted(next(iter(held.values()))) if held else []
    head = ["arithmetic", f"last {LAST} steps", *(f"held out, scale {scale:g}" for scale in scales)]
    signed, (reference, *_) = apart(record), _curves(record)
    head += [f"apart from {reference}, mean", "the most", *(["mean difference"] if signed else [])]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    far_off = differences(record)
    for name, curve in _curves(record).items():
        last = [curve[step] for step in sorted(curve)][-LAST:]
        cells = [name, f"{sum(last) / len(last):.4f}", *(f"{held[name][scale]:.4f}" for scale in scales)]
        far = [abs(value) for value in far_off[name]]
        cells += ["", ""] if name == reference else [f"{sum(far) / len(far):.4f}", f"{max(far):.4f}"]
        lines.append([*cells, *([_signed(signed.get(name, {}))] if signed else [])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _signed(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    row = rows.get(("loss_difference", "train"))
    if row is None:
        return ""
    ends = f" ({row['low']:+.4f} to {row['high']:+.4f})" if "low" in row else ""
    return f"{row['value']:+.4f}{ends}"


def _drawing(record: Record) -> tuple[str, Drawing]:
    """(file, plot of the training losses, means over neighbouring steps)."""
    lines = []
    for index, (name, curve) in enumerate(_curves(record).items()):
        steps = sorted(curve)
        size = max(1, len(steps) // POINTS)
        groups = [steps[i : i + size] for i in range(0, len(steps) - size + 1, size)]
        x = tuple(group[-1] for group in groups)
        y = tuple(sum(curve[step] for step in group) / size for group in groups)
        lines.append(Line(name, x, y, ("hues", index), strong=index == 0, marker="os^Dv"[index % 5]))
    title = "Training loss by arithmetic"

    def draw(palette: Any, width: int) -> Any:
        return draw_lines(lines, palette, width, y_name="Loss, nats", x_name="Step", windows=False)

    ends = "; ".join(f"{line.label}: {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines)
    assert record.path is not None, "read from a folder"
    key = f"losses-{record.path.stem.replace('_', '-')}"
    return f"{key}.svg", Drawing(key, title, f"First and last point: {ends}.", draw)
