"""The final comparison: plain, paper, recommended and the best rival, each trained, calibrated and measured per seed.
All train on as many tokens as the recommended recipe takes.

    python benchmarks/final.py --model MODEL --text DIR --out DIR [--rival NAME] [--seeds 0 1 2] [--until SECONDS]

DIR of --text holds train/*.txt (documents separated by a line <|endoftext|>), dev/<corpus> (long documents that each
checkpoint is calibrated on) and eval/<corpus> (those that are reported). Contestants are the runs of final.toml and one
of baselines.toml: --rival, or the one whose study_<name>.json reads the longest window best. Writes
study_final_<name>_<seed>.json, rows labelled with the seed of training.

A run of final.toml with a `method` is the base as it is, read with that method: nothing is trained, and it stands once.

Seeds come one after the other, so that what a short hour leaves out is left out of all. At --until seconds all ends: a
training or calibration is stopped and keeps what it has, a Record is written of what is measured and names what is not
(`unfinished`). The same command goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study_plan import Run, read_plan
from study_text import FolderText

from e2llm.config import Recipe, load_recipe, to_plain, to_toml
from e2llm.evaluate.command import window_tokens
from e2llm.evaluate.config import EvaluateConfig, check_windows
from e2llm.evaluate.documents import Document, load_documents
from e2llm.evaluate.run import evaluate, scale_of
from e2llm.hf import CheckpointInfo, get_extension, load_model, save_model
from e2llm.infer import Engine
from e2llm.records import Record, portable, write_atomic

HERE = Path(__file__).parent
OURS = ("plain", "paper", "recommended", "recommended-yarn", "recommended-yarn-without-facts")
OURS += ("recommended-six-of-ten",)
FORMER = "jumps"
"""What was recommended before: nobody's rival."""
SPEED = ("train_seconds", "tokens_per_second", "peak_memory_bytes")
GRACE = 90.0
"""Seconds in which a stopped command saves what it has."""


@dataclass(frozen=True)
class Contestant:
    """One recipe with one seed."""

    run: Run
    seed: int
    folder: Path
    """Of its training run."""

    @property
    def name(self) -> str:
        return f"{self.run.name}_{self.seed}"


def best_rival(results: Path, names: Sequence[str]) -> str:
    """The baseline whose study Record has the lowest perplexity at the longest window, over all corpora.

    Raises ValueError where none was measured.
    """
    found: dict[str, float] = {}
    for name in names:
        file = results / f"study_{name}.json"
        if name in (*OURS, FORMER) or not file.is_file():
            continue
        rows = [row for row in Record.load(file).rows if row["metric"] == "perplexity"]
        longest = [row for row in rows if row["window"] == max(r["window"] for r in rows)]
        product = 1.0
        for corpus in sorted({row["corpus"] for row in longest}):
            product *= min(row["value"] for row in longest if row["corpus"] == corpus)
        found[name] = product
    if not found:
        raise ValueError(
            f"rival: no Record of a baseline in {results}; run benchmarks/study.py --plan benchmarks/baselines.toml, "
            "or name one with --rival"
        )
    return min(found, key=lambda name: found[name])


def contestants(args: argparse.Namespace) -> list[Contestant]:
    """Every recipe resolved, before anything is loaded; seed by seed. Raises ValueError."""
    sources = FolderText(args.text).sources
    settings = [
        f"model.name={args.model}",
        f"data.cache_dir={args.work / 'cache'}",
        "data.held_out_fraction=0.01",
        "train.evaluate_windows=0",
        "train.compile=layers",
        "train.workers=4",
        *args.set,
    ]
    baselines = HERE / "baselines.toml"
    if args.rival is None:
        found = read_plan(baselines, sources, settings, [])
        rivals = [run.name for run in found if run.recipe.scales.max_scale > 1 and run.seconds_of is None]
        args.rival = best_rival(args.results, rivals)
    if args.rival in OURS:
        raise ValueError(f"rival = {args.rival!r}: it is a contestant already; name another baseline")
    rival = read_plan(baselines, sources, settings, [args.rival])
    runs = [*read_plan(HERE / "final.toml", sources, settings, []), *rival]
    tokens = tokens_of(next(run for run in runs if run.name == "recommended").recipe)
    runs = [with_tokens(run, tokens) for run in runs if not args.only or run.name in args.only]
    return [
        Contestant(run, seed, args.work / f"{run.name}-{seed}")
        for seed in args.seeds
        for run in runs
        if run.method is None or seed == args.seeds[0]
    ]


def tokens_of(recipe: Recipe, steps: int | None = None) -> int:
    """Tokens that a recipe trains on, in `steps` or in all its steps."""
    train = recipe.train
    windows = train.batch_size * train.gradient_accumulation
    return (train.steps if steps is None else steps) * windows * recipe.data.window


def with_tokens(run: Run, tokens: int) -> Run:
    """`run` with as many steps as make `tokens`."""
    train = dataclasses.replace(run.recipe.train, steps=max(1, round(tokens / tokens_of(run.recipe, 1))))
    return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, train=train))


