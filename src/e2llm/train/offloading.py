"""A run whose frozen base waits in host memory or on a disk: the recipe's `model.offload`.

Flows in: a recipe, a model in host memory with its adapters. Flows out: the model with its frozen layers offloaded
(`hf.offload`), files in `<output>/offload` that do not outlive the run, or a ValueError before weights are read.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from e2llm.config import Recipe
from e2llm.hf.offload import offload_frozen

FOLDER = "offload"
"""Below the run folder."""


def check_room(recipe: Recipe, folder: Path) -> None:
    """Raise ValueError where the disk of `folder` has no room for what `model.offload` = disk would write.

    Goes by the files of a base in a folder, in their own type: those of a hub name are not known yet.
    """
    base = Path(recipe.model.name).expanduser()
    if recipe.model.offload != "disk" or not base.is_dir():
        return
    needed = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    existing = next(place for place in (folder, *folder.resolve().parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"model.offload = 'disk': the base has {needed / 1e9:.1f} GB and the disk of {str(folder)!r} "
            f"{free / 1e9:.1f} GB of room; choose an output on another disk, or model.offload = cpu"
        )


def offload(recipe: Recipe, model: nn.Module, folder: Path, console: Console | None) -> None:
    """Offload the frozen layers of `model`, telling `console` how far it is; the rest goes to the GPU, if there is
    one. Whatever an earlier run that was cut off left in the folder is removed first."""
    remove_offloaded(folder)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    place = recipe.model.offload
    assert place != "none"
    if console is None:
        offload_frozen(model, place, device, folder / FOLDER)
        return
    with console.status(f"offloading the base to {place}") as status:
        size = offload_frozen(
            model,
            place,
            device,
            folder / FOLDER,
            lambda done, layers: status.update(f"offloading the base to {place}: layer {done} of {layers}"),
        )
    where = "host memory" if place == "cpu" else str(folder / FOLDER)
    console.print(
        f"{size / 1e9:.2f} GB of frozen weights wait in {where}; every batch reads them twice, forward and backward",
        highlight=False,
    )


def remove_offloaded(folder: Path) -> None:
    """Remove what `offload` wrote into a run folder."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
