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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

STEPS, STOP = 120, 20
WHOLE, SPREAD, MOVED = "one", "two", "two, then one"


def command(folder: Path, text: Path, processes: int, *, resume: bool = False) -> list[str]:
    """`e2llm train` in so many processes; the samples of a step are the same in any number of them. What is resumed
    stays FSDP2, in one process too."""
    launched = processes > 1 or resume
    settings = [
        f"model.name={ROOT / 'src' / 'e2llm' / 'assets' / 'tiny-512'}",
        f"output={folder}",
        f'data.sources=[{{path="{text}"}}]',
        f"data.cache_dir={text.parent / 'tokens'}",
        "data.window=256",
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
    start = [sys.executable, "-m", *(launcher if launched else []), "e2llm", "train", "recommended"]
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


def main() -> None:
    from e2llm.benchmark.trainers import write_text
    from e2llm.records import Record, make_row
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
    rows = []
    for name, values in found.items():
        if len(values) != STEPS:
            raise SystemExit(f"{name}: {len(values)} losses of {STEPS}")
        common = {"gpus": name, "parallelism": "none" if name == WHOLE else "fsdp2"}
        rows += [make_row("loss", value, "nats", 1, step=i + 1, **common) for i, value in enumerate(values)]
        largest = max(abs(a - b) for a, b in zip(values, found[WHOLE], strict=True))
        rows.append(make_row("largest_loss_difference", largest, "nats", STEPS, **common))
        print(f"{name:14} first {values[0]:.4f}, last {values[-1]:.4f}, largest difference {largest:.6f}")
    Record("train_resume", config={"steps": STEPS, "stopped_after": ended}, rows=rows).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
