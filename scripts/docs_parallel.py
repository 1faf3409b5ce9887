"""The sections "Ways to share a run" of docs/training-speed.md.

Flows in: Records of kind `benchmark_train` that spread one shape over several GPUs in more than one way
(benchmarks/parallel_gpu.py). Flows out: Markdown.
"""

from __future__ import annotations

from typing import Any

from docs_train_runs import Row, card, cell, markdown, stem

from e2llm.benchmark.train_contestants import PARALLELISM, Contestant
from e2llm.records import Record
from e2llm.report.formats import format_window

TEXT = """One GPU, then {gpus} of them in one machine, in every way by the same settings ({settings}). `× one GPU` is of
tokens a second, `of each` that divided by the number of GPUs: 100 % is a run that loses nothing by being shared. Memory
is the largest of all GPUs'. Under `tensor` two GPUs compute the same windows together, so that a step has half as many.
`deepspeed` is ZeRO-2."""


def is_parallel(record: Record) -> bool:
    """Whether it sets ways beside each other."""
    gpus, ways = record.config.get("gpus", [1]), record.config.get("parallelism", [])
    return max(gpus) > 1 and len(ways) > 1


def parallel_blocks(record: Record) -> list[str]:
    """Markdown: what was measured of one Record."""
    gpus = " and ".join(str(number) for number in record.config["gpus"] if number > 1)
    settings = ", ".join(f"`{setting}`" for setting in record.config["settings"])
    title = f"## Ways to share a run: {record.config['shape']}, {gpus} × {card(record)} (`{stem(record)}`)"
    text = TEXT.format(gpus=gpus, settings=settings or "the recipe's")
    return [title, text, _table(record)] if record.rows else [title, "Nothing was measured."]


def _table(record: Record) -> str:
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in record.rows:
        key = (row["gpus"], row["parallelism"], row["trainer"], row["batch_size"], row["window"], row["checkpointing"])
        lines.setdefault(key, {})[row["metric"]] = row
    head = [
        "way",
        "each GPU holds",
        "GPUs",
        "windows × tokens of a step",
        "tokens/s",
        "× one GPU",
        "of each",
        "of peak",
    ]
    table = [[*head, "peak memory"], ["---"] * 2 + ["---:"] * 7]
    for (gpus, way, trainer, batch, window, recompute), cells in lines.items():
        facts = {"trainer": trainer, "shape": record.config["shape"], "window": window, "batch_size": batch}
        one = Contestant(**facts, gpus=gpus, parallelism=way, steps=1, warmup=1)
        ratio = cells.get("ratio_to_one_gpu")
        table.append(
            [
                (way if gpus > 1 else "one GPU") + ", activations recomputed" * recompute,
                PARALLELISM[way].text if gpus > 1 else "everything",
                str(gpus),
                f"{one.windows_per_step} × {format_window(window)}",
                cell(cells.get("tokens_per_second")),
                cell(ratio),
                "" if ratio is None else f"{ratio['value'] / gpus:.0%}",
                cell(cells.get("model_flops_utilization")),
                cell(cells.get("peak_memory_bytes")),
            ]
        )
    return markdown(table)
