"""Speed of evaluation, a part of docs/results.md: sliding windows against the card's peak and the floor of their
shapes, answers against reading alone.

Flows in: Records of kinds `evaluate_speed` and `answer_speed`. Flows out: Markdown. A Record that is not there has no
row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from e2llm.records import Record
from e2llm.report.formats import format_quantity, format_window

COLUMNS = {
    "tokens_per_second": "tokens/s",
    "seconds_per_window": "a window",
    "model_flops_utilization": "of peak",
    "ratio_to_floor": "to floor",
    "peak_memory_bytes": "peak memory",
}
TARGET = ("smollm2-135m", 32768, 0.4)
"""Base model, window in tokens, share of the card's peak that is to be reached."""


def reading_blocks(records: Sequence[Record]) -> list[str]:
    """Markdown blocks, none where nothing was measured."""
    found = [record for record in records if record.kind == "evaluate_speed" and record.rows]
    if not found:
        return []
    lines = [["model", "window", "layers", *COLUMNS.values()], ["---", "---:", "---", *["---:"] * len(COLUMNS)]]
    best = 0.0
    for record in found:
        groups: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
        for row in record.rows:
            groups.setdefault((row["window"], row["compile"]), {})[row["metric"]] = row
        for (window, how), cells in groups.items():
            name, share = cells["tokens_per_second"]["base_model"], cells.get("model_flops_utilization")
            if share and (name, window) == TARGET[:2]:
                best = max(best, share["value"])
            how = {"none": "as they are", "layers": "compiled"}[how]
            lines.append([name, format_window(window), how, *(_cell(cells.get(metric)) for metric in COLUMNS)])
    first = found[0]
    card = first.environment.get("gpu") or first.environment.get("cpu")
    note = (
        f"Perplexity over sliding windows, stride {first.config['stride']}: `e2llm benchmark evaluate` on {card}, "
        f"{first.config['dtype']}. Peak: matrix products and causal attention against "
        f"{first.config['peak_flops'] / 1e12:.0f} TFLOP/s. Floor: those products and that attention alone, measured in "
        "the same run."
    )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    blocks = ["## Reading", note, table]
    if best:
        reached = "is reached" if best >= TARGET[2] else "is not reached"
        what = f"{TARGET[2]:.0%} of the peak for {TARGET[0]} at {format_window(TARGET[1])}"
        blocks.append(f"{what} {reached}: {best:.1%}.")
    return blocks


def answer_blocks(records: Sequence[Record]) -> list[str]:
    """How fast prompts are answered, by the tokens that a step reads; none where nothing was measured."""
    found = [record for record in records if record.kind == "answer_speed" and record.rows]
    if not found:
        return []
    columns = {
        "tokens_per_second": "tokens/s",
        "seconds_per_prompt": "a prompt",
        "ratio_to_reading": "of reading alone",
    }
    head = ["model", "window", "prompts at once", "tokens of a step", *columns.values()]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for record in found:
        groups: dict[tuple[str, int, int, int], dict[str, dict[str, Any]]] = {}
        for row in record.rows:
            key = (row["base_model"], row["window"], row["batch_size"], row["chunk_tokens"])
            groups.setdefault(key, {})[row["metric"]] = row
        for (name, window, batch, chunk), cells in groups.items():
            sizes = [name, format_window(window), str(batch), format_window(chunk) if chunk else "–"]
            lines.append([*sizes, *(_cell(cells.get(metric)) for metric in columns)])
    config = found[0].config
    rounds = "one round" if config["rounds"] == 1 else f"medians of {config['rounds']} rounds"
    card = found[0].environment.get("gpu") or found[0].environment.get("cpu")
    note = (
        f"Answers of {config['new_tokens']} tokens to {config['prompts']} prompts of about a window's length: "
        f"`e2llm benchmark answers` on {card}, {config['dtype']}, {rounds} after one that warms up. Reading alone: a "
        "window in one pass, its last token scored."
    )
    return ["## Answers", note, "\n".join("| " + " | ".join(line) + " |" for line in lines)]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["unit"] == "share":
        return f"{row['value']:.1%}"
    if row["unit"] == "bytes":
        return format_quantity(row["value"], row["unit"])
    return {"s": "{:.3f} s", "ratio": "{:.2f}"}.get(row["unit"], "{:,.0f}").format(row["value"])