def call(arguments: Sequence[str], end: float, stop: signal.Signals) -> bool:
    """Whether a command of the package ended well before `end`; it gets the signal then, and time to save."""
    if time.monotonic() >= end:
        return False
    print("$ e2llm", " ".join(arguments[:2]), flush=True)
    path = os.pathsep.join([str(HERE.parent / "src"), *sys.path])
    process = subprocess.Popen([sys.executable, "-m", "e2llm", *arguments], env={**os.environ, "PYTHONPATH": path})
    try:
        code = process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(stop)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    if code:
        raise SystemExit(f"e2llm {' '.join(arguments[:2])} failed with {code}")
    return True


def trained(one: Contestant, end: float) -> bool:
    """Train, or go on training; whether the model is there. The base as it is gets an e2llm.json and nothing else."""
    if (one.folder / "model").is_dir():
        return True
    if one.run.method is not None:
        save_untrained(one)
        return True
    recipe = dataclasses.replace(
        one.run.recipe,
        seed=one.seed,
        data=dataclasses.replace(one.run.recipe.data, seed=one.seed),
        output=str(one.folder),
    )
    file = one.folder.with_suffix(".toml")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, to_toml(recipe))
    resume = ["--resume"] if (one.folder / "recipe.toml").is_file() else []
    return call(["train", str(file), *resume], end, signal.SIGTERM)


def save_untrained(one: Contestant) -> None:
    """The base's weights in a folder that a calibration can write its schedule into."""
    assert one.run.method is not None
    given = one.run.recipe.model
    model, tokenizer, _ = load_model(given.name, dtype=given.dtype, method=one.run.method)
    extension = get_extension(model)
    assert extension is not None
    window = extension.native_window
    info = CheckpointInfo(
        method=one.run.method, native_window=window, training_window=window, max_scale=1.0, checkpoint=one.run.name
    )
    one.folder.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, one.folder / "model", info)


def method_of(run: Run) -> str:
    """Frequency method that a contestant is read with."""
    return run.recipe.method if run.method is None else run.method


def calibrated(one: Contestant, args: argparse.Namespace, end: float) -> bool:
    """Find each window's scale on the documents kept for that; whether it is done. Method none has none to find.

    A recipe of one fixed scale is also tried at that scale."""
    out = one.folder / "calibration.json"
    if out.is_file() or method_of(one.run) == "none" or not args.calibrate_windows:
        return True
    native, ratios = native_window(one), set(args.ratios)
    scales = one.run.recipe.scales
    if one.run.method is None and scales.distribution == "fixed" and scales.max_scale > 1:
        ratios |= {scales.max_scale * native / window for window in args.calibrate_windows}
    corpora = [f"{label.name}={label}" for label in sorted((args.text / "dev").iterdir())]
    options = [part for corpus in corpora for part in ("--corpus", corpus)]
    options += ["--windows", *map(str, args.calibrate_windows), "--ratios", *map(str, sorted(ratios))]
    options += ["--prompts", str(args.calibrate_prompts), "--max-documents", "2", "--out", str(out)]
    return call(["calibrate", str(one.folder / "model"), *options], end, signal.SIGINT)


def native_window(one: Contestant) -> int:
    """L of the trained checkpoint, tokens."""
    info = json.loads((one.folder / "model" / "e2llm.json").read_text(encoding="utf-8"))
    return int(info["native_window"])


def scale_for(engine: Engine, one: Contestant, window: int) -> float:
    """Calibrated above the native window; up to it what the plan says of the window or of the native one (a checkpoint
    of one fixed scale), else 1."""
    if window <= engine.native_window:
        named = one.run.scales.get(window) or one.run.scales.get(engine.native_window)
        if named:
            return named[0]
    return scale_of(engine, window)


def measured(one: Contestant, args: argparse.Namespace, end: float) -> Record | None:
    """Perplexity and keys at every window; where the time ends first what there is by then, None if that is nothing.

    The Record's `unfinished` names what is missing; finished parts are kept for the next call."""
    records: list[Record] = []
    names = [f"{p} at {w}" for p in ("whole", *args.tasks) for w in args.windows]
    try:
        with time_ends(end):
            engine = Engine.load(str(one.folder / "model"))
            corpora: dict[str, list[Document]] = {
                folder.name: load_documents(folder, engine.tokenizer, num_tokens=max(args.windows))
                for folder in sorted((args.text / "eval").iterdir())
            }
            # Ten documents that take turns with ten depths would meet one depth each: keys are asked in all of them.
            scored = {name: documents[: args.max_documents] for name, documents in corpora.items()}
            for protocol in ("whole", *args.tasks):
                texts = scored if protocol == "whole" else dict(list(corpora.items())[-1:])
                for window in args.windows:
                    config = EvaluateConfig(
                        windows=tuple(args.windows),
                        scales=(scale_for(engine, one, window) if engine.extension.method != "none" else 1.0,),
                        protocols=(protocol,),
                        prompts=args.prompts,
                        batch_size=args.batch_size,
                        checkpoint=one.run.name,
                        base_model=args.base_model,
                    )
                    partial = one.folder / "evaluation.partial.jsonl"
                    records.append(evaluate(engine, texts, config, windows=(window,), partial=partial, progress=True))
    except (TimeEnded, KeyboardInterrupt):  # lanes.py interrupts what its own time ends for
        if not records:
            return None
    return final_record(one, engine, records, args.shared_gpu, names[len(records) :])


