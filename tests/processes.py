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
from pathlib import Path
from typing import Any

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


def _spy_on_loading(recipe: Path) -> None:
    """Write down the bytes of weights that each process holds before they are sharded, and its rotary tables."""
    from e2llm.train import run as module

    own = module.load_model

    def load_model(*args: Any, **options: Any) -> Any:
        module.load_model = own  # type: ignore[attr-defined]
        found = own(*args, **options)
        model = found[0]
        buffers = {name: b.tolist() for name, b in model.named_buffers()}
        row = {"read": sum(p.untyped_storage().nbytes() for p in model.parameters()), "buffers": buffers}
        recipe.with_suffix(f".loaded{RANK}.json").write_text(json.dumps(row))
        return found

    module.load_model = load_model  # type: ignore[attr-defined]


def run(recipe_file: Path, stop: int | None) -> None:
    """Train, or go on where the run folder holds a run; with what arrives written down."""
    from e2llm.config import load_recipe
    from e2llm.train import train
    from e2llm.train.trainer import PlacingTrainer

    own = _spy(recipe_file, stop)
    _spy_on_loading(recipe_file)
    try:
        recipe = load_recipe(str(recipe_file))
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
