"""Records of kind `benchmark_train` as the parts of docs/training-speed.md see them: their names, and what is missing.

Flows in: Records. Flows out: text. What a Record did not measure is said even where it measured nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from e2llm.benchmark.train_contestants import Contestant
from e2llm.records import Record

Row = dict[str, Any]


def benchmarks(records: Sequence[Record], *, figure1: bool) -> list[Record]:
    """Those that compare trainers, or those of Figure 1; with rows or without."""
    return [r for r in records if r.kind == "benchmark_train" and bool(r.config["figure1"]) == figure1]


def card(record: Record) -> str:
    """What it ran on: the GPU's name, or the processor's."""
    return str(record.environment.get("gpu") or record.environment.get("cpu"))


def shape_and_card(record: Record) -> str:
    """Figures may stand in one table where these are the same."""
    return f"{record.config['shape']}, {card(record)}"


def stem(record: Record) -> str:
    """The file's name without its ending."""
    assert record.path is not None, "read from a folder"
    return record.path.stem


def name_of(row: Row) -> str:
    """The contestant's name, as `failed`, `out_of_memory` and `not_run` of a config have it."""
    names = ("trainer", "shape", "window", "batch_size", "checkpointing")
    return Contestant(
        **{name: row[name] for name in names},
        gpus=row.get("gpus", 1),
        parallelism=row.get("parallelism", "none"),
        steps=1,
        warmup=1,
    ).name


def measured(record: Record) -> set[str]:
    """Names of the contestants that it has figures of."""
    return {name_of(row) for row in record.rows if row["metric"] == "tokens_per_second"}


def left_out(record: Record, records: Sequence[Record], shown: Set[str] = frozenset()) -> list[str]:
    """A list of what the Record could not measure, but for `shown`, which a table of several Records says already.
    What time was too short for and another of `records` of the same shape and card has is not missing: that is named.
    """
    config, mine = record.config, measured(record)
    lines = [f"- `{name}` failed: {why[:200]}" for name, why in config["failed"].items()]
    lines += [f"- `{name}` ran out of memory." for name in config["out_of_memory"] if name not in shown]
    for name in config["not_run"]:
        if name in shown and name not in mine:
            continue
        others = [other for other in records if other is not record and shape_and_card(other) == shape_and_card(record)]
        found = [f"`{stem(other)}`" for other in others if name in measured(other)]
        if name in mine:
            lines.append(f"- `{name}` was run in fewer than {config['rounds']} rounds: time was up.")
        else:
            where = f" Measured in {', '.join(found)}." if found else ""
            lines.append(f"- `{name}` was not run{' here' * bool(found)}: time was up.{where}")
    return ["\n".join(lines)] if lines else []


def cell(row: Row | None) -> str:
    """A figure with its spread."""
    if row is None:
        return ""
    if row["metric"] == "tokens_per_second":
        return f"{row['value']:,.0f} ({row['low']:,.0f}–{row['high']:,.0f})"
    if row["metric"] == "peak_memory_bytes":
        return f"{row['value'] / 1e9:.1f} GB"
    return f"{row['value']:.1%}" if row["unit"] == "share" else f"{row['value']:.3f}"


def markdown(table: list[list[str]]) -> str:
    """A table, its head and rule included."""
    return "\n".join("| " + " | ".join(line) + " |" for line in table)