class TimeEnded(Exception):
    """--until is over."""


@contextlib.contextmanager
def time_ends(end: float) -> Iterator[None]:
    """Raise TimeEnded inside the block at `end`: a window of 128k takes minutes, and a lent machine does not wait."""

    def ended(*_: object) -> None:
        raise TimeEnded

    left = end - time.monotonic()
    if left <= 0:
        raise TimeEnded
    before = signal.signal(signal.SIGALRM, ended)
    signal.setitimer(signal.ITIMER_REAL, 0.0 if math.isinf(left) else left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def final_record(
    one: Contestant, engine: Engine, records: Sequence[Record], shared_gpu: bool, unfinished: Sequence[str]
) -> Record:
    """All rows with the label of the training's seed; the prompts' own stands in the config."""
    rows: list[dict[str, Any]] = []
    recipe: dict[str, Any] = {"method": one.run.method}
    if one.run.method is None:
        kept = () if shared_gpu else SPEED
        speed = [row for row in Record.load(one.folder / "train.json").rows if row["metric"] in kept]
        own = {"seed": one.seed, "checkpoint": one.run.name, "base_model": records[0].rows[0]["base_model"]}
        rows += [{**row, **own} for row in speed]
        recipe = to_plain(load_recipe(str(one.folder / "recipe.toml")))
    rows += [{**row, "seed": one.seed} for record in records for row in record.rows]
    config = {
        "recipe": {**recipe, "name": one.run.name},
        "seed": one.seed,
        "trained": one.run.method is None,
        "prompts_seed": records[-1].config["seed"],
        "prompt": {r.config["protocols"][0]: r.config["prompt"] for r in records if r.config["prompt"]},
        "native_window": engine.native_window,
        "schedule": [dataclasses.asdict(step) for step in engine.extension.schedule],
        "corpora": records[0].config["corpora"],
        "shared_gpu": shared_gpu,
        "unfinished": list(unfinished),
    }
    examples = [example for record in records for example in record.examples]
    return Record(kind="study_final", config=portable(config), rows=rows, examples=examples)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True)
    add("--base-model", default="SmolLM2-135M-Instruct")
    add("--text", type=Path, required=True)
    add("--rival", help="a run of baselines.toml (default: the best of those that --results holds)")
    add("--results", type=Path, default=HERE / "results", help="where the baselines' study_<name>.json are")
    add("--out", type=Path, default=HERE / "results")
    add("--work", type=Path, default=Path("runs/final"))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--only", nargs="+", default=[], metavar="NAME", help="these contestants")
    add("--until", type=float, default=float("inf"), metavar="SECONDS", help="nothing begins after this")
    default = ["4k", "8k", "16k", "32k", "64k", "128k"]
    add("--windows", type=window_tokens, nargs="+", default=[window_tokens(w) for w in default])
    add("--calibrate-windows", type=window_tokens, nargs="*", default=[window_tokens(w) for w in default[2:]])
    add("--ratios", type=float, nargs="+", default=[0.75, 0.875, 1.0])
    add("--calibrate-prompts", type=int, default=24, help="pass keys a window and scale that is asked (24)")
    add("--tasks", nargs="+", default=["pass_key", "uuid_kv"], choices=["pass_key", "uuid_kv"])
    add("--prompts", type=int, default=100)
    # One prompt at a time, an answer of 40 tokens takes two seconds of launching kernels, whatever the GPU.
    add("--batch-size", type=int, default=8, help="prompts answered at once, by the serving engine (8)")
    add("--max-documents", type=int, default=10, help="of a corpus, whose perplexity is measured (10)")
    add("--set", action="append", default=[], help="as of e2llm train, for every contestant")
    add("--stop-after", choices=["train", "calibrate"], help="the same command without it goes on from there")
    add("--shared-gpu", action="store_true", help="something else computes on it too: no speed goes into the Records")
    return parser.parse_args()


def main() -> int:
    """Each contestant in turn. 1 where one is not finished."""
    args = parse()
    end = time.monotonic() + args.until
    try:
        check_windows(tuple(args.windows))
        found = contestants(args)
    except ValueError as error:
        raise SystemExit(f"final.py: {error}") from error
    print("contestants:", ", ".join(one.name for one in found), flush=True)
    left = []
    for one in found:
        out = args.out / f"study_final_{one.name}.json"
        if out.is_file() and not Record.load(out).config.get("unfinished"):
            continue
        done = time.monotonic() < end and trained(one, end)
        done = done and (args.stop_after == "train" or calibrated(one, args, end))
        if done and args.stop_after:
            continue
        record = measured(one, args, end) if done else None
        if record is None:
            left.append(one.name)
            continue
        record.save(out)
        print(out, flush=True)
        if record.config["unfinished"]:
            left.append(one.name)
            continue
        (one.folder / "evaluation.partial.jsonl").unlink(missing_ok=True)
    print("not finished:", ", ".join(left) or "nothing", flush=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
