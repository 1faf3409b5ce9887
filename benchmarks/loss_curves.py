"""Is the fast arithmetic the exact one? The same run in several, loss beside loss.

    python benchmarks/loss_curves.py --model FOLDER --shape smollm2-135m --text DIR/train --set train.compile=layers

Trains one recipe on the same windows, scales and offsets: by transformers' own model and PyTorch's AdamW in float32
(`plain_trainer.py`, the reference: nothing of ours computes), the same with other scales and offsets (the noise: what
another seed changes), and by our trainer in float32 throughout, in bfloat16 arithmetic over float32 weights (what most
trainers do), and with bfloat16 weights whose float32 masters are cut in two (`adamw_split`: the fast one). Writes
benchmarks/results/train_losses.json: the losses of each, training and held out, and how far each is from the reference.
A run that is finished is not run again. FOLDER is a model of transformers or a GGUF file; no network is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))


@dataclass(frozen=True)
class Way:
    """One way to compute the run."""

    settings: tuple[str, ...]
    trainer: str = "e2llm"
    noise: bool = False
    """It differs from the reference by chance alone."""


_FLOAT32 = ("model.dtype=float32", "train.precision=float32")
WAYS = {
    "transformers, float32": Way(_FLOAT32, "transformers"),
    "transformers, float32, other draws": Way((*_FLOAT32, "seed=1000"), "transformers", noise=True),
    "float32": Way(_FLOAT32),
    "bfloat16": Way(("model.dtype=float32", "train.precision=bfloat16")),
    "bfloat16, adamw_split": Way(("model.dtype=bfloat16", "train.precision=bfloat16", "train.optimizer=adamw_split")),
}
"""Label -> way. The first is the reference. `seed` draws scales and offsets; windows are `data.seed`'s."""


def train(name: str, way: Way, args: argparse.Namespace) -> dict[str, Any]:
    """The train.json of one run."""
    folder = args.work / name.replace(", ", "-").replace(" ", "-")
    record = folder / "train.json"
    if not record.is_file():
        sources = ", ".join(
            f'{{path={json.dumps(str(file))}, weight={file.stat().st_size}, separator="<|endoftext|>"}}'
            for file in sorted(args.text.glob("*.txt"))
        )
        given = [
            f"model.name={args.model}",
            f"output={folder}",
            f"data.sources=[{sources}]",
            f"data.cache_dir={args.work / 'cache'}",
            "data.held_out_fraction=0.01",
            "data.planted_weight=1",
            f"train.steps={args.steps}",
            "train.log_every=1",
            # Two windows: float32 has no attention kernel for grouped keys, so R x R scores a head are held; and
            # adamw_split takes no gradients of several batches.
            "train.batch_size=2",
            "train.gradient_accumulation=1",
            "train.evaluate_scales=[1, 4, 16]",
            *args.set,
            *way.settings,
        ]
        words = [word for setting in given for word in ("--set", setting)]
        plain = way.trainer == "transformers"
        words += ["--resume"] if (folder / "checkpoints").is_dir() else []
        command = [str(ROOT / "benchmarks" / "plain_trainer.py")] if plain else ["-m", "e2llm", "train"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
        subprocess.run([sys.executable, *command, args.recipe, *words], check=True, env=environment)
    found = json.loads(record.read_text(encoding="utf-8"))
    if found["config"]["train"]["steps"] != args.steps:
        raise SystemExit(f"{folder}: a run of {found['config']['train']['steps']} steps; remove it, or use --work")
    return found


def loss_rows(found: dict[str, Any], *, trainer: str = "e2llm", **labels: str) -> list[dict[str, Any]]:
    """The losses (nats a token) of a run's train.json, with what tells this run from others. It had one process."""
    from e2llm.records import labels_of, make_row

    own = {"trainer": trainer, "window": found["config"]["data"]["window"], "gpus": 1, "parallelism": "none"}
    losses = [row for row in found["rows"] if row["metric"] == "loss"]
    return [make_row("loss", row["value"], "nats", row["n"], **labels_of(row), **own, **labels) for row in losses]


def difference_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far each way's losses are from those of the first, nats: over training steps the mean with its interval, the
    mean and the largest of the amounts; over the scales of held-out losses the largest amount."""
    from e2llm.intervals import interval_fields, interval_of_ratio
    from e2llm.records import make_row

    curves: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault(row["arithmetic"], {})[row["split"], row["step"], row.get("scale")] = row
    (reference, first), *others = curves.items()
    found = []
    for name, curve in others:
        if curve.keys() != first.keys():
            raise ValueError(f"{name}: its steps are not those of {reference}")
        labels = {key: row[key] for row in [next(iter(curve.values()))] for key in ("trainer", "window", "shape")}
        labels |= {"gpus": 1, "parallelism": "none", "arithmetic": name, "reference": reference}
        labels |= {"noise": True} if WAYS[name].noise else {}
        apart = {which: row["value"] - first[which]["value"] for which, row in curve.items()}
        steps = [value for which, value in apart.items() if which[0] == "train"]
        scales = [abs(value) for which, value in apart.items() if which[0] == "held_out"]
        interval = interval_fields(interval_of_ratio(steps, [1.0] * len(steps)))
        amounts = [abs(value) for value in steps]
        for metric, value, split in (
            ("loss_difference", sum(steps) / len(steps), "train"),
            ("absolute_loss_difference", sum(amounts) / len(amounts), "train"),
            ("largest_loss_difference", max(amounts), "train"),
            *([("largest_loss_difference", max(scales), "held_out")] if scales else []),
        ):
            n = len(steps) if split == "train" else len(scales)
            ends = interval if metric == "loss_difference" else {}
            found.append(make_row(metric, value, "nats", n, **labels, over=split, **ends))
    return found


def main() -> None:
    """One run after another, then the Record."""
    from e2llm.records import Record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shape", required=True, help="the model's shape, as rows name it: smollm2-135m")
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--recipe", default="recommended-yarn")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, default=Path("runs/loss-curves"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "train_losses.json")
    args = parser.parse_args()
    rows, config = [], {}
    environment: dict[str, Any] = {}
    for name, way in WAYS.items():
        found = train(name, way, args)
        # The runs', not this process's: it never loads torch and would name no GPU.
        where = found["environment"]
        if environment and environment.get("gpu") != where.get("gpu"):
            raise SystemExit(f"{args.work}: ran on {environment.get('gpu')} and on {where.get('gpu')}: remove one")
        environment = where
        config[name] = {"settings": list(way.settings), "train": found["config"]["train"]}
        rows += loss_rows(found, trainer=way.trainer, shape=args.shape, arithmetic=name)
    given = [setting for setting in args.set if not setting.startswith("data.cache_dir=")]  # a place, not a choice
    shared = {"recipe": args.recipe, "steps": args.steps, "set": given, "arithmetic": config}
    rows += difference_rows(rows)
    Record(kind="train_losses", config=shared, rows=rows, environment=environment).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
