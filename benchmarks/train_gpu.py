"""Training on GPUs: `python benchmarks/train_gpu.py` writes benchmarks/results/train_*.json in some five minutes.

Two queues of `e2llm benchmark train`, each on a GPU of its own (one after another where there is one GPU): the 135M
shape with all trainers and its profile, then our windows and full length up to 32k of Figure 1; the 1B and 7B LoRA
shapes, then Figure 1's long windows as far as the time allows. Every Record is saved after each contestant; what
`--until` leaves no time for is named. Packages of peers (liger-kernel, litgpt, unsloth) are used where they are
installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))


@dataclass(frozen=True)
class Job:
    """One call of `e2llm benchmark train`, on one GPU; those of `TOGETHER` on two."""

    name: str
    """The Record is train_<name>.json."""
    options: tuple[str, ...]
    full: bool = True
    """All weights are trained: --set-full applies."""
    limit: float = 1.0
    """Times --time-limit: a step at 64k takes a quarter of a minute."""


STEPS = ("--steps", "10", "--warmup", "5", "--block", "2")
# FSDP2 keeps float32 masters itself: what all weights are set to otherwise is not for it.
MASTERS = ("--set", "train.optimizer=adamw", "--set", "model.dtype=float32")
TOGETHER = (
    Job("llama-1b_ddp", ("--shape", "llama-1b", *STEPS, "--trainers", "e2llm:8", "--gpus", "1", "2", "--parallelism",
                         "ddp")),
    Job(
        "llama-1b_fsdp2",
        ("--shape", "llama-1b", *STEPS, "--trainers", "e2llm:8", "--gpus", "1", "2", "--parallelism", "fsdp2",
         *MASTERS),
        full=False,
        limit=2,
    ),
    Job(
        "llama-2-7b_fsdp2",
        ("--shape", "llama-2-7b", *STEPS, "--trainers", "e2llm", "--gpus", "2", "--parallelism", "fsdp2",
         "--checkpointing", *MASTERS),
        full=False,
        limit=2,
    ),
)  # fmt: skip
"""After the queues, with --two: scaling, and all weights of a model that does not fit on one GPU."""
TOGETHER_SMALL = (
    Job(
        "tiny_two_gpus",
        ("--shape", "tiny", "--steps", "2", "--warmup", "1", "--block", "1", "--set", "train.compile=none", "--window",
         "64", "--trainers", "e2llm", "--gpus", "1", "2"),
    ),
)  # fmt: skip


def queues(arguments: argparse.Namespace) -> list[list[Job]]:
    """What each GPU does, in order."""
    litgpt = ["litgpt"] if importlib.util.find_spec("litgpt") else []
    unsloth = ["unsloth"] if importlib.util.find_spec("unsloth") else []
    smollm2 = ["e2llm:8,16,32", "hf:8", "e2llm-plain-positions:16", "e2llm-far-keys:16", *litgpt, "hf-liger:8,16"]
    smollm2 += ["hf-liger-compile:8", "hf-liger-compile-own-loss:8", "hf-liger-compile-own-rope:8", "hf-compile:8"]
    smollm2 += [name for one in unsloth for name in (f"{one}:8", f"{one}-float32:8")]
    llama = ["e2llm", "hf", "hf-liger", "hf-liger-compile", *litgpt, *unsloth]
    adapters = ["e2llm:1,2,3", "hf:1", "hf-liger:1,2", "hf-liger-compile:1", *(f"{one}:1,2" for one in unsloth)]
    lora = ("--shape", "llama-2-7b-lora", "--checkpoint-from", "16k", "--figure1")
    steps = STEPS
    few = ("--steps", "4", "--warmup", "2", "--block", "2")  # one at 64k takes a quarter of a minute
    whole = ("--shape", "llama-1b", "--checkpoint-from", "16k", "--figure1", *few)
    first = [
        Job("smollm2-135m", ("--shape", "smollm2-135m", "--trainers", *smollm2, "--profile", "PROFILE")),
        Job("figure1_7b-lora", (*lora, *steps, "--full-windows", "16k", "32k"), full=False),
    ]
    ours = (*steps, "--window", "4k", "8k", "--full-windows", "--checkpointing")
    first.append(Job("figure1_7b-lora_recomputed", (*lora, *ours), full=False))
    second = [
        Job("llama-1b", ("--shape", "llama-1b", *steps, "--trainers", *llama)),
        Job(
            "llama-2-7b-lora",
            ("--shape", "llama-2-7b-lora", *steps, "--trainers", *adapters, "--profile", "PROFILE"),
            full=False,
            limit=2 if unsloth else 1,  # it reads its model from a folder, where 13.5 GB are written first
        ),
        Job(
            "llama-2-7b-qlora", ("--shape", "llama-2-7b-qlora", *steps, "--trainers", "e2llm", "--checkpointing"), False
        ),
        Job("figure1_1b", (*whole, "--window", "4k", "8k", "--full-windows", "16k", "32k", "64k", "128k"), limit=2),
        Job("figure1_7b-lora_64k", (*lora, *few, "--window", "--full-windows", "64k"), full=False, limit=2),
        Job("figure1_7b-lora_128k", (*lora, *few, "--window", "--full-windows", "128k"), full=False, limit=4),
    ]
    if arguments.small:
        tiny = ("--steps", "2", "--warmup", "1", "--block", "1", "--set", "train.compile=none", "--window", "64")
        first = [
            Job("tiny", ("--shape", "tiny", *tiny, "--trainers", "e2llm", "hf", "--profile", "PROFILE")),
            Job("figure1_tiny", ("--shape", "tiny", *tiny, "--figure1", "--full-windows", "256")),
        ]
        second = [Job("tiny-lora", ("--shape", "tiny-lora", *tiny, "--trainers", "e2llm", "hf-liger"), full=False)]
    chosen = [[job for job in jobs if not arguments.only or job.name in arguments.only] for jobs in (first, second)]
    return [jobs for jobs in chosen if jobs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--work", type=Path, default=Path("runs/train-gpu"), help="tokens and compiled kernels")
    parser.add_argument("--until", type=float, default=330.0, metavar="SECONDS", help="nothing runs after this (330)")
    parser.add_argument("--time-limit", type=float, default=80.0, metavar="SECONDS", help="for one contestant (80)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our trainers, in every job")
    split = "where all weights train (bfloat16 weights and adamw_split)"
    parser.add_argument("--set-full", action="append", metavar="KEY=VALUE", help=split)
    parser.add_argument("--only", nargs="+", default=[], metavar="JOB", help="these jobs: llama-1b, figure1_7b-lora, …")
    parser.add_argument("--two", action="store_true", help="then both GPUs together: scaling, 7B with all weights")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run? (also without a GPU)")
    arguments = parser.parse_args()
    if arguments.set_full is None:
        arguments.set_full = [] if arguments.small else ["model.dtype=bfloat16", "train.optimizer=adamw_split"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    begin, codes = time.monotonic(), {}
    gpus = visible_gpus()
    lines = queues(arguments)
    if len(gpus) < len(lines):
        lines = [[job for jobs in lines for job in jobs]]

    def work(gpu: str, jobs: list[Job]) -> None:
        for job in jobs:
            left = arguments.until - (time.monotonic() - begin)
            codes[job.name] = run(job, gpu, left, arguments) if left > 10 else "not run: time was up"

    threads = [threading.Thread(target=work, args=pair) for pair in zip(gpus, lines, strict=False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = (TOGETHER_SMALL if arguments.small else TOGETHER) if arguments.two else ()
    together = tuple(job for job in together if not arguments.only or job.name in arguments.only)
    work(",".join((*gpus, "1")[:2]), list(together))
    for jobs in [*lines, together]:
        for job in jobs:
            table(record_of(job, arguments))
    print(f"{time.monotonic() - begin:.0f} s in all; exit codes {codes}", flush=True)
    return 0 if all(code == 0 for code in codes.values()) else 1


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be; one entry at least, so that a machine without GPUs tries everything out."""
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    # In a process of its own: counting them here could leave a context on one.
    code = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [str(number) for number in range(int(found.stdout))] or ["0"]


