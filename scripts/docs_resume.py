"""The section "From two GPUs to one" of docs/training-speed.md.

Flows in: Records of kind `train_resume` (benchmarks/resume_gpus.py). Flows out: Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence

from e2llm.records import Record

TEXT = """One recipe, trained in three ways: on one GPU to the end; by FSDP2 on two to the end; by FSDP2 on two, stopped
by SIGTERM after step {stopped} and gone on with on one. The windows, scales and offsets of a step are the same in each;
sums are added up in another order on two GPUs."""


def resume_blocks(records: Sequence[Record]) -> list[str]:
    """Markdown blocks; none without a Record."""
    blocks: list[str] = []
    for record in records:
        if record.kind != "train_resume" or not record.rows:
            continue
        where = record.environment.get("gpu") or record.environment.get("cpu")
        steps, stopped = record.config["steps"], record.config["stopped_after"]
        blocks += [f"## From two GPUs to one: {steps} steps, {where}", TEXT.format(stopped=stopped), _table(record)]
    return blocks


def _table(record: Record) -> str:
    losses: dict[str, dict[int, float]] = {}
    apart: dict[str, float] = {}
    for row in record.rows:
        if row["metric"] == "loss":
            losses.setdefault(row["run"], {})[row["step"]] = row["value"]
        else:
            apart[row["run"]] = row["value"]
    lines = [["GPUs", "first loss", "last loss", "apart from one GPU, the most"], ["---"] + ["---:"] * 3]
    for name, curve in losses.items():
        largest = f"{apart[name]:.4f}" if apart[name] else ""
        lines.append([name, f"{curve[min(curve)]:.4f}", f"{curve[max(curve)]:.4f}", largest])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
