"""`e2llm plan`: a model's config and a recipe -> what training and serving would need. Reads no weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from e2llm.config import Recipe
    from e2llm.plan.facts import Facts
    from e2llm.plan.speed import Gpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `e2llm plan`."""
    parser.add_argument("model", help="model or adapter folder, config.json, .gguf or hub name; no weights are read")
    parser.add_argument("--recipe", default="recommended", help="shipped recipe or TOML file (recommended)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.batch_size=4")
    parser.add_argument("--gpu", help="h100, h200, a100, l40s or rtx4090 (default: the one present, else h100)")
    parser.add_argument("--gpus", type=int, default=1, help="how many (1)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object, sizes in bytes")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    import json

    from e2llm.config import load_recipe
    from e2llm.hf.load import is_adapter, load_info
    from e2llm.plan.facts import facts_of
    from e2llm.plan.runtimes import applied, table
    from e2llm.plan.shape import read_config, shape_of

    recipe = load_recipe(arguments.recipe, arguments.set)
    gpu = _gpu(arguments.gpu)
    _check_gpus(recipe, arguments.gpus)
    config, raw = read_config(arguments.model)
    shape = shape_of(config)
    path = Path(arguments.model).expanduser()
    info = load_info(arguments.model) if path.is_dir() or path.suffix == ".gguf" else None
    runtimes = applied(config, info, arguments.model)
    facts = facts_of(shape, recipe, gpu, arguments.gpus, raw, info, runtimes)
    if path.is_dir() and is_adapter(path):
        facts["warnings"].append(
            f"{arguments.model} holds an adapter: all of this is of its base with the adapter merged in, which is what "
            "runtimes other than e2llm are to be given (e2llm export)"
        )
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    millions = f"{shape.num_parameters / 1e6:,.1f}M"
    lines = [f"{shape.model_type}, {millions} parameters, native window {shape.native_window:,}"]
    lines += _training(facts["training"], recipe.model.offload, recipe.train.compile == "layers")
    lines += _serving(facts["serving"])
    lines += ["", *table(runtimes)]
    lines += [f"warning: {text}" for text in facts["warnings"]]
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
        more = "; for several: --set distributed.strategy=fsdp2 (or ddp, deepspeed)" if gpus > 1 else "; use --gpus 1"
        text = "none is for one, the others for more" + (more if strategy == "none" else "; say how many by --gpus")
        raise ValueError(f"gpus = {gpus} with distributed.strategy = {strategy!r}: {text}")
    if (share := recipe.distributed.tensor_parallel) > 1:
        raise ValueError(
            f"distributed.tensor_parallel = {share}: the plan does not count what it cuts; leave it out to plan "
            "distributed.strategy = fsdp2, or measure it: e2llm benchmark train --parallelism tensor"
        )
    if recipe.distributed.shard and gpus % recipe.distributed.shard:
        sizes = ", ".join(str(n) for n in range(2, gpus + 1) if gpus % n == 0)
        shard = recipe.distributed.shard
        raise ValueError(f"gpus = {gpus}: distributed.shard = {shard} does not divide it; use one of {sizes}")
    recipe.accumulation(gpus)  # whether the batch divides


def _training(facts: Facts, offload: str, recipe_compiles: bool) -> list[str]:
    from e2llm.plan.fitting import Alternative, offers

    lines = ["", "training, {batch_size} x {window} tokens on each of {gpus} {gpu}:".format(**facts)]
    lines += [f"  {name:18}{size / 1e9:10.2f} GB" for name, size in facts["bytes"].items() if size]
    verdict = "fits" if facts["fits"] else "DOES NOT FIT"
    lines.append(f"  {'total':18}{facts['total_bytes'] / 1e9:10.2f} GB of {facts['gpu_bytes'] / 1e9:.0f}: {verdict}")
    lines.append(f"  held at once {facts['peak']}, the peak of a step")
    if away := facts["offloaded_bytes"]:
        place = "host memory" if offload == "cpu" else "files of the run folder"
        lines.append(f"  {away / 1e9:.2f} GB more in {place}; every batch brings {2 * away / 1e9:.2f} GB to the GPU")
    if not facts["fits"]:
        ways = [Alternative(tuple(way["settings"]), way["bytes"]) for way in facts["instead"]]
        lines += [f"  {line}" for line in offers(ways)]
    step = facts["step"]
    if step is None:
        unknown = (
            "float32 arithmetic, mixtures of experts, a base on a disk, distributed.cpu_offload, teachers and whole "
            "document masks"
        )
        return [*lines, f"  speed: not known for {unknown}"]
    speeds = f"{step['tokens_per_second']:,.0f} tokens/s, {step['hours']:,.2f} hours"
    lines.append(f"  {speeds} for {facts['steps']} steps of {step['windows']} windows")
    if step["frozen_seconds"]:
        what, runs = "unpacking 4-bit weights", "five runs"
        if offload == "cpu":
            what, runs = "fetching weights from host memory", "two runs"
        share = step["frozen_seconds"] / step["seconds"]
        lines.append(f"  {share:.0%} of the time goes into {what}, a speed that rests on {runs} of a 7B model")
    if not recipe_compiles and (fused := step["tokens_per_second_compiled"]):
        lines.append(
            "  its layers are not compiled, a speed that rests on two runs; with --set "
            f"train.compile=layers: {fused:,.0f} tokens/s"
        )
    if facts["gpus"] > 1:
        lines.append(
            f"  a step: {step['computing_seconds']:.2f} s of computing, {step['optimizer_seconds']:.2f} s of the "
            "optimizer; exchange beside computing: "
            f"{step['exchange_bytes_inside'] / 1e9:,.1f} GB inside a node and "
            f"{step['exchange_bytes_between'] / 1e9:,.1f} GB between nodes for each GPU, "
            f"{step['exchange_seconds']:.2f} s"
        )
    return lines


def _serving(rows: list[Facts]) -> list[str]:
    if not rows:
        return ["", "serving: the config names no window; set model.native_window"]
    lines = ["", f"serving, {'window':>12}{'scale':>8}{'keys and values (bfloat16)':>30}"]
    return lines + [f"{row['window']:>21,}{row['scale']:>8g}{row['cache_bytes'] / 1e9:>27.2f} GB" for row in rows]
