"""Many recipes, one process: which change makes a checkpoint better? One Record a run.

    python benchmarks/study.py --plan benchmarks/tiny.toml        # the embedded model, on one core of any CPU
    python benchmarks/study.py --model MODEL --text DIR --plan plan.toml --out DIR [--only NAME ...] [--until SECONDS]

MODEL is a folder, hub name or GGUF file, or `tiny`: the base that comes with the package. DIR of --text holds
train/*.txt (documents separated by a line <|endoftext|>) and dev/<corpus>/*.txt: long documents that no final result is
reported on. `--text stdlib` is the quickstart's text instead, the standard library of the running Python. The plan is a
TOML file:

    [study]                                # defaults of the command line's options: a plan alone can then be run
    name = "tiny"                          # Records are study_tiny_<run>.json, apart from those of other studies
    model = "tiny"
    text = "stdlib"
    base_model = "tiny-512"
    windows = [512, 2048, 8192]
    key_windows = [2048, 8192]
    prompts = 50
    tasks = ["pass_key"]
    recipe = "jumps"                       # of runs that name none ("recommended")
    set = ["train.steps=70"]               # of every run; --set comes after it, a run's own `set` last
    title = "…"                            # for the docs
    intro = "…"

    [[runs]]
    name = "j63"
    recipe = "recommended"                 # a shipped recipe, or a TOML file (also one beside the plan)
    set = ["placement.max_jumps=63"]       # as --set of e2llm train
    method = "ntk"                         # read the base itself with it, or by self_extend: nothing is trained
    self_extend = true                     # read the trained weights with SelfExtend, whatever they were trained with
    planted = 0.1                          # share of windows with facts stated and asked for again (default 0; of
                                           # --text stdlib the quickstart's)
    planted_sets = 2                       # most sets of facts in one of those windows (default 4)
    scales = {131072 = [12, 16]}           # scales a window is measured at (default window / native window)
    key_scales = {131072 = [12, 16]}       # the same for keys; default: the first of `scales`
    seconds_of = "recommended"             # as many steps as fit into the training time of that run, a step taking as
    speed_of = "yarn-64k"                  # long as it did in this one; both are measured before
    slopes = [0.06]                        # the windows of `scales` once more, with these attention slopes when serving
    interpolations = [0.75]                # everything once more, that share of the way from the first weights to the
                                           # trained ones (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903); first come
                                           # those at the recipe's own train.interpolation
    ramp = [8, 1]                          # these and the next three are no settings of a recipe: study_tried.py
    copied = 0.25
    far_loss = true
    end_tokens = 18
    predicted = "a little better at 128k"  # written down before it is measured
    concluded = "no difference"            # written down afterwards, for the docs

Plans: study.toml, one change a run from `jumps`; baselines.toml, every recipe under one budget of tokens;
curves.toml, largest scales, steps, and the base untrained; tiny.toml, the baselines and changes on the embedded model;
gemma3.toml, a second family.

The model is loaded, its layers compiled and the text tokenized once; every run starts from the same weights. Writes
study_<name>.json: perplexity of whole windows and pass keys on the dev documents, the resolved recipe and the
prediction. A run whose Record exists is skipped; after --until seconds none is begun. SIGTERM or Ctrl-C end it at once
with exit code 130: what is measured stays, the run that was cut off begins anew next time. At the end the Records that
the plan has by then are compared in WORK/<plan>.html and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from study_plan import Defaults, Run, in_equal_time, read_defaults, read_plan, record_file
from study_text import Text, open_text
from study_tried import trying, with_copies
from transformers import TrainerCallback

from e2llm.config import Recipe, to_plain
from e2llm.data import build_corpus
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.run import evaluate
from e2llm.hf import get_extension, install, load_model
from e2llm.infer import Engine
from e2llm.quickstart import TINY, arithmetic
from e2llm.records import Record, portable, write_atomic
from e2llm.report import results_markdown, write_report
from e2llm.report.formats import format_window
from e2llm.train import train_loaded

EMBEDDED = "tiny"
"""The --model that is no folder and no hub name."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Study:
    """What all runs share: weights to start from, a model that trains, one that is measured, text."""

    def __init__(self, args: argparse.Namespace, runs: list[Run], text: Text) -> None:
        self.args = args
        types = sorted({run.recipe.model.dtype for run in runs})
        if len(types) > 1:
            raise ValueError(f"model.dtype = {types}: all runs of one process share a model; start them apart (--only)")
        self.model, self.tokenizer, _ = load_model(args.model, dtype=types[0])
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.measured, _, _ = load_model(args.model, dtype=arithmetic())
        self.corpora = text.documents(self.tokenizer, max(args.windows))
        self.last: tuple[dict[str, Any], Record] | None = None

    def train(self, run: Run) -> Record:
        """Train from the first weights; the measured model then has the new ones.

        The weights of the run before are taken where training would make the same: see `what_trains`."""
        wanted = {**what_trains(run.recipe), "tried": run.tried}
        if self.last is not None and self.last[0] == wanted:
            self._read_with(self.measured, run.recipe, run.self_extend)
            return self.last[1]
        self.last = None
        self.model.load_state_dict(self.start)
        self.model.requires_grad_(True)  # which adapters of the run before have taken from it
        # A recipe of long windows turns it on; the next one must not pay for it.
        name = "activation_checkpointing_disable"
        getattr(self.model, name, self.model.gradient_checkpointing_disable)()
        self._read_with(self.model, run.recipe)
        self._read_with(self.measured, run.recipe, run.self_extend)
        corpus = build_corpus(
            run.recipe.data, self.tokenizer, cache_dir=Path(run.recipe.data.cache_dir), progress=False
        )
        if (run.recipe.run_folder / "recipe.toml").is_file():  # a run that was cut off, or its Record was deleted
            shutil.rmtree(run.recipe.run_folder)
        listening = [_KeepSignals()]
        corpus = with_copies(corpus, run.tried.copied)
        # Saving would leave the trained model part of the way; here shares are counted from the whole of it.
        whole = dataclasses.replace(run.recipe, train=dataclasses.replace(run.recipe.train, interpolation=1.0))
        result = train_loaded(whole, self.model, self.tokenizer, corpus, quiet=True, callbacks=listening)
        assert result.record is not None, "signals do not reach the training: see _KeepSignals"
        self._interpolate(run.recipe.train.interpolation)
        self.last = (wanted, result.record)
        return result.record

    def untrained(self, method: str) -> None:
        """The measured model has the first weights again, read with `method`."""
        self.last = None
        self.measured.load_state_dict(self.start)
        as_it_was(self.measured)
        install(self.measured, method=method)

    @staticmethod
    def _read_with(model: torch.nn.Module, recipe: Recipe, extended: bool = False) -> None:
        as_it_was(model)
        if extended:
            install(model, method="self_extend")
        else:
            near = recipe.neighbours or None
            install(model, method=recipe.method, attention=recipe.attention, neighbours=near)

    def measure(self, run: Run) -> list[Record]:
        """Perplexity at every window, pass keys in the first corpus's documents, of the weights that the recipe saves
        and then of those at other shares of the way from the first to the trained."""
        records = self._measure(run)
        for share in run.interpolations:
            self._interpolate(share)
            found = self._measure(dataclasses.replace(run, slopes=()))
            for record in found:
                for row in record.rows:
                    row["interpolation"] = share
            records += found
        if run.interpolations:
            self._interpolate(run.recipe.train.interpolation)
        return records

    @torch.no_grad()
    def _interpolate(self, share: float) -> None:
        """The measured model gets the weights that far from the first to the trained."""
        trained = dict(self.model.named_parameters())
        for name, target in self.measured.named_parameters():
            target.copy_(torch.lerp(self.start[name].float(), trained[name].float(), share))

    def _measure(self, run: Run) -> list[Record]:
        self.measured.eval()
        engine = Engine(self.measured, self.tokenizer, max_scale=run.recipe.scales.max_scale)
        trained = engine.extension.attention
        records = []
        for slope in (trained.slope, *run.slopes):
            engine.extension.attention = dataclasses.replace(trained, slope=slope)
            for window in self.args.windows if slope == trained.slope else sorted(run.scales):
                found = self._perplexity(engine, run, window)
                for row in found.rows:
                    row["slope"] = slope
                records.append(found)
        engine.extension.attention = trained
        for window in self.args.key_windows if self.args.prompts else ():
            config = EvaluateConfig(
                windows=(window,),
                scales=run.key_scales.get(window, ()),
                protocols=tuple(self.args.tasks),
                prompts=self.args.prompts,
                checkpoint=run.name,
                base_model=self.args.base_model,
            )
            first = dict(list(self.corpora.items())[:1])
            records.append(evaluate(engine, first, config))
        return records

    def _perplexity(self, engine: Engine, run: Run, window: int) -> Record:
        config = EvaluateConfig(
            windows=tuple(self.args.windows),
            scales=run.scales.get(window, ()),
            protocols=("whole",),
            checkpoint=run.name,
            base_model=self.args.base_model,
        )
        return evaluate(engine, self.corpora, config, windows=(window,))


