"""The GPU study of docs/results.md: SmolLM2-135M-Instruct, 4096-token windows, evaluated to 128k.

    python benchmarks/smollm2.py --model SmolLM2-135M-Instruct.gguf --text DIR --out DIR base:yarn recommended

DIR of --text holds train/*.txt (documents separated by a line <|endoftext|>) and eval/mathematics, eval/novels.
A run is `base:METHOD` (no training) or the name of a recipe, optionally `recipe:METHOD` to serve it with another
method, or `recipe+planted`: facts stated and asked for again in half of its windows (docs/guide.md, "Facts"). With
--calibrate DIR (folders mathematics and novels of documents that are not measured on) each trained checkpoint is
calibrated first, and evaluated as calibrated. Writes smollm2_<run>.json (perplexity), smollm2_<run>_keys.json
(retrieval), smollm2_<run>_train.json and smollm2_<run>_calibration.json into --out.

--measure also takes uuid_kv (three pairs in a long text), far (perplexity at 8k and 256k on the documents that reach
it) and short (multiple-choice tasks of --tasks-folder in the base window). Each is a Record of its own that an
interrupted run resumes; with --resume one that exists is skipped, unless its checkpoint is trained anew. --family
begins the Records' names, --base-model labels the base; --seed N trains with that seed and adds _sN to the run's name.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

BASE = "SmolLM2-135M-Instruct"
PLANTED = 0.5
MEASURES = ("perplexity", "keys", "uuid_kv", "far", "short")
WINDOWS = ("4k", "8k", "16k", "32k", "64k", "128k")


def e2llm(*arguments: str, resume: bool = False) -> None:
    """One command of the installed package; with `resume` none when the Record it would write is there."""
    if resume and Path(out := arguments[arguments.index("--out") + 1]).is_file():
        print(f"{out}: already measured", flush=True)
        return
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "e2llm.cli", *arguments], check=True)
    print(f"[{time.monotonic() - start:.0f} s] e2llm {' '.join(arguments[:3])}", flush=True)


def train(checkpoint: str, model: str, text: Path, work: Path, steps: int | None, more: list[str]) -> Path:
    """Train one recipe on every file of train/, weighted by size; the folder of its model."""
    recipe, _, planted = checkpoint.partition("+")
    files = sorted((text / "train").glob("*.txt"))
    rest = f', separator="<|endoftext|>", planted={PLANTED if planted else 0.0}'
    sources = ", ".join(f"{{path={json.dumps(str(f))}, weight={f.stat().st_size}{rest}}}" for f in files)
    settings = [
        f"model.name={model}",
        f"data.sources=[{sources}]",
        f"data.cache_dir={work / 'cache'}",
        f"name={checkpoint}",
        f"output={work / checkpoint}",
        "data.held_out_fraction=0.01",
        "train.compile=layers",
        "train.workers=4",
        "train.evaluate_scales=[1, 4, 16]",
        *([f"train.steps={steps}"] if steps else []),
        *more,
    ]
    e2llm("train", recipe, *[part for setting in settings for part in ("--set", setting)])
    return work / checkpoint / "model"


def calibrate(folder: Path, name: str, args: argparse.Namespace) -> None:
    """The best scale for each window, on the documents kept for that."""
    corpora = [f"{label}={args.calibrate / label}" for label in ("mathematics", "novels")]
    e2llm(
        "calibrate", str(folder), "--corpus", corpora[0], "--corpus", corpora[1], "--max-documents", "2",
        "--windows", *(args.calibrate_windows or [window for window in args.windows if window not in ("4k", "8k")]),
        "--ratios", "0.625", "0.75", "0.875", "1", "--prompts", str(args.calibrate_prompts),
        "--out", str(args.out / f"{args.family}_{name}_calibration.json"), resume=args.resume,
    )  # fmt: skip


def evaluate(model: str, run: str, checkpoint: str, method: str | None, args: argparse.Namespace) -> None:
    """Perplexity of whole windows on both corpora, pass keys in the mathematics."""
    common = ["--checkpoint", checkpoint, "--base-model", args.base_model, *(["--method", method] if method else [])]
    corpora = [f"{name}={args.text / 'eval' / name}" for name in ("mathematics", "novels")]
    if "perplexity" in args.measure:
        e2llm(
            "evaluate", model, *common, "--windows", *args.windows, "--protocols", "whole",
            "--corpus", corpora[0], "--corpus", corpora[1], "--max-documents", str(args.max_documents),
            "--out", str(args.out / f"{args.family}_{run}.json"), resume=args.resume,
        )  # fmt: skip
    if "keys" in args.measure:
        e2llm(
            "evaluate", model, *common, "--windows", *args.windows[1:], "--protocols", "pass_key",
            "--corpus", corpora[0], "--prompts", str(args.prompts), "--max-documents", str(args.max_documents),
            "--out", str(args.out / f"{args.family}_{run}_keys.json"), resume=args.resume,
        )  # fmt: skip
    _evaluate_more(model, run, common, corpora, args)


def _evaluate_more(model: str, run: str, common: list[str], corpora: list[str], args: argparse.Namespace) -> None:
    """What is asked for by name only."""
    most = ["--max-documents", str(args.max_documents)]
    if "uuid_kv" in args.measure:
        e2llm(
            "evaluate", model, *common, "--windows", *args.windows[1:], "--protocols", "uuid_kv",
            "--corpus", corpora[0], "--prompts", str(args.prompts), *most,
            "--out", str(args.out / f"{args.family}_{run}_uuid_kv.json"), resume=args.resume,
        )  # fmt: skip
    if "far" in args.measure:
        e2llm(
            "evaluate", model, *common, "--windows", *args.far_windows, "--protocols", "whole",
            "--corpus", corpora[0], "--corpus", corpora[1], *most,
            "--out", str(args.out / f"{args.family}_{run}_far.json"), resume=args.resume,
        )  # fmt: skip
    if "short" in args.measure:
        e2llm(
            "evaluate", model, *common, "--suite", "short", "--tasks-folder", str(args.tasks_folder),
            "--out", str(args.out / f"{args.family}_{run}_short.json"), resume=args.resume,
        )  # fmt: skip


def main() -> None:
    """Each run in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--windows", nargs="+", default=list(WINDOWS))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--max-documents", type=int, default=10)
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=["perplexity", "keys"])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--family", default="smollm2", help="start of the Records' names")
    parser.add_argument("--base-model", default=BASE, help="label of the base model")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--resume", action="store_true", help="keep Records that exist")
    parser.add_argument("--calibrate-prompts", type=int, default=24, help="pass keys a window and scale; 0: none")
    above = "windows calibrated, all above the native one (default: those of --windows above 8k)"
    parser.add_argument("--calibrate-windows", nargs="+", help=above)
    parser.add_argument("--far-windows", nargs="+", default=["8k", "256k"])
    parser.add_argument("--tasks-folder", type=Path, help="multiple-choice tasks of --measure short")
    args = parser.parse_args()
    if "short" in args.measure and args.tasks_folder is None:
        parser.error("--measure short: give --tasks-folder, a folder of multiple-choice tasks")
    args.out.mkdir(parents=True, exist_ok=True)
    for run in args.runs:
        recipe, _, method = run.partition(":")
        name = run.replace(":", "_").replace("+", "_")
        if args.seed is not None and recipe != "base":
            name += f"_s{args.seed}"
        if recipe == "base":
            evaluate(args.model, name, "base", method, args)
            continue
        work = args.work if args.seed is None else args.work / f"seed-{args.seed}"
        folder = work / recipe / "model"
        own = argparse.Namespace(**{**vars(args), "resume": args.resume and folder.is_dir()})
        if not folder.is_dir():
            more = [*([f"seed={args.seed}", f"data.seed={args.seed}"] if args.seed is not None else []), *args.set]
            folder = train(recipe, args.model, args.text, work, args.steps, more)
            shutil.copy(work / recipe / "train.json", args.out / f"{args.family}_{name}_train.json")
        if args.calibrate:
            calibrate(folder, name, own)
        evaluate(str(folder), name, recipe, method or None, own)


if __name__ == "__main__":
    main()
