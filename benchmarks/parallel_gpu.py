"""Every way to share a run over the GPUs of a machine: `python benchmarks/parallel_gpu.py --until 560`.

One call of `e2llm benchmark train`: one GPU, then on all of them (or --gpus) DDP, FSDP2, HSDP (from four on), tensor
parallelism, ZeRO-2 and ZeRO-3 where DeepSpeed is installed, and weights and optimizer in host memory; the 1B shape with
float32 masters, the same settings for each, few steps. Writes benchmarks/results/train_parallel_<shape>_<gpus>.json
after each: tokens a second, peak memory, and how many times as fast as one GPU. A way that fails with compiled layers
is tried without, into train_parallel_<shape>_<gpus>_uncompiled.json, beside one GPU without.

Called again with the same --work it goes on: what was measured is not run again. Nothing runs after --until; who is
left is named. Exit code 0: all was measured but what lacks a package.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(Path(__file__).parent))

from train_gpu import e2llm, table, visible_gpus  # noqa: E402

from e2llm.benchmark.train_contestants import PARALLELISM  # noqa: E402
from e2llm.records import Record  # noqa: E402

ORDER = ("ddp", "fsdp2", "hsdp", "tensor", "deepspeed", "zero3", "fsdp2-offload", "zero3-offload")
"""What most people use first; what is slow last."""
STEPS = ("--steps", "6", "--warmup", "4", "--block", "2")
# FSDP2 and ZeRO keep float32 masters themselves; all ways have the settings of one GPU.
MASTERS = ("--set", "train.optimizer=adamw", "--set", "model.dtype=float32")
SMALL = ("--steps", "2", "--warmup", "1", "--block", "1", "--window", "64", "--set", "train.workers=0")
UNCOMPILED = "train.compile=none"
LEAST = 30.0
"""Seconds below which another call is not worth its start."""


def ways(gpus: int, only: Sequence[str]) -> list[str]:
    """Those that so many GPUs can take, in order; ValueError for names of `only` that are none or need more."""
    known = [name for name in ORDER if gpus >= PARALLELISM[name].least]
    for name in only:
        if name not in known:
            raise ValueError(f"--only {name}: on {gpus} GPUs there are {', '.join(known)}")
    return [name for name in known if not only or name in only]


def call(chosen: Sequence[str], out: Path, args: argparse.Namespace, settings: Sequence[str], left: float) -> list[str]:
    """Arguments of one `e2llm`."""
    words = ["benchmark", "train", "--shape", args.shape, "--trainers", f"e2llm:{args.batch_size}", "--resume"]
    words += [*(SMALL if args.small else STEPS), *MASTERS, "--gpus", "1", str(args.gpus), "--parallelism", *chosen]
    words += [word for setting in settings for word in ("--set", setting)]
    words += ["--time-limit", f"{args.time_limit:g}", "--until", f"{max(left, 1.0):.0f}"]
    return [*words, "--work", str(args.work), "--out", str(out)]


def run(words: list[str], gpus: Sequence[str], left: float) -> int:
    """The exit code; 1 where it did not end by itself."""
    print(f"e2llm {' '.join(words)}", flush=True)
    return e2llm(words, gpus, left)


@dataclass(frozen=True)
class Outcome:
    """What a Record says of ways that were asked for."""

    broken: list[str]
    """Ways that failed."""
    lacking: list[str]
    """Ways whose package is not installed."""
    late: list[str]
    """Ways that had no time. Here and above `none` is one GPU."""


def outcome(record: Record, chosen: Sequence[str]) -> Outcome:
    """A way that ran out of memory is measured: the Record names it."""
    measured = {row["parallelism"] for row in record.rows if row["metric"] == "tokens_per_second"}
    found = Outcome([], [], [])
    for way in ("none", *chosen):
        told = f" by {way}" if way != "none" else ""
        errors = [why for who, why in record.config["failed"].items() if _is(who, told)]
        if errors:
            (found.lacking if "needs a package" in errors[0] else found.broken).append(way)
        elif way not in measured and not any(_is(who, told) for who in record.config["out_of_memory"]):
            found.late.append(way)
    return found


def _is(contestant: str, told: str) -> bool:
    return contestant.endswith(told) if told else " by " not in contestant


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="of e2llm benchmark train (llama-1b)")
    parser.add_argument("--gpus", type=int, help="how many share a run (all that are visible)")
    parser.add_argument("--batch-size", type=int, help="windows of 4096 tokens a GPU takes at once (8)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WAY", help=f"of {', '.join(ORDER)}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, for all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--work", type=Path, default=Path("runs/parallel-gpu"), help="kernels, and what was measured")
    parser.add_argument("--until", type=float, default=1800.0, metavar="SECONDS", help="nothing runs after this (1800)")
    parser.add_argument("--time-limit", type=float, default=180.0, metavar="SECONDS", help="for one contestant (180)")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run? (also without a GPU)")
    args = parser.parse_args(given)
    begin, present = time.monotonic(), visible_gpus()
    args.shape = args.shape or ("tiny" if args.small else "llama-1b")
    args.batch_size = args.batch_size or (2 if args.small else 8)
    args.gpus = args.gpus or (2 if args.small else len(present))
    if args.gpus < 2 or (len(present) < args.gpus and not args.small):
        parser.error(f"--gpus {args.gpus}: {len(present)} are visible, and ways to share a run need two or more")
    try:
        chosen = ways(args.gpus, args.only)
    except ValueError as error:
        parser.error(str(error))
    left_out = [name for name in ORDER if args.gpus < PARALLELISM[name].least]
    for name in left_out:
        print(f"{name}: left out, it needs {PARALLELISM[name].least} GPUs", flush=True)
    gpus = present if len(present) >= args.gpus else [str(number) for number in range(args.gpus)]
    args.out.mkdir(parents=True, exist_ok=True)
    settings = [*args.set, *([UNCOMPILED] if args.small else [])]
    tries = [("", [])] if UNCOMPILED in settings else [("", []), ("_uncompiled", [UNCOMPILED])]
    late: list[str] = []
    broken: list[str] = []
    tried = chosen
    for suffix, more in tries:
        left = args.until - (time.monotonic() - begin)
        if left < LEAST:
            late, tried = late + tried, []
        if not tried:
            break
        out = args.out / f"train_parallel_{args.shape}_{args.gpus}{suffix}.json"
        code = run(call(tried, out, args, [*settings, *more], left), gpus, left)
        table(out)
        if code not in (0, 1) or not out.is_file():  # refused, or nothing was begun
            return code or 1
        found = outcome(Record.load(out), tried)
        late += [f"{way}{suffix}" for way in found.late]
        broken += [f"{way}{suffix}" for way in found.broken if way == "none"]
        tried = [way for way in found.broken if way != "none"]
        for way in found.lacking:
            package = PARALLELISM[way].package
            print(f"{way}: not measured, {package} is not installed: pip install {package}", flush=True)
    broken += tried
    if broken:
        print(f"failed: {', '.join(broken)}; the Record says why, and --work {args.work} keeps it", flush=True)
    if late:
        print(f"no time was left: {', '.join(late)}; call again with --work {args.work}", flush=True)
    print(f"{time.monotonic() - begin:.0f} s in all", flush=True)
    return 1 if late or broken else 0


if __name__ == "__main__":
    sys.exit(main())