def as_it_was(model: torch.nn.Module) -> None:
    """Take off what the run before read it with."""
    extension = get_extension(model)
    if extension is not None:
        extension.remove()


class _KeepSignals(TrainerCallback):
    """SIGTERM stays the study's while it trains: a training that stops by it, to be resumed, is of no use here."""

    def __init__(self) -> None:
        self.of_study = signal.getsignal(signal.SIGTERM)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take it back."""
        signal.signal(signal.SIGTERM, self.of_study)


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt as Ctrl-C is, and Ctrl-C is one also where a shell's background ignores it."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def what_trains(recipe: Recipe) -> dict[str, Any]:
    """A recipe without what changes no weight: name, folder, and at scale 1, where all are the model itself, method."""
    left_out = {"name", "output", *(("method",) if recipe.scales.max_scale == 1 else ())}
    return {key: value for key, value in to_plain(recipe).items() if key not in left_out}


def study(run: Run, shared: Study, out: Path) -> Record:
    """Train, measure, write the Record."""
    trained: list[dict[str, Any]] = []
    with trying(run.tried):
        if run.method is None:
            trained = shared.train(run).rows
        else:
            shared.untrained(run.method)
        records = shared.measure(run)
    kept = () if shared.args.shared_gpu else ("train_seconds", "tokens_per_second", "peak_memory_bytes")
    speed = [{**row, "base_model": shared.args.base_model} for row in trained if row["metric"] in kept]
    record = Record(
        kind="study",
        config=portable(
            {
                "study": shared.args.name,
                "predicted": run.predicted,
                **({"tried": changed} if (changed := run.tried.changed()) else {}),
                **({"self_extend": True} if run.self_extend else {}),
                "recipe": to_plain(run.recipe) if run.method is None else {"name": run.name, "method": run.method},
                "documents": {label: [d.name for d in found] for label, found in shared.corpora.items()},
                "native_window": records[0].config["native_window"],
                "dtype": str(shared.measured.dtype).removeprefix("torch."),
                "shared_gpu": shared.args.shared_gpu,
                "prompt": records[-1].config["prompt"],
            }
        ),
        rows=[*speed, *(row for record in records for row in record.rows)],
        examples=[example for record in records for example in record.examples if example["metric"] == "retrieval"],
    )
    record.save(out)
    return record


def compare(runs: list[Run], out: Path, name: str, page: Path) -> list[Path]:
    """A page and Markdown of the runs' Records that exist, in the plan's order; nothing below two."""
    files = [file for run in runs if (file := record_file(out, name, run.name)).is_file()]
    if len(files) < 2:
        return []
    tables = results_markdown([Record.load(file) for file in files])
    return [write_report(files, page), write_atomic(page.with_suffix(".md"), tables)]


def summary(record: Record) -> str:
    """One line for the terminal."""
    found = [
        f"{row['corpus'][:4]} {row.get('task', '')}{format_window(row['window'])}@{row['scale']:g}"
        f"{'~' + format(row['slope'], 'g') if row.get('slope') is not None else ''}"
        f"{'*' + format(row['interpolation'], 'g') if 'interpolation' in row else ''} {row['value']:.4g}"
        for row in record.rows
        if row["metric"] in ("perplexity", "retrieval") and "depth" not in row
    ]
    return ", ".join(found)


def parse() -> argparse.Namespace:
    """The command line over the plan's defaults. Raises ValueError for a plan that cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--plan", type=Path, required=True)
    add("--model", help=f"folder, hub name, .gguf file or {EMBEDDED}; this and the next six default to the plan's")
    add("--base-model", help="label of the base in Records")
    add("--text", help="folder of text, or stdlib")
    add("--windows", type=int, nargs="+")
    add("--key-windows", type=int, nargs="+")
    add("--prompts", type=int)
    add("--tasks", nargs="+", choices=["pass_key", "uuid_kv"])
    add("--set", action="append", default=[], help="as of e2llm train, for every run")
    add("--out", type=Path, default=Path("benchmarks/results"))
    add("--work", type=Path, help="training runs, tokens and the comparison (runs/study, or runs/study-<name>)")
    add("--only", nargs="+", default=[], metavar="NAME", help="these runs")
    add("--until", type=float, default=float("inf"), help="seconds after which no run is begun")
    add("--shared-gpu", action="store_true", help="something else computes on it too: no speed goes into the Records")
    args = parser.parse_args()
    return with_defaults(args, read_defaults(args.plan))


