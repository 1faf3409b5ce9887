"""Many recipes, one process: which change makes a checkpoint better? One Record a run.

    python benchmarks/study.py --model MODEL --text DIR --plan plan.toml --out DIR [--only NAME ...] [--until SECONDS]

DIR of --text holds train/*.txt (documents separated by a line <|endoftext|>) and dev/<corpus>/*.txt: long documents
that no final result is reported on. The plan is a TOML file:

    [[runs]]
    name = "j63"
    recipe = "recommended"                 # a shipped recipe or a TOML file
    set = ["placement.max_jumps=63"]       # as --set of e2llm train
    method = "ntk"                         # read the base itself with it: nothing is trained
    planted = 0.1                          # share of windows with facts stated and asked for again (default 0)
    scales = {131072 = [12, 16]}           # scales a window is measured at (default window / native window)
    key_scales = {131072 = [12, 16]}       # the same for keys; default: the first of `scales`
    slopes = [0.06]                        # the windows of `scales` once more, with these attention slopes when serving
    predicted = "a little better at 128k"  # written down before it is measured
    concluded = "no difference"            # written down afterwards, for docs/study.md

Plans: study.toml, one change a run from `recommended`; baselines.toml, every recipe under one budget of tokens;
curves.toml, largest scales, steps, and the base untrained.

The model is loaded, its layers compiled and the text tokenized once; every run starts from the same weights. Writes
study_<name>.json: perplexity of whole windows and pass keys on the dev documents, the resolved recipe and the
prediction. A run whose Record exists is skipped; after --until seconds none is begun. At the end the Records that the
plan has by then are compared in WORK/<plan>.html and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from e2llm.config import Recipe, load_recipe, to_plain
from e2llm.data import build_corpus
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.documents import load_documents
from e2llm.evaluate.run import evaluate
from e2llm.hf import get_extension, install, load_model
from e2llm.infer import Engine
from e2llm.records import Record, portable, write_atomic
from e2llm.report import results_markdown, write_report
from e2llm.train import train_loaded


@dataclass(frozen=True)
class Run:
    """One row of the plan."""

    name: str
    recipe: Recipe
    predicted: str
    scales: dict[int, tuple[float, ...]]
    """Window -> scales measured; a window that is not named is read at window / L."""
    key_scales: dict[int, tuple[float, ...]]
    """The same for retrieval."""
    slopes: tuple[float, ...]
    """Attention slopes at which the windows of `scales` are measured once more."""
    method: str | None = None
    """Frequency method that the base is read with, untrained; None trains the recipe."""


def read_plan(path: Path, files: list[Path], settings: list[str], only: list[str]) -> list[Run]:
    """Every run's resolved recipe, before anything is loaded. Raises ValueError naming the run that cannot be."""
    rows = tomllib.loads(path.read_text(encoding="utf-8")).get("runs", [])
    names = [row.get("name") for row in rows]
    if not rows or len(set(names)) != len(names) or None in names:
        raise ValueError(f"{path}: [[runs]] with a name each, no name twice; found {names}")
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise ValueError(f"--only {unknown}: the plan has {names}")
    return [_run(path, row, files, settings) for row in rows if not only or row["name"] in only]


def _run(path: Path, row: dict[str, Any], files: list[Path], settings: list[str]) -> Run:
    known = {"name", "recipe", "set", "planted", "method", "predicted", "concluded", "scales", "key_scales", "slopes"}
    extra = sorted(row.keys() - known)
    if extra:
        raise ValueError(f"{path}: run {row['name']!r}: unknown keys {extra}")
    more = f', separator="<|endoftext|>", planted={row.get("planted", 0.0)}'
    sources = ", ".join(f"{{path={json.dumps(str(f))}, weight={f.stat().st_size}{more}}}" for f in files)
    given = [f"data.sources=[{sources}]", *settings, *row.get("set", []), f"name={row['name']}"]
    scales = {int(window): tuple(map(float, found)) for window, found in row.get("scales", {}).items()}
    key_scales = {window: found[:1] for window, found in scales.items()}
    key_scales |= {int(window): tuple(map(float, found)) for window, found in row.get("key_scales", {}).items()}
    recipe = load_recipe(row.get("recipe", "recommended"), given)
    slopes = tuple(map(float, row.get("slopes", [])))
    method = row.get("method")
    if method is not None and row.keys() & {"recipe", "set", "planted"}:
        raise ValueError(f"{path}: run {row['name']!r}: method reads the base untrained: no recipe, set or planted")
    if method not in (None, "none", "linear", "ntk", "yarn"):
        raise ValueError(f"{path}: run {row['name']!r}: method = {method!r}: choose none, linear, ntk or yarn")
    return Run(row["name"], recipe, row.get("predicted", ""), scales, key_scales, slopes, method)


