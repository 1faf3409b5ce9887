"""Runs of a study's plan as Markdown: what was set, predicted, measured and concluded.

Flows in: rows of a plan, Records of kind study. Flows out: Markdown. Every figure comes from a Record.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2llm.records import Record
from e2llm.report.formats import format_value, format_window


def of_study(records: Sequence[Record], study: str = "") -> dict[str, Record]:
    """Run -> its Record, of the study of that name; the one on SmolLM2 has none."""
    found = [record for record in records if record.kind == "study" and record.config.get("study", "") == study]
    return {record.config["recipe"]["name"]: record for record in found}


def plan_rows(plan: Path) -> dict[str, dict[str, Any]]:
    """Run -> its row of the plan."""
    return {row["name"]: row for row in tomllib.loads(plan.read_text(encoding="utf-8"))["runs"]}


def run_block(plan: Path, row: dict[str, Any], record: Record | None) -> list[str]:
    """Heading (`shown`, where a page has several of the name), settings, prediction, table, conclusion.

    Raises ValueError where the prediction is not the Record's."""
    lines = [f"### {row.get('shown', row['name'])}", _asked(row), f"Predicted: {row['predicted']}."]
    if record is None:
        return [*lines, "Not run yet."]
    if record.config["predicted"] != row["predicted"]:
        raise ValueError(f"{plan}: the prediction of {row['name']!r} was changed after it was measured")
    concluded = f"Concluded: {row['concluded']}." if "concluded" in row else "No conclusion yet."
    return [*lines, run_table(record), concluded]


def _asked(row: dict[str, Any]) -> str:
    if "method" in row:
        return f"The base untrained, read with `{row['method']}`."
    own = ("planted", "planted_sets", "ramp", "copied", "far_loss", "end_tokens")
    changes = [*row.get("set", []), *(f"{key}={row[key]}" for key in own if key in row)]
    parts = [f"Recipe: `{row['recipe']}`."] if "recipe" in row else []
    parts += [f"Set: {', '.join(f'`{change}`' for change in changes)}."] if changes else []
    parts += [f"Steps: as many as fit into the training time of `{row['seconds_of']}`."] if "seconds_of" in row else []
    return " ".join(parts)


def run_table(record: Record) -> str:
    """One row a corpus, metric, serving slope and interpolation of weights; one column a (window, scale)."""
    rows = [r for r in record.rows if r["metric"] in ("perplexity", "retrieval") and "depth" not in r]
    columns = sorted({(r["window"], r["scale"]) for r in rows})
    groups: dict[tuple[str, ...], dict[tuple[int, float], str]] = {}
    for r in rows:
        what = "perplexity" if r["metric"] == "perplexity" else r["task"].replace("_", " ")
        slope = f"slope {r['slope']:g}" if r.get("slope") is not None else ""
        cell = format_value(r["metric"], r["value"])
        share = f"{r['interpolation']:g} of the way" if "interpolation" in r else ""
        groups.setdefault((r["corpus"], what, slope, share), {})[r["window"], r["scale"]] = cell
    head = ["", *(f"{format_window(window)} at {scale:g}" for window, scale in columns)]
    lines = [head, ["---", *["---:"] * len(columns)]]
    for key, cells in groups.items():
        lines.append([", ".join(part for part in key if part), *(cells.get(column, "–") for column in columns)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
