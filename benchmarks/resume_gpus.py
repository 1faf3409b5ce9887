"""A run that begins on two GPUs and ends on one: `python benchmarks/resume_gpus.py`.

Trains the shipped tiny base three ways with the same recipe: on one GPU to the end; by FSDP2 on two to the end; by
FSDP2 on two until SIGTERM, then on one to the end. Writes benchmarks/results/train_resume.json: the loss of every
step of each, and the largest differences. Without GPUs the same runs in two gloo processes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

STEPS, STOP, WINDOW = 120, 20, 256
BASE = "tiny-512"
WHOLE, SPREAD, MOVED = "one", "two", "two, then one"


def command(folder: Path, text: Path, processes: int, *, resume: bool = False) -> list[str]:
    """`e2llm train` in so many processes; the samples of a step are the same in any number of them. What is resumed
    stays FSDP2, in one process too."""
    launched = processes > 1 or resume
    settings = [
        f"model.name={ROOT / 'src' / 'e2llm' / 'assets' / BASE}",
        f"output={folder}",
        f'data.sources=[{{path="{text}"}}]',
        f"data.cache_dir={text.parent / 'tokens'}",
        f"data.window={WINDOW}",
        "data.held_out_fraction=0",
        f"train.steps={STEPS}",
        "train.log_every=1",
        "train.evaluate_windows=0",
        f"train.save_every={STOP}",
        f"distributed.strategy={'fsdp2' if launched else 'none'}",
        "distributed.global_batch=8",
        "train.batch_size=4",
    ]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    words = [word for setting in settings for word in ("--set", setting)]
    start = [sys.executable, "-m", *(launcher if launched else []), "e2llm", "train", "recommended-yarn"]
    return [*start, *words, *(["--resume"] if resume else [])]


def run(words: list[str], stop_after: Path | None = None) -> None:
    """To its end, or until SIGTERM once `stop_after` lies there."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(words, env=environment)
    while stop_after is not None and process.poll() is None and not stop_after.exists():
        time.sleep(0.05)
    if stop_after is not None:
        process.send_signal(signal.SIGTERM)  # torchrun hands it to its processes
    code = process.wait()
    if code and stop_after is None:
        raise SystemExit(f"exit code {code}: {' '.join(words)}")


def losses(folder: Path) -> list[float]:
    """Loss (nats a token) of each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def loss_rows(found: dict[str, list[float]], stopped_after: int) -> list[dict[str, Any]]:
    """A row a loss and one of the largest difference, for each run by its name. `gpus`: those of the step."""
    from e2llm.records import make_row

    rows = []
    for run, values in found.items():
        strategy = "none" if run == WHOLE else "fsdp2"
        common = {"run": run, "trainer": "e2llm", "shape": BASE, "window": WINDOW, "parallelism": strategy}
        gpus = [2 if run == SPREAD or (run == MOVED and step < stopped_after) else 1 for step in range(len(values))]
        rows += [
            make_row("loss", value, "nats", 1, step=step + 1, gpus=gpus[step], **common)
            for step, value in enumerate(values)
        ]
        largest = max(abs(a - b) for a, b in zip(values, found[WHOLE], strict=True))
        whole = gpus[0] if len(set(gpus)) == 1 else None  # a run that moved has no one number
        rows.append(make_row("largest_loss_difference", largest, "nats", len(values), gpus=whole, **common))
    return rows


def main() -> None:
    from e2llm.benchmark.trainers import write_text
    from e2llm.records import Record
    from e2llm.train.sharded import COMPLETE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "train_resume.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        text = write_text(work / "text")
        whole, spread, moved = (work / name for name in ("one", "two", "moved"))
        run(command(whole, text, 1))
        run(command(spread, text, 2))
        run(command(moved, text, 2), stop_after=moved / "checkpoints" / f"checkpoint-{STOP}" / COMPLETE)
        ended = len(losses(moved))
        if ended >= STEPS:
            raise SystemExit(f"the run ended after {ended} steps, before SIGTERM reached it: nothing to resume")
        run(command(moved, text, 1, resume=True))
        found = {WHOLE: losses(whole), SPREAD: losses(spread), MOVED: losses(moved)}
    for name, values in found.items():
        if len(values) != STEPS:
            raise SystemExit(f"{name}: {len(values)} losses of {STEPS}")
    rows = loss_rows(found, ended)
    for row in rows:
        if row["metric"] == "largest_loss_difference":
            print(f"{row['run']:14} largest difference {row['value']:.6f}")
    Record("train_resume", config={"steps": STEPS, "stopped_after": ended}, rows=rows).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
