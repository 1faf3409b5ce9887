"""Training in real processes: torchrun starts this file, and every process writes down what it saw.

    python processes.py RECIPE[:STOP] …    each in turn; one with STOP gets SIGTERM in its last process at that step

Beside each recipe file stands, for each process, the placements that arrived: a line a micro-batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RANK = int(os.environ.get("RANK", "0"))


def placement_key(placement: Any) -> str:
    """A placement as text: its scale and a hash of its positions."""
    return f"{placement.scale!r} {hashlib.sha256(placement.positions.tobytes()).hexdigest()[:16]}"


def seen_file(recipe: Path, rank: int) -> Path:
    return recipe.with_suffix(f".seen{rank}.jsonl")


def seen(recipe: Path, processes: int) -> dict[int, list[str]]:
    """Step -> the placements that arrived in any process during it, sorted."""
    found: dict[int, list[str]] = {}
    for rank in range(processes):
        for line in seen_file(recipe, rank).read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["step"], []).extend(row["placements"])
    return {step: sorted(keys) for step, keys in found.items()}


def torchrun(processes: int, *recipes: str) -> str:
    """Run the recipes in `processes` gloo processes; returns what they printed. Raises AssertionError with it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*command, __file__, *recipes], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _spy(recipe: Path, stop: int | None) -> Any:
    """Let the Trainer write what arrives; returns its own method."""
    from e2llm.train.distributed import local
    from e2llm.train.trainer import PlacingTrainer

    own = PlacingTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        if model.training:
            step = self.state.global_step + 1
            held = sum(local(parameter).numel() for parameter in model.parameters())
            row = {"step": step, "placements": [placement_key(p) for p in inputs["placements"]], "numbers_held": held}
            with seen_file(recipe, RANK).open("a") as file:
                file.write(json.dumps(row) + "\n")
            if step == stop and RANK == int(os.environ.get("WORLD_SIZE", "1")) - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return own(self, model, inputs, *args, **options)

    PlacingTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    return own


class _Allocated(TorchDispatchMode):
    """Bytes of new tensors, as they are made: those dropped again count too."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.bytes += 0 if storage._cdata in given else storage.nbytes()
        return out


def _held(model: torch.nn.Module) -> int:
    return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters() if not parameter.is_meta)


@contextmanager
def _spy_on_loading(recipe: Path) -> Iterator[None]:
    """Write down the bytes of weights in each process until they are sharded, and its buffers."""
    from accelerate import Accelerator

    from e2llm.train import run as module

    load, prepare, row = module.load_model, Accelerator.prepare, {}

    def load_model(*args: Any, **options: Any) -> Any:
        with _Allocated() as allocated:
            found = load(*args, **options)
        model = found[0]
        row["read"], row["allocated"] = _held(model), allocated.bytes
        row["buffers"] = {name: b.tolist() for name, b in model.named_buffers()}
        return found

    def to_prepare(self: Any, *given: Any, **options: Any) -> Any:
        models = [one for one in given if isinstance(one, torch.nn.Module)]
        row["unsharded"] = max(row.get("unsharded", 0), *map(_held, models), 0)
        recipe.with_suffix(f".loaded{RANK}.json").write_text(json.dumps(row))
        return prepare(self, *given, **options)

    module.load_model, Accelerator.prepare = load_model, to_prepare  # type: ignore[attr-defined,method-assign]
    try:
        yield
    finally:
        module.load_model, Accelerator.prepare = load, prepare  # type: ignore[attr-defined,method-assign]


def run(recipe_file: Path, stop: int | None) -> None:
    """Train, or go on where the run folder holds a run; with what arrives written down."""
    from e2llm.config import load_recipe
    from e2llm.train import train
    from e2llm.train.trainer import PlacingTrainer

    own = _spy(recipe_file, stop)
    try:
        recipe = load_recipe(str(recipe_file))
        with _spy_on_loading(recipe_file):
            result = train(recipe, resume=(recipe.run_folder / "recipe.toml").is_file(), quiet=True)
    finally:
        PlacingTrainer.compute_loss = own  # type: ignore[method-assign]
    assert (result.model_folder is None) == bool(stop), f"{recipe_file}: ended at step {result.steps}"


def main() -> None:
    warnings.simplefilter("ignore")
    for argument in sys.argv[1:]:
        name, _, stop = argument.partition(":")
        run(Path(name), int(stop) if stop else None)


if __name__ == "__main__":
    main()