def record_of(job: Job, arguments: argparse.Namespace) -> Path:
    return Path(arguments.out) / f"train_{job.name}.json"


def run(job: Job, gpu: str, left: float, arguments: argparse.Namespace) -> int:
    """The exit code of one job. A new Record takes the old one's place with its first contestant."""
    folder = arguments.work / f"gpu{gpu.replace(',', '-')}"  # one job at a time runs there
    profile = str(arguments.work / f"{job.name}.profile.txt")
    settings = [*arguments.set, *(arguments.set_full if job.full else [])]
    command = ["benchmark", "train", *(profile if word == "PROFILE" else word for word in job.options)]
    command += [word for setting in settings for word in ("--set", setting)]
    command += ["--time-limit", f"{job.limit * arguments.time_limit:g}", "--until", f"{left:.0f}"]
    command += ["--work", str(folder), "--out", str(record_of(job, arguments))]
    print(f"GPU {gpu}: e2llm {' '.join(command)}", flush=True)
    kernels = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(arguments.work.resolve() / "inductor"))
    return e2llm(command, [gpu], left, name=job.name, TORCHINDUCTOR_CACHE_DIR=kernels)


def e2llm(words: Sequence[str], gpus: Sequence[str], left: float, *, name: str = "", **environment: str) -> int:
    """The exit code of one `e2llm`; 1, saying so of `name`, where it did not end by itself."""
    environment |= {
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    program = [sys.executable, "-c", "import sys; from e2llm.cli import main; sys.exit(main())"]
    try:
        return subprocess.run([*program, *words], env=os.environ | environment, timeout=left + 20).returncode
    except subprocess.TimeoutExpired:
        print(f"{name}: ".removeprefix(": ") + f"ended after {left + 20:.0f} s", flush=True)
        return 1


def table(path: Path) -> None:
    from e2llm.benchmark.train_command import table as text_of
    from e2llm.records import Record

    if not path.is_file():
        print(f"\n{path.name}: no Record")
        return
    record = Record.load(path)
    print(f"\n{path.name}, {record.environment.get('gpu') or record.environment.get('cpu')}\n{text_of(record)}")
    for name, why in record.config["failed"].items():
        print(f"FAILED {name}: {why}")
    for key in ("out_of_memory", "not_run"):
        for name in record.config[key]:
            print(f"{key.replace('_', ' ')}: {name}")


if __name__ == "__main__":
    sys.exit(main())
