"""`e2llm plan`: a model's config and a recipe -> what training and serving would need. Reads no weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from e2llm.config import Recipe
    from e2llm.plan.shape import Shape
    from e2llm.plan.speed import Gpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `e2llm plan`."""
    parser.add_argument("model", help="model folder, config.json or hub name; only its config is read")
    parser.add_argument("--recipe", default="recommended", help="shipped recipe or TOML file (recommended)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.batch_size=4")
    parser.add_argument("--gpu", help="h100, h200, a100, l40s or rtx4090 (default: the one present, else h100)")
    parser.add_argument("--gpus", type=int, default=1, help="how many (1)")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from e2llm.config import load_recipe
    from e2llm.hf import CheckpointInfo
    from e2llm.plan.checks import warnings_of
    from e2llm.plan.shape import read_config, shape_of

    recipe = load_recipe(arguments.recipe, arguments.set)
    gpu = _gpu(arguments.gpu)
    _check_gpus(recipe, arguments.gpus)
    config, raw = read_config(arguments.model)
    shape = shape_of(config)
    path = Path(arguments.model).expanduser()
    info = CheckpointInfo.load(path) if path.is_dir() else None
    millions = f"{shape.num_parameters / 1e6:,.1f}M"
    lines = [f"{shape.model_type}, {millions} parameters, native window {shape.native_window:,}"]
    lines += _training(shape, recipe, gpu, arguments.gpus)
    lines += _serving(shape, recipe, info)
    lines += [f"warning: {text}" for text in warnings_of(raw, info)]
    print("\n".join(lines))
    return 0


def _gpu(name: str | None) -> Gpu:
    from e2llm.plan.speed import GPUS

    if name is None:
        import torch

        present = torch.cuda.get_device_name().lower().replace(" ", "") if torch.cuda.is_available() else "h100"
        name = next((known for known in GPUS if known in present), None)
        if name is None:
            raise ValueError(f"gpu: no data sheet for the one present ({present}); name one of {', '.join(GPUS)}")
    if name not in GPUS:
        raise ValueError(f"gpu = {name!r}: use one of {', '.join(GPUS)}")
    return GPUS[name]


def _check_gpus(recipe: Recipe, gpus: int) -> None:
    strategy = recipe.distributed.strategy
    if gpus < 1 or (gpus > 1) != (strategy != "none"):
        text = "none is for one, the others for more"
        raise ValueError(f"gpus = {gpus} with distributed.strategy = {strategy!r}: {text}")
    if (share := recipe.distributed.tensor_parallel) > 1:
        raise ValueError(
            f"distributed.tensor_parallel = {share}: nothing of it was measured on GPUs, so no plan is made; leave it "
            "out to plan distributed.strategy = fsdp2"
        )
    if recipe.distributed.shard and gpus % recipe.distributed.shard:
        raise ValueError(f"gpus = {gpus}: distributed.shard = {recipe.distributed.shard} does not divide it")


def _training(shape: Shape, recipe: Recipe, gpu: Gpu, gpus: int) -> list[str]:
    from e2llm.plan.exchange import exchanged
    from e2llm.plan.fitting import fits, offers
    from e2llm.plan.memory import offloaded_bytes, training_memory
    from e2llm.plan.speed import tokens_per_second

    train, window = recipe.train, recipe.data.window
    parts = training_memory(shape, recipe, gpus)
    total = sum(parts.values())
    lines = ["", f"training, {train.batch_size} x {window} tokens on each of {gpus} {gpu.name}:"]
    lines += [f"  {name:18}{size / 1e9:10.2f} GB" for name, size in parts.items()]
    verdict = "fits" if fits(total, gpu.memory_bytes) else "DOES NOT FIT"
    lines.append(f"  {'total':18}{total / 1e9:10.2f} GB of {gpu.memory_bytes / 1e9:.0f}: {verdict}")
    if away := offloaded_bytes(shape, recipe):
        place = "host memory" if recipe.model.offload == "cpu" else "files of the run folder"
        lines.append(f"  {away / 1e9:.2f} GB more in {place}; every batch brings {2 * away / 1e9:.2f} GB to the GPU")
    if verdict != "fits":
        lines += [f"  {line}" for line in offers(shape, recipe, gpu.memory_bytes, gpus)]
    speed = tokens_per_second(shape, recipe, gpu)
    if speed is None:
        unknown = "float32 arithmetic, mixtures of experts, 4-bit or offloaded bases and teachers"
        return [*lines, f"  speed: not known for {unknown}"]
    whole = recipe.distributed.global_batch or train.batch_size * train.gradient_accumulation * gpus
    alone = whole * window / gpus / speed
    moved = exchanged(shape, recipe, gpus, max(1, whole // (train.batch_size * gpus)))
    step = max(alone, moved.seconds)  # exchange runs beside the backward pass; what is longer counts
    hours = train.steps * step / 3600
    speeds = f"{whole * window / step:,.0f} tokens/s, {hours:,.2f} hours"
    lines.append(f"  {speeds} for {train.steps} steps of {whole} windows")
    if gpus > 1:
        lines.append(
            f"  a step: {alone:.2f} s of computing; exchange {moved.inside / 1e9:,.1f} GB inside a node and "
            f"{moved.between / 1e9:,.1f} GB between nodes for each GPU, {moved.seconds:.2f} s"
        )
    return lines


def _serving(shape: Shape, recipe: Recipe, info: object) -> list[str]:
    from e2llm.hf import CheckpointInfo
    from e2llm.plan.shape import cache_bytes
    from e2llm.positions.choose import choose_scale, parse_schedule

    native = shape.native_window or recipe.model.native_window
    if not native:
        return ["", "serving: the config names no window; set model.native_window"]
    most, schedule = recipe.scales.max_scale, parse_schedule([])
    if isinstance(info, CheckpointInfo):
        native, most, schedule = info.native_window, info.max_scale, parse_schedule(info.schedule)
    lines = ["", f"serving, {'window':>12}{'scale':>8}{'keys and values (bfloat16)':>30}"]
    window = native
    while window <= native * most:
        scale = choose_scale(window, native, max_scale=most, schedule=schedule).scale
        lines.append(f"{window:>21,}{scale:>8g}{cache_bytes(shape, window) / 1e9:>27.2f} GB")
        window *= 2
    return lines
