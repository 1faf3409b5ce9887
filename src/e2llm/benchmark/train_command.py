"""`e2llm benchmark train` on the command line: options in, a Record and its table out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2llm.benchmark.shapes import SHAPES
from e2llm.benchmark.train_contestants import DEFAULT_TRAINERS, PARALLELISM, TRAINERS
from e2llm.records import Record, write_atomic

SHOWN = {
    "tokens_per_second": "tokens/s",
    "model_flops_utilization": "of peak",
    "peak_memory_bytes": "GB",
    "ratio_to_hf": "× hf",
    "ratio_to_hf_liger_compile": "× hf-liger-compile",
    "ratio_to_litgpt": "× litgpt",
    "ratio_to_unsloth": "× unsloth",
    "ratio_to_plain_positions": "× plain positions",
    "memory_ratio_to_hf": "memory × hf",
    "ratio_to_one_gpu": "× one GPU",
}
"""Metric -> its column in the table."""
_KEY = ("shape", "trainer", "window", "batch_size", "checkpointing", "gpus", "parallelism")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("--shape", required=True, help=f"sizes of the model, random weights: {', '.join(SHAPES)}")
    add(
        "--trainers",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(TRAINERS)} (default: {', '.join(DEFAULT_TRAINERS)}); hf:1,2 gives one its own batch sizes",
    )
    add("--window", nargs="*", metavar="TOKENS", help="of a training window (4096; --figure1: 4k 8k)")
    add(
        "--batch-size",
        nargs="+",
        type=int,
        default=(),
        metavar="N",
        help="windows a step and GPU; the fastest counts (shape's)",
    )
    add("--gpus", nargs="+", type=int, default=(1,), metavar="N", help="numbers of GPUs, for our own trainers (1)")
    spread = f"how several GPUs share a run: {', '.join(PARALLELISM)} (ddp fsdp2)"
    add("--parallelism", nargs="+", choices=list(PARALLELISM), metavar="NAME", help=spread)
    add("--steps", type=int, default=20, help="steps that are counted (20)")
    add("--warmup", type=int, default=8, help="steps before them (8)")
    add("--block", type=int, default=5, help="steps of one figure; a row is the median of these (5)")
    add("--rounds", type=int, default=1, help="passes over all contestants, in new processes (1)")
    add("--method", default="yarn", help="frequency method of our own trainers (yarn)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of our own trainers' recipe, e.g. train.compile=none",
    )
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass, in every trainer")
    add(
        "--figure1",
        action="store_true",
        help="instead: our windows against training at full length (YaRN, fixed scale)",
    )
    windows = "windows of full-length training (16k 32k 64k 128k)"
    add("--full-windows", nargs="*", metavar="TOKENS", help=windows)
    add("--checkpoint-from", default="0", metavar="TOKENS", help="full-length windows that recompute activations "
        "from the start; smaller ones do where memory runs out")  # fmt: skip
    add("--profile", metavar="FILE", help="profile some more steps of e2llm; text to write")
    add("--time-limit", type=float, default=600, metavar="SECONDS", help="for one contestant (600)")
    add("--until", type=float, metavar="SECONDS", help="no contestant starts or runs after this (no limit)")
    add("--work", metavar="FOLDER", help="keeps tokens and compiled kernels for a later call (a temporary folder)")
    add("--resume", action="store_true", help="take what a call with the same --work has measured, or seen fail")
    add("--out", default="train_benchmark.json", help="Record to write (train_benchmark.json)")


def measure(
    arguments: argparse.Namespace,
    tokens: Callable[[str], int],
    progress: Callable[[str], None],
    save: Callable[[Record], Any],
) -> Record:
    """Run what the options say; `tokens` reads 4096 and 4k. Raises ValueError."""
    from e2llm.benchmark.train import NEVER, TrainBenchConfig, benchmark_train

    names = ("shape", "steps", "warmup", "block", "rounds", "method", "checkpointing", "figure1")
    given = {name: getattr(arguments, name) for name in (*names, "time_limit")}
    # What was not said has its default in one place, the config's.
    windows = ["4k", "8k"] if arguments.figure1 and arguments.window is None else arguments.window
    for name, texts in (("windows", windows), ("full_windows", arguments.full_windows)):
        given |= {} if texts is None else {name: tuple(map(tokens, texts))}
    for name in ("trainers", "parallelism"):
        value = getattr(arguments, name)
        given |= {} if value is None else {name: tuple(value)}
    config = TrainBenchConfig(
        **given,
        batch_sizes=tuple(arguments.batch_size),
        gpus=tuple(arguments.gpus),
        settings=tuple(arguments.set),
        checkpoint_from=tokens(arguments.checkpoint_from),
        profile=arguments.profile is not None,
        until=NEVER if arguments.until is None else arguments.until,
        resume=arguments.resume,
    )
    work = None if arguments.work is None else Path(arguments.work)
    record = benchmark_train(config, progress=progress, save=save, work=work)
    if arguments.profile is not None:
        write_atomic(Path(arguments.profile), profile_page(record))
    return record


def show(record: Record) -> None:
    """The table, and what is missing from it."""
    print(table(record))
    for name, why in record.config["failed"].items():
        print(f"{name} failed: {why}", file=sys.stderr)
    for name in record.config["out_of_memory"]:
        print(f"{name}: out of memory")
    for name in record.config["not_run"]:
        print(f"{name}: not run, time was up")


def table(record: Record) -> str:
    """One line a contestant; costs below."""
    lines: dict[tuple[Any, ...], dict[str, float]] = {}
    others = []
    for row in record.rows:
        if row["metric"] in SHOWN:
            key = tuple(row[name] for name in _KEY)
            lines.setdefault(key, {})[row["metric"]] = row["value"]
        elif "serves" in row:
            where = f"{row['trainer']} {row['window'] or 'at each'} serves {row['serves']}"
            others.append(f"{where}: {row['metric']} {row['value']:.4g} {row['unit']}")
    used = [metric for metric in SHOWN if any(metric in cells for cells in lines.values())]
    text = [f"{'contestant':44}" + "".join(f"{SHOWN[metric]:>19}" for metric in used)]
    for (shape, trainer, window, batch, recompute, gpus, parallelism), cells in lines.items():
        name = f"{shape} {trainer} {batch} x {window}{' recompute' * recompute}"
        name += f" on {gpus} by {parallelism}" if gpus > 1 else ""
        text.append(f"{name:44}" + "".join(f"{_cell(metric, cells.get(metric)):>19}" for metric in used))
    return "\n".join([*text, *others])


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    if metric == "peak_memory_bytes":
        return f"{value / 1e9:.2f}"
    return f"{value:,.0f}" if metric == "tokens_per_second" else f"{value:.3f}"


def profile_page(record: Record) -> str:
    """The profile in a Record as text: by class of kernel, then the longest kernels and gaps."""
    rows = [row for row in record.rows if row["metric"] == "device_seconds_per_step"]
    if not rows:
        return "no profile: e2llm was not measured\n"
    total = sum(row["value"] for row in rows)
    one = rows[0]
    lines = [
        f"{one['shape']}, {one['trainer']}, {one['batch_size']} x {one['window']}: {total * 1000:.1f} ms a step",
        "",
    ]
    lines += [f"{r['kernels']:32} {r['value'] * 1000:9.2f} ms {r['value'] / total:7.1%}" for r in rows]
    lines += ["", "The longest kernels, a step:"]
    for kernel in (example for example in record.examples if "kernel" in example):
        micros, calls = kernel["device_seconds_per_step"] * 1e6, kernel["calls"]
        lines.append(f"{micros:10.0f} us {calls:7.1f} x {kernel['kernels']:30} {kernel['kernel'][:110]}")
    gaps = [example for example in record.examples if "gap_seconds" in example]
    lines += ["", "The longest gaps in the profiled steps:"] if gaps else []
    for gap in gaps:
        lines.append(f"{gap['gap_seconds'] * 1e6:10.0f} us between {gap['after'][:60]} and {gap['before'][:60]}")
    return "\n".join(lines) + "\n"
