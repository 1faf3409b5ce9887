"""Is the fast arithmetic the exact one? The same run in several, loss beside loss.

    python benchmarks/loss_curves.py --model SmolLM2-135M-Instruct.gguf --shape smollm2-135m --text DIR/train

Trains one recipe on the same windows, scales and offsets, in float32 throughout (the reference), with bfloat16
arithmetic over float32 weights (what most trainers do: the yardstick), and with bfloat16 weights whose float32 masters
are cut in two (`adamw_split`). Writes benchmarks/results/train_losses.json: the losses of each, training and held out.
A run that is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

ARITHMETIC = {
    "float32": ("model.dtype=float32", "train.precision=float32"),
    "bfloat16": ("model.dtype=float32", "train.precision=bfloat16"),
    "bfloat16, adamw_split": ("model.dtype=bfloat16", "train.precision=bfloat16", "train.optimizer=adamw_split"),
}
"""Label -> settings. The first is the reference."""


def train(name: str, settings: tuple[str, ...], args: argparse.Namespace) -> dict[str, Any]:
    """The train.json of one run."""
    folder = args.work / name.replace(", ", "-")
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
            f"train.steps={args.steps}",
            "train.log_every=1",
            # Two windows: float32 has no attention kernel for grouped keys, so R x R scores a head are held; and
            # adamw_split takes no gradients of several batches.
            "train.batch_size=2",
            "train.gradient_accumulation=1",
            "train.evaluate_scales=[1, 4, 16]",
            *settings,
            *args.set,
        ]
        words = [word for setting in given for word in ("--set", setting)]
        words += ["--resume"] if (folder / "checkpoints").is_dir() else []
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
        subprocess.run([sys.executable, "-m", "e2llm", "train", args.recipe, *words], check=True, env=environment)
    return json.loads(record.read_text(encoding="utf-8"))


def loss_rows(found: dict[str, Any], **labels: str) -> list[dict[str, Any]]:
    """The losses (nats a token) of a run's train.json, with what tells this run from others. It had one process."""
    from e2llm.records import labels_of, make_row

    own = {"trainer": "e2llm", "window": found["config"]["data"]["window"], "gpus": 1, "parallelism": "none"}
    losses = [row for row in found["rows"] if row["metric"] == "loss"]
    return [make_row("loss", row["value"], "nats", row["n"], **labels_of(row), **own, **labels) for row in losses]


def main() -> None:
    """One run after another, then the Record."""
    from e2llm.records import Record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shape", required=True, help="the model's shape, as rows name it: smollm2-135m")
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--recipe", default="recommended")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, default=Path("runs/loss-curves"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "train_losses.json")
    args = parser.parse_args()
    rows, config = [], {}
    environment: dict[str, Any] = {}
    for name, settings in ARITHMETIC.items():
        found = train(name, settings, args)
        # The runs', not this process's: it never loads torch and would name no GPU.
        where = found["environment"]
        if environment and environment.get("gpu") != where.get("gpu"):
            raise SystemExit(f"{args.work}: ran on {environment.get('gpu')} and on {where.get('gpu')}: remove one")
        environment = where
        config[name] = {"settings": list(settings), "train": found["config"]["train"]}
        rows += loss_rows(found, shape=args.shape, arithmetic=name)
    given = [setting for setting in args.set if not setting.startswith("data.cache_dir=")]  # a place, not a choice
    shared = {"recipe": args.recipe, "steps": args.steps, "set": given, "arithmetic": config}
    Record(kind="train_losses", config=shared, rows=rows, environment=environment).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
