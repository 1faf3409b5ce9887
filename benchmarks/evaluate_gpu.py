"""One checkpoint through every suite, in parts: `python benchmarks/evaluate_gpu.py recommended=runs/recommended/model`.

    python benchmarks/evaluate_gpu.py base=SmolLM2.gguf paper=runs/paper/model --text DIR --tasks DIR --until 500

DIR of --text holds the folders mathematics and novels of whole documents; DIR of --tasks the folders longbench and
leval with TASK.jsonl files, kv_retrieval with Lost-in-the-Middle's files, short and ruler, which short_tasks.py and
ruler_qa.py make. Parts whose folder is not there are named and left out. Writes evaluate_<checkpoint>_<part>.json
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
UNSEEN = ("16", "24", "28.5", "32", "36", "40", "45", "50")
"""For a window of 128k (Fig. 5 of the paper): its own scale, and those around the largest that training draws (32)."""
WITHOUT_TRAINING = ("none", "linear", "ntk", "dynamic_ntk", "self_extend")
"""LongRoPE's factors were searched for other models."""


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
    """Folder of --tasks that it cannot do without."""
    files: tuple[tuple[str, str], ...] = ()
    """(option, its value) where the value names a file below --tasks after the last =; left out where it is missing."""
    method: str = ""
    """For the base alone: how it is read."""
    beyond: tuple[str, ...] = ()
    """For checkpoints whose trained range ends before the windows, all but ours: the scales that they are read at."""
    small: tuple[str, ...] = ()
    """What --small puts in the place of sizes, last: tiny ones that run on two cores."""


OURS = "recommended"
"""What labels of checkpoints begin with that are trained for every window here, at scales up to 32."""
BASE = "base"
"""Label of the checkpoint that no one has trained on."""
BOTH = ("mathematics", "novels")
_FEW = ("--prompts", "2", "--max-documents", "1")
_LOSS = ("--max-documents", "1", "--max-strides", "2")
PARTS = (
    # whole windows: the documents that reach 256k, the same tokens at both
    Part(
        "far",
        ("--protocols", "whole"),
        FAR,
        BOTH,
        beyond=("--scales", "1", "32"),
        small=("--max-documents", "1"),
    ),
    # whether the longest window wants less than its own scale, as shorter ones do
    Part(
        "far_scales",
        ("--protocols", "whole", "--max-documents", "3", "--scales", "24", "28"),
        FAR[1:],
        BOTH,
        small=("--max-documents", "1"),
    ),
    # short text as the base reads it: scale 1, whatever a schedule says
    Part(
        "short",
        ("--suite", "short", "--scales", "1", "--batch-size", "32"),
        (),
        tasks="short",
        small=("--max-examples", "2", "--batch-size", "2"),
    ),
    Part(
        "keys",
        ("--protocols", "pass_key", "uuid_kv", "--prompts", "100", "--batch-size", "4"),
        LONG[1:],
        ("novels",),
        small=_FEW,
    ),
    # as in the paper: stride 256, exact up to 16k, 64 strides a document above
    Part(
        "sliding",
        ("--suite", "paper", "--protocols", "sliding", "--max-documents", "2", "--compile", "layers"),
        LONG,
        BOTH,
        small=(*_LOSS, "--compile", "none"),
    ),
    # every window at every scale: what a fixed scale costs
    Part(
        "grid",
        ("--protocols", "whole", "--scales", "1", "2", "4", "8", "16", "--max-documents", "2"),
        LONG[1:5],
        BOTH,
        small=_LOSS[:2],
    ),
    Part(
        "unseen",
        ("--protocols", "whole", "--max-documents", "2", "--scales", *UNSEEN),
        ("128k",),
        BOTH,
        small=_LOSS[:2],
    ),
    Part(
        "context",
        ("--suite", "context", "--max-documents", "6", "--compile", "layers"),
        LONG,
        BOTH,
        small=(*_LOSS, "--compile", "none"),
    ),
    # ten prompts of each of thirteen kinds: 130 a window
    Part(
        "ruler",
        ("--suite", "ruler", "--prompts", "10", "--batch-size", "5"),
        LONG[:5],
        ("novels",),
        files=(("--qa", "qa_1=ruler/qa_1.jsonl"), ("--qa", "qa_2=ruler/qa_2.jsonl")),
        small=_FEW,
    ),
    Part(
        "kv_files",
        ("--protocols", "kv_pairs", "--prompts", "100", "--batch-size", "8"),
        ("16k",),
        ("novels",),
        files=(("--kv-files", "kv_retrieval/kv-retrieval-75_keys.jsonl.gz"),),
        tasks="kv_retrieval",
        small=_FEW,
    ),
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
        tasks="short",
        small=(*_FEW, "--max-examples", "2"),
    ),
    *(
        Part(
            f"method-{method}",
            ("--protocols", "whole", "pass_key", "--prompts", "100", "--max-documents", "4"),
            LONG[:4],
            ("novels",),
            method=method,
            small=_FEW,
        )
        for method in WITHOUT_TRAINING
    ),
)


def command(part: Part, label: str, model: str, out: Path, args: argparse.Namespace) -> list[str]:
    """The call of `e2llm evaluate`."""
    found = [sys.executable, "-m", "e2llm", "evaluate", model, "--checkpoint", label, *part.options]
    found += ["--base-model", args.base_model, "--out", str(out)]
    if not label.startswith(OURS):
        found += part.beyond
    if label == BASE and part.name != "choice":
        found += ["--method", part.method or "yarn"]
    for corpus in part.corpora:
        found += ["--corpus", f"{corpus}={args.text / corpus}"]
    for option, value in part.files:
        before, equals, file = value.rpartition("=")
        if args.tasks and (args.tasks / file).is_file():
            found += [option, f"{before}{equals}{args.tasks / file}"]
    if part.tasks and not part.files:
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
        if args.only and part.name not in args.only:
            continue
        if part.tasks and not (args.tasks and (args.tasks / part.tasks).is_dir()):
            print(f"left out: {part.name}, for there is no folder {part.tasks} in --tasks", flush=True)
            continue
        for label, model in checkpoints:
            if part.method and label != BASE:
                continue
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
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
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
