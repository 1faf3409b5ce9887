"""The committed Records of our trainer as runs that `e2llm plan` can be compared with."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from e2llm.benchmark.shapes import SHAPES
from e2llm.benchmark.train_contestants import POSITIONS, SELF_EXTEND, parallel_settings
from e2llm.config import load_recipe
from e2llm.plan.calibration import Run, fit, fit_recomputed
from e2llm.plan.shape import Shape, shape_of
from e2llm.plan.speed import GPUS, SHARES, Shares
from e2llm.records import Record

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
_PLAIN = ("placement.far_weight=0",)
OURS: dict[str, tuple[str, ...]] = {
    "e2llm": _PLAIN,
    "full-length": _PLAIN,
    "e2llm-far-keys": (),
    SELF_EXTEND: POSITIONS[SELF_EXTEND],
}
"""Trainers that are planned -> what differs from the recipe."""
FAMILIES = ("smollm2-135m", "llama-1b", "llama-2-7b")
"""Shapes, with and without adapters."""
PLANNED = ("none", "ddp", "fsdp2", "hsdp")
"""Ways to share a run whose figures the plan is held against."""
_KEYS = ("trainer", "shape", "window", "batch_size", "checkpointing", "gpus", "parallelism")


@functools.cache
def _sizes(shape: str) -> Shape:
    return shape_of(SHAPES[shape].config())


def runs_of(record: Record, name: str, *, compiled: bool = True) -> list[Run]:
    """Of one Record: those whose layers are compiled, or those whose layers are not."""
    card = str(record.environment.get("gpu", "")).lower()
    found = []
    for row in record.rows:
        if row["metric"] == "tokens_per_second" and row["trainer"] in OURS and _is_planned(record, row, compiled):
            gpu = GPUS[next(known for known in GPUS if known in card)]
            found.append(_run(record, row, name, gpu))
    return found


def _is_planned(record: Record, row: dict[str, Any], compiled: bool) -> bool:
    """Not what the plan refuses or says no speed of (tensor parallelism, weights in host memory), DeepSpeed, whose
    buffers it does not know."""
    return row["parallelism"] in PLANNED and ("train.compile=none" not in record.config["settings"]) == compiled


def _run(record: Record, row: dict[str, Any], name: str, gpu: Any) -> Run:
    own = [other for other in record.rows if all(other.get(key) == row[key] for key in _KEYS)]
    (peak,) = [other["value"] for other in own if other["metric"] == "peak_memory_bytes"]
    shape = SHAPES[row["shape"]]
    settings = [f"data.window={row['window']}", f"train.batch_size={row['batch_size']}"]
    settings += ["train.compile=layers", f"train.gradient_checkpointing={str(row['checkpointing']).lower()}"]
    settings += [*parallel_settings(row["parallelism"], row["gpus"]), *OURS[row["trainer"]]]
    if shape.lora_rank:
        adapters = f"lora.rank={shape.lora_rank}", f"model.quantization={shape.quantization}"
        settings += ["model.dtype=bfloat16", *adapters]
    return Run(
        name=f"{name} {row['trainer']} {row['batch_size']} x {row['window']} {row['gpus']}",
        family=next(family for family in FAMILIES if row["shape"].startswith(family)),
        shape=_sizes(row["shape"]),
        recipe=load_recipe("recommended-yarn", [*settings, *record.config["settings"]]),
        gpu=gpu,
        gpus=row["gpus"],
        tokens_per_second=row["value"],
        peak_bytes=peak,
        kernels={other["kernels"]: other["value"] for other in own if other["metric"] == "device_seconds_per_step"},
    )


@functools.cache
def measured_runs() -> tuple[Run, ...]:
    """All, in the order of the files."""
    files = sorted(RESULTS.glob("train_*.json"))
    return tuple(run for file in files for run in runs_of(Record.load(file), file.stem))


@functools.cache
def plain_runs() -> tuple[Run, ...]:
    """Those whose layers are not compiled: what such layers and what fetching a base take is found by them."""
    files = sorted(RESULTS.glob("train_*.json"))
    return tuple(run for file in files for run in runs_of(Record.load(file), file.stem, compiled=False))


def speed_ratios(runs: list[Run], shares: Shares = SHARES) -> list[float]:
    """Planned over measured tokens a second, of the runs whose speed is planned."""
    return [ratio for run in runs if (ratio := run.speed_ratio(shares)) is not None]


def held_out_ratios(family: str) -> list[float]:
    """Of one shape's runs, with constants found without any of them."""
    shares = fit([run for run in measured_runs() if run.family != family])
    return speed_ratios([run for run in measured_runs() if run.family == family], shares)


def held_out_peaks() -> list[float]:
    """Planned over measured peak memory of every run, the factor of recomputed layers found without any of its shape;
    with adapters, of which one shape alone was recomputed, without any of its window."""
    found = []
    for run in measured_runs():
        adapters, window = bool(run.recipe.lora.rank), run.recipe.data.window
        alike = [other for other in measured_runs() if bool(other.recipe.lora.rank) == adapters]
        others = [o for o in alike if (o.recipe.data.window != window if adapters else o.family != run.family)]
        found.append(run.memory_ratio(fit_recomputed([o for o in others if o.recipe.train.gradient_checkpointing])))
    return found
