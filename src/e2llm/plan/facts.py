"""All that `e2llm plan` says, as plain values: what `--json` prints and what its text is made from.

Flows in: a config, a recipe, GPUs, what e2llm.json says. Flows out: a dictionary of plain values, sizes in bytes.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from e2llm.config import Recipe
from e2llm.hf import CheckpointInfo
from e2llm.plan.checks import warnings_of
from e2llm.plan.fitting import alternatives, fits
from e2llm.plan.memory import offloaded_bytes, training_peak
from e2llm.plan.runtimes import Applied
from e2llm.plan.shape import Shape, cache_bytes
from e2llm.plan.speed import Gpu
from e2llm.plan.step import step_of
from e2llm.positions.choose import choose_scale, parse_schedule

Facts = dict[str, Any]


def facts_of(
    shape: Shape,
    recipe: Recipe,
    gpu: Gpu,
    gpus: int,
    raw: dict[str, Any],
    info: CheckpointInfo | None,
    runtimes: list[Applied],
) -> Facts:
    """`raw`: the config file's own keys."""
    return {
        "model": {
            "model_type": shape.model_type,
            "parameters": shape.num_parameters,
            "native_window": shape.native_window,
        },
        "training": training_facts(shape, recipe, gpu, gpus),
        "serving": serving_facts(shape, recipe, info),
        "runtimes": [{**asdict(row), "scales": list(row.scales), "notes": list(row.notes)} for row in runtimes],
        "warnings": warnings_of(raw, info),
    }


def training_facts(shape: Shape, recipe: Recipe, gpu: Gpu, gpus: int) -> Facts:
    """Memory by part at the peak of a step and where in it that is, what would fit where it does not, speed; `step` is
    None where speed is not known."""
    moment, parts = training_peak(shape, recipe, gpus)
    total = sum(parts.values())
    fitting = fits(total, gpu.memory_bytes)
    instead = [] if fitting else alternatives(shape, recipe, gpu.memory_bytes, gpus)
    step = step_of(shape, recipe, gpu, gpus)
    fused = None
    if step is not None and recipe.model.offload == "none":  # fetching weights breaks compiled layers
        fused = step_of(shape, replace(recipe, train=replace(recipe.train, compile="layers")), gpu, gpus)
    return {
        "gpu": gpu.name,
        "gpus": gpus,
        "gpu_bytes": gpu.memory_bytes,
        "batch_size": recipe.train.batch_size,
        "window": recipe.data.window,
        "steps": recipe.train.steps,
        "peak": moment,
        "bytes": parts,
        "total_bytes": total,
        "fits": fitting,
        "offloaded_bytes": offloaded_bytes(shape, recipe),
        "instead": [{"settings": list(way.settings), "bytes": way.size} for way in instead],
        "step": None
        if step is None
        else {
            "windows": step.windows,
            "computing_seconds": step.computing,
            "frozen_seconds": step.frozen,
            "optimizer_seconds": step.optimizer,
            "exchange_seconds": step.exchange.seconds,
            "exchange_bytes_inside": step.exchange.inside,
            "exchange_bytes_between": step.exchange.between,
            "seconds": step.seconds,
            "tokens_per_second": step.tokens_per_second,
            "tokens_per_second_compiled": fused.tokens_per_second if fused else None,
            "hours": recipe.train.steps * step.seconds / 3600,
        },
    }


def serving_facts(shape: Shape, recipe: Recipe, info: CheckpointInfo | None) -> list[Facts]:
    """Scale, keys and values of each window from the native one; [] where the config names none."""
    native = shape.native_window or recipe.model.native_window
    if not native:
        return []
    most, schedule = recipe.scales.max_scale, parse_schedule([])
    if info is not None:
        native, most, schedule = info.native_window, info.max_scale, parse_schedule(info.schedule)
    rows, window = [], native
    while window <= native * most:
        scale = choose_scale(window, native, max_scale=most, schedule=schedule).scale
        rows.append({"window": window, "scale": scale, "cache_bytes": cache_bytes(shape, window)})
        window *= 2
    return rows
