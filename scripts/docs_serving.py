"""Serving's part of docs/results.md: speed by engine and mix, and what turned keys cost.

Flows in: Records of kind `serve` and `rerotate`. Flows out: Markdown. A Record that is not there has no table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from e2llm.records import Record
from e2llm.report.formats import format_quantity, format_window

COLUMNS = {
    "output_tokens_per_second": "written",
    "prefill_tokens_per_second": "read",
    "time_to_first_token_seconds": "first token",
    "peak_memory_bytes": "peak memory",
    "ratio_to_single": "to single",
    "ratio_to_transformers": "to transformers",
    "cpu_ratio_to_single": "to single, processor time",
    "cpu_ratio_to_transformers": "to transformers, processor time",
    "ratio_to_floor": "to floor",
    "ratio_to_bandwidth": "to bandwidth",
}
MIXES = {
    "behind": "short behind long",
    "prefill": "reading alone",
    "decode": "decoding alone",
}


def serving_blocks(records: Sequence[Record]) -> list[str]:
    """Markdown blocks, none where nothing was measured."""
    blocks: list[str] = []
    for record in records:
        if record.kind == "serve" and record.rows and record.path is not None:
            blocks += [f"### {_title(record)}", _speeds(record)]
    turned = [record for record in records if record.kind == "rerotate" and record.rows]
    for record in turned:
        blocks += [f"### Keys turned to another scale, {_title(record)}", _turned(record)]
    if not blocks:
        return []
    note = (
        "Made by `e2llm benchmark`. Contestants take turns on the same requests in one run; figures are medians over "
        "rounds, ratios medians of each round's ratio. `single`: all requests at one scale, `mixed`: several in one "
        "batch. transformers: its own continuous batching, with default settings. Floor: the model's matrix products "
        "and attention alone, of the same shapes; bandwidth: a large copy."
    )
    return ["## Serving", note, *blocks]


def _title(record: Record) -> str:
    where = record.environment.get("gpu") or record.environment.get("cpu")
    assert record.path is not None, "read from a folder"
    return f"{record.rows[0]['base_model']}, {record.config.get('dtype', '')}, {where} (`{record.path.stem}`)"


def _speeds(record: Record) -> str:
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in record.rows:
        if row["metric"] in COLUMNS:
            key = tuple(row.get(name, "") for name in ("engine", "mix", "requests", "window"))
            lines.setdefault(key, {})[row["metric"]] = _cell(row)
    used = [metric for metric in COLUMNS if any(metric in cells for cells in lines.values())]
    head = ["engine", "mix", "requests × tokens", *(COLUMNS[metric] for metric in used)]
    table = [head, ["---"] * 3 + ["---:"] * len(used)]
    for (engine, mix, requests, window), cells in lines.items():
        size = f"{requests} × {format_window(window)}" if requests else format_window(window)
        table.append([engine, MIXES.get(mix, mix), size, *(cells.get(metric, "") for metric in used)])
    return _markdown(table)


def _cell(row: dict[str, Any]) -> str:
    if row["unit"] == "ratio":
        return f"{row['value']:.3f}"
    if row["unit"] == "tokens/s":
        return f"{row['value']:,.0f}/s" if row["value"] >= 100 else f"{row['value']:.1f}/s"
    if row["unit"] == "s" and row["value"] < 10:
        return f"{row['value']:.3g} s"
    return format_quantity(row["value"], row["unit"])


def _turned(record: Record) -> str:
    """Nats a token read again, turned and left alone; KL of the latter two from the first."""
    found = {
        (row["window"], row["from_scale"], row["to_scale"], row["keys"], row["metric"]): row for row in record.rows
    }
    pairs = list(dict.fromkeys(key[:3] for key in found))
    head = ["cached", "scale", "nats: read again", "turned", "left alone", "KL: turned", "left alone", "time saved"]
    table = [head, ["---", "---"] + ["---:"] * 6]
    for window, old, new in pairs:
        nats = [found[window, old, new, way, "nats_per_token"]["value"] for way in ("read_again", "turned", "left")]
        away = [found[window, old, new, way, "kl_nats"]["value"] for way in ("turned", "left")]
        again, turn = (found[window, old, new, way, "seconds"]["value"] for way in ("read_again", "turned"))
        cells = [f"{value:.3f}" for value in nats] + [f"{value:.4f}" for value in away]
        table.append([format_window(window), f"{old:g} → {new:g}", *cells, f"{1 - turn / again:.1%}"])
    return _markdown(table)


def _markdown(table: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in table)
