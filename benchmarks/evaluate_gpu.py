"""One checkpoint through every suite, in parts: `python benchmarks/evaluate_gpu.py recommended=runs/recommended/model`.

    python benchmarks/evaluate_gpu.py base=SmolLM2.gguf paper=runs/paper/model --text DIR --tasks DIR --until 500

DIR of --text holds the folders mathematics and novels of whole documents; DIR of --tasks the folders longbench and
leval with TASK.jsonl files, and short, which benchmarks/short_tasks.py makes. Writes evaluate_<checkpoint>_<part>.json
into --out. A part whose Record is there is not run again; one that --until stops keeps what it has (`.partial.jsonl`)
and goes on with the same command. The parts that say most come first, and each checkpoint gets its part before the next
part begins, so that what a short hour leaves out is left out of all. Checkpoints are read with their own method, the
base with yarn.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONG = ("4k", "8k", "16k", "32k", "64k", "128k")
FAR = ("8k", "256k")
"""The native window of the study's base, and twice what training reaches."""


@dataclass(frozen=True)
class Part:
    """One call of `e2llm evaluate` for each checkpoint."""

    name: str
    options: tuple[str, ...]
    windows: tuple[str, ...]
    """Empty for a suite that has none."""
    corpora: tuple[str, ...] = ()
    """Of --text; none for suites of tasks."""
    tasks: str = ""
    """Folder of --tasks."""
    small: tuple[str, ...] = ()
    """What --small puts in the place of sizes, last: tiny ones that run on two cores."""


BOTH = ("mathematics", "novels")
_FEW = ("--prompts", "2", "--max-documents", "1")
_LOSS = ("--max-documents", "1", "--max-strides", "2")
PARTS = (
    Part(
        "keys",
        ("--protocols", "pass_key", "uuid_kv", "--prompts", "100", "--batch-size", "4"),
        LONG[1:],
        ("novels",),
        small=_FEW,
    ),
    Part(
        "sliding",
        ("--protocols", "sliding", "--max-strides", "16", "--max-documents", "4", "--compile", "layers"),
        LONG,
        BOTH,
        small=(*_LOSS, "--compile", "none"),
    ),
    # whole windows: the documents that reach 256k, the same tokens at both
    Part("far", ("--protocols", "whole"), FAR, BOTH, small=("--max-documents", "1")),
    # short text as the base reads it: scale 1, whatever a schedule says
    Part(
        "short",
        ("--suite", "short", "--scales", "1", "--batch-size", "32"),
        (),
        tasks="short",
        small=("--max-examples", "2", "--batch-size", "2"),
    ),
    Part(
        "context",
        ("--suite", "context", "--max-documents", "6", "--compile", "layers"),
        LONG,
        BOTH,
        small=(*_LOSS, "--compile", "none"),
    ),
    # ten prompts of each of eleven kinds: 110 a window
    Part("ruler", ("--suite", "ruler", "--prompts", "10", "--batch-size", "5"), LONG[:5], ("novels",), small=_FEW),
    Part(
        "needles",
        ("--protocols", "needle", "multi_needle", "kv_pairs", "--prompts", "110", "--batch-size", "8"),
        LONG[:4],
        ("novels",),
        small=_FEW,
    ),
    Part("attention", ("--suite", "attention"), LONG[1:5], ("novels",), small=_FEW),
    Part(
        "longbench",
        ("--suite", "longbench", "--batch-size", "8"),
        ("4k", "16k", "32k"),
        tasks="longbench",
        small=("--max-examples", "1", "--no-chat"),
    ),
    Part(
        "leval",
        ("--suite", "leval", "--batch-size", "8", "--max-examples", "50"),
        ("16k",),
        tasks="leval",
        small=("--max-examples", "1", "--no-chat"),
    ),
    Part(
        "difference",
        ("--suite", "paper", "--protocols", "difference", "--max-documents", "2", "--compile", "layers"),
        LONG[:4],
        BOTH,
        small=(*_LOSS, "--compile", "none"),
    ),
    Part(
        "choice",
        ("--suite", "choice", "--protocols", "whole", "pass_key", "--prompts", "100", "--max-documents", "4"),
        LONG[:3],
        ("novels",),
        small=_FEW,
    ),
)


def command(part: Part, label: str, model: str, out: Path, args: argparse.Namespace) -> list[str]:
    """The call of `e2llm evaluate`."""
    found = [sys.executable, "-m", "e2llm", "evaluate", model, "--checkpoint", label, *part.options]
    found += ["--base-model", args.base_model, "--out", str(out)]
    if label == "base" and part.name != "choice":
        found += ["--method", "yarn"]
    for corpus in part.corpora:
        found += ["--corpus", f"{corpus}={args.text / corpus}"]
    if part.tasks:
        found += ["--tasks-folder", str(args.tasks / part.tasks)]
    windows: tuple[str, ...] = part.windows
    if args.small:
        windows, found = ("1k", "2k"), [*found, *part.small]
    return [*found, "--windows", *windows] if part.windows else found


def main() -> int:
    """Each part in turn, of each checkpoint. 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="LABEL=MODEL")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, help="without it the suites of tasks are left out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts")
    parser.add_argument("--until", type=float, default=540.0, metavar="SECONDS", help="nothing runs after this (540)")
    parser.add_argument("--base-model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run? (also without a GPU)")
    args = parser.parse_args()
    end = time.monotonic() + args.until
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoints = [(label, model) for label, _, model in (text.partition("=") for text in args.checkpoints)]
    nameless = [label for label, model in checkpoints if not model]
    if nameless:
        parser.error(f"checkpoints = {nameless}: write LABEL=MODEL")
    failed = []
    for part in PARTS:
        if (args.only and part.name not in args.only) or (part.tasks and not args.tasks):
            continue
        for label, model in checkpoints:
            out = args.out / f"evaluate_{label}_{part.name}.json"
            if out.exists():
                continue
            if not run(command(part, label, model, out, args), end):
                failed.append(out.name)
    print("not finished:", ", ".join(failed) or "nothing", flush=True)
    return 1 if failed else 0


def run(call: list[str], end: float) -> bool:
    """Whether it ended well before `end`; it is asked to stop then, and keeps its finished parts."""
    start = time.monotonic()
    if start >= end:
        return False
    print("$", " ".join(call[3:]), flush=True)
    process = subprocess.Popen(call, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])})
    try:
        code = process.wait(end - start)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        code = 130
    print(f"[{time.monotonic() - start:.0f} s] exit {code}", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