def with_defaults(args: argparse.Namespace, defaults: Defaults) -> argparse.Namespace:
    """What the command line leaves out is the plan's. Raises ValueError where neither names a model or text."""
    for key in ("model", "text", "base_model", "windows", "key_windows", "prompts", "tasks"):
        if getattr(args, key) is None:
            setattr(args, key, getattr(defaults, key))
    for key in ("model", "text"):
        if not getattr(args, key):
            raise ValueError(f"{key} = '': give --{key}, or {key} in the plan's table [study]")
    if args.model == EMBEDDED:
        args.model = str(TINY)
    args.name = defaults.name
    args.set = [*defaults.set, *args.set]
    args.work = args.work or Path("runs") / "-".join(["study", *filter(None, [defaults.name])])
    return args


def main() -> int:
    """Each run in turn. 2 for what the user can mend, 130 after a signal."""
    with interrupted_by_signals():
        try:
            return _main()
        except KeyboardInterrupt:
            print("stopped: the Records that are written stay; the same command goes on from there", file=sys.stderr)
            return 130
        except ValueError as error:
            print(f"study.py: {error}", file=sys.stderr)
            return 2


def _main() -> int:
    began = time.monotonic()
    args = parse()
    text = open_text(args.text, args.work)
    settings = [
        f"model.name={args.model}",
        f"data.cache_dir={args.work / 'cache'}",
        f"train.precision={arithmetic()}",
        "data.held_out_fraction=0.01",
        "train.evaluate_windows=0",
        *args.set,
    ]
    runs = read_plan(args.plan, text.sources, settings, args.only)
    args.out.mkdir(parents=True, exist_ok=True)
    shared: Study | None = None
    for run in runs:
        out = record_file(args.out, args.name, run.name)
        if out.is_file() or time.monotonic() - began > args.until:
            print(f"{run.name}: {'already measured' if out.is_file() else 'no time left'}", flush=True)
            continue
        run = in_equal_time(run, args.out, args.name)
        shared = shared or Study(args, runs, text)
        run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, output=str(args.work / run.name)))
        record = study(run, shared, out)
        print(f"[{time.monotonic() - began:.0f} s] {run.name}: {summary(record)}", flush=True)
    print(*compare(runs, args.out, args.name, args.work / f"{args.plan.stem}.html"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