class Study:
    """What all runs share: weights to start from, a model that trains, one that is measured, text."""

    def __init__(self, args: argparse.Namespace, runs: list[Run]) -> None:
        self.args = args
        types = sorted({run.recipe.model.dtype for run in runs})
        if len(types) > 1:
            raise ValueError(f"model.dtype = {types}: all runs of one process share a model; start them apart (--only)")
        self.model, self.tokenizer, _ = load_model(args.model, dtype=types[0])
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        self.measured, _, _ = load_model(args.model, dtype=dtype)
        self.corpora = {
            folder.name: load_documents(folder, self.tokenizer, num_tokens=max(args.windows))
            for folder in sorted((args.text / "dev").iterdir())
        }
        self.last: tuple[dict[str, Any], Record] | None = None

    def train(self, run: Run) -> Record:
        """Train from the first weights; the measured model then has the new ones.

        The weights of the run before are taken where training would make the same: see `what_trains`."""
        wanted = what_trains(run.recipe)
        if self.last is not None and self.last[0] == wanted:
            self._read_with(self.measured, run.recipe)
            return self.last[1]
        self.last = None
        self.model.load_state_dict(self.start)
        # A recipe of long windows turns it on; the next one must not pay for it.
        name = "activation_checkpointing_disable"
        getattr(self.model, name, self.model.gradient_checkpointing_disable)()
        for model in (self.model, self.measured):
            self._read_with(model, run.recipe)
        corpus = build_corpus(
            run.recipe.data, self.tokenizer, cache_dir=Path(run.recipe.data.cache_dir), progress=False
        )
        result = train_loaded(run.recipe, self.model, self.tokenizer, corpus, quiet=True)
        assert result.record is not None, "nothing stops a study's run before its end"
        with torch.no_grad():
            for target, source in zip(self.measured.parameters(), self.model.parameters(), strict=True):
                target.copy_(source)
        self.last = (wanted, result.record)
        return result.record

    def untrained(self, method: str) -> None:
        """The measured model has the first weights again, read with `method`."""
        self.last = None
        self.measured.load_state_dict(self.start)
        extension = get_extension(self.measured)
        if extension is not None:
            extension.remove()
        install(self.measured, method=method)

    @staticmethod
    def _read_with(model: torch.nn.Module, recipe: Recipe) -> None:
        extension = get_extension(model)
        if extension is not None:
            extension.remove()
        install(model, method=recipe.method, attention=recipe.attention)

    def measure(self, run: Run) -> list[Record]:
        """Perplexity at every window, pass keys in the first corpus's documents."""
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


def what_trains(recipe: Recipe) -> dict[str, Any]:
    """A recipe without what changes no weight: name, folder, and at scale 1, where all are the model itself, method."""
    left_out = {"name", "output", *(("method",) if recipe.scales.max_scale == 1 else ())}
    return {key: value for key, value in to_plain(recipe).items() if key not in left_out}


def study(run: Run, shared: Study, out: Path) -> Record:
    """Train, measure, write the Record."""
    trained: list[dict[str, Any]] = []
    if run.method is None:
        trained = shared.train(run).rows
    else:
        shared.untrained(run.method)
    records = shared.measure(run)
    kept = ("train_seconds", "tokens_per_second", "peak_memory_bytes")
    speed = [row for row in trained if row["metric"] in kept]
    record = Record(
        kind="study",
        config=portable(
            {
                "predicted": run.predicted,
                "recipe": to_plain(run.recipe) if run.method is None else {"name": run.name, "method": run.method},
                "documents": {label: [d.name for d in found] for label, found in shared.corpora.items()},
                "native_window": records[0].config["native_window"],
                "prompt": records[-1].config["prompt"],
            }
        ),
        rows=[*speed, *(row for record in records for row in record.rows)],
        examples=[example for record in records for example in record.examples if example["metric"] == "retrieval"],
    )
    record.save(out)
    return record


def compare(runs: list[Run], out: Path, page: Path) -> list[Path]:
    """A page and Markdown of the runs' Records that exist, in the plan's order; nothing below two."""
    files = [file for run in runs if (file := out / f"study_{run.name}.json").is_file()]
    if len(files) < 2:
        return []
    tables = results_markdown([Record.load(file) for file in files])
    return [write_report(files, page), write_atomic(page.with_suffix(".md"), tables)]


def summary(record: Record) -> str:
    """One line for the terminal."""
    found = [
        f"{row['corpus'][:4]} {row.get('task', '')}{row['window'] // 1024}k@{row['scale']:g}"
        f"{'~' + format(row['slope'], 'g') if row.get('slope') is not None else ''} {row['value']:.4g}"
        for row in record.rows
        if row["metric"] in ("perplexity", "retrieval") and "depth" not in row
    ]
    return ", ".join(found)


def main() -> None:
    """Each run in turn."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--base-model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which no run is begun")
    parser.add_argument("--windows", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--key-windows", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tasks", nargs="+", default=["pass_key"], choices=["pass_key", "uuid_kv"])
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    files = sorted((args.text / "train").glob("*.txt"))
    settings = [
        f"model.name={args.model}",
        f"data.cache_dir={args.work / 'cache'}",
        "data.held_out_fraction=0.01",
        "train.evaluate_windows=0",
        *args.set,
    ]
    runs = read_plan(args.plan, files, settings, args.only)
    args.out.mkdir(parents=True, exist_ok=True)
    shared = Study(args, runs)
    for run in runs:
        out = args.out / f"study_{run.name}.json"
        if out.is_file() or time.monotonic() - began > args.until:
            print(f"{run.name}: {'already measured' if out.is_file() else 'no time left'}", flush=True)
            continue
        output = args.work / run.name
        run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, output=str(output)))
        record = study(run, shared, out)
        print(f"[{time.monotonic() - began:.0f} s] {run.name}: {summary(record)}", flush=True)
    print(*compare(runs, args.out, args.work / f"{args.plan.stem}.html"), sep="\n")


if __name__ == "__main__":
    main()
