"""Plans of studies: a TOML file becomes runs with resolved recipes, before anything is loaded.

Flows in: the file, the text's sources, settings. Flows out: `Run`s in the plan's order, and the `Defaults` of its table
[study]. Knows no model. What a plan may hold stands in study.py.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from study_tried import Tried, read_tried

from e2llm.config import Recipe, load_recipe
from e2llm.records import Record

METHODS = ("none", "linear", "ntk", "yarn", "self_extend")
TRIED = {field.name for field in dataclasses.fields(Tried)}
ROW_KEYS = {"name", "recipe", "set", "planted", "planted_sets", "method", "predicted", "concluded", "scales"}
ROW_KEYS |= {"key_scales", "slopes", "self_extend", "seconds_of", "speed_of", "interpolations"} | TRIED
Sources = Callable[[float | None, int | None], str]


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The table [study] of a plan; what the command line gives wins."""

    name: str = ""
    """Records are study_<name>_<run>.json, apart from those of other studies; empty: study_<run>.json."""
    title: str = ""
    """Heading of the plan's page in the docs."""
    intro: str = ""
    """Text under it."""
    model: str = ""
    text: str = ""
    base_model: str = "SmolLM2-135M-Instruct"
    windows: tuple[int, ...] = (8192, 32768, 65536, 131072)
    key_windows: tuple[int, ...] = (8192, 32768, 131072)
    prompts: int = 10
    tasks: tuple[str, ...] = ("pass_key",)
    recipe: str = "recommended"
    """Recipe of runs that name none: a shipped one, or a TOML file (also one beside the plan)."""
    set: tuple[str, ...] = ()
    """Settings of every run, as --set of e2llm train; a run's own `set` wins."""


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
    interpolations: tuple[float, ...] = ()
    """Shares of the way from the first weights to the trained ones at which everything is measured once more."""
    method: str | None = None
    """Frequency method (or self_extend) that the base is read with, untrained; None trains the recipe."""
    self_extend: bool = False
    """The trained weights are read with SelfExtend, at scale 1."""
    seconds_of: str | None = None
    """Run of this plan whose training time this one has, too; None: the recipe's own steps."""
    speed_of: str | None = None
    """Run whose steps take as long as this one's."""
    tried: Tried = field(default_factory=Tried)
    """What no recipe can say."""


def read_defaults(path: Path) -> Defaults:
    """The plan's table [study], whose keys are optional. Raises ValueError naming a key that is none or of another
    type."""
    table = _load(path).get("study", {})
    fields = {field.name: field.default for field in dataclasses.fields(Defaults)}
    unknown = sorted(table.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{path}: [study] has unknown keys {unknown}; known: {', '.join(fields)}")
    for key, value in table.items():
        default = fields[key]
        wanted = list if isinstance(default, tuple) else type(default)
        kinds = {type(item) for item in value} if isinstance(value, list) else set()
        if type(value) is not wanted or kinds - {type(default[0]) if isinstance(default, tuple) and default else str}:
            raise ValueError(f"{path}: [study] {key} = {value!r}: expected what {default!r} is")
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return Defaults(**given)


def read_plan(
    path: Path, sources: Sources, settings: list[str], only: list[str]
) -> list[Run]:
    """Every run's resolved recipe. `sources`: share of planted windows, most sets in one -> `data.sources` (None: the
    text's own).

    Raises ValueError naming the run that cannot be."""
    rows = _load(path).get("runs", [])
    names = [row.get("name") for row in rows]
    if not rows or len(set(names)) != len(names) or None in names:
        raise ValueError(f"{path}: [[runs]] with a name each, no name twice; found {names}")
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise ValueError(f"--only {unknown}: the plan has {names}")
    usual = read_defaults(path).recipe
    return [_run(path, row, usual, sources, settings) for row in rows if not only or row["name"] in only]


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"plan = {str(path)!r}: cannot be read ({error.strerror}); name a plan's TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error


def _run(
    path: Path, row: dict[str, Any], usual: str, sources: Sources, settings: list[str]
) -> Run:
    extra = sorted(row.keys() - ROW_KEYS)
    if extra:
        raise ValueError(f"{path}: run {row['name']!r}: unknown keys {extra}")
    text = sources(row.get("planted"), row.get("planted_sets"))
    given = [f"data.sources={text}", *settings, *row.get("set", []), f"name={row['name']}"]
    scales = {int(window): tuple(map(float, found)) for window, found in row.get("scales", {}).items()}
    key_scales = {window: found[:1] for window, found in scales.items()}
    key_scales |= {int(window): tuple(map(float, found)) for window, found in row.get("key_scales", {}).items()}
    named = row.get("recipe", usual)
    beside = path.parent / named  # a file of the plan's own
    recipe = load_recipe(str(beside) if beside.is_file() else named, given)
    slopes = tuple(map(float, row.get("slopes", [])))
    interpolations = tuple(map(float, row.get("interpolations", [])))
    if any(not 0 <= share <= 2 for share in interpolations):
        raise ValueError(
            f"{path}: run {row['name']!r}: interpolations = {list(interpolations)}: use shares from 0 (the first "
            "weights) over 1 (the trained ones) to 2"
        )
    method = row.get("method")
    trained_only = {"recipe", "set", "planted", "planted_sets", "interpolations"} | TRIED
    if method is not None and row.keys() & trained_only:
        names = ", ".join(sorted(trained_only))
        raise ValueError(f"{path}: run {row['name']!r}: method reads the base untrained: no {names}")
    if method is not None and method not in METHODS:
        raise ValueError(f"{path}: run {row['name']!r}: method = {method!r}: choose one of {', '.join(METHODS)}")
    extended = row.get("self_extend", False)
    if type(extended) is not bool or (extended and method is not None):
        raise ValueError(
            f"{path}: run {row['name']!r}: self_extend = {extended!r}: true for weights that are trained here, else "
            'leave it out; for the base method = "self_extend"'
        )
    if method == "none" and row.keys() & {"scales", "key_scales", "slopes"}:
        raise ValueError(f"{path}: run {row['name']!r}: none has no scale but 1; leave scales and slopes out")
    try:
        tried = read_tried(row)
    except ValueError as error:
        raise ValueError(f"{path}: run {row['name']!r}: {error}") from error
    timed = row.get("seconds_of"), row.get("speed_of")
    if timed.count(None) == 1 or (method is not None and timed != (None, None)):
        raise ValueError(f"{path}: run {row['name']!r}: seconds_of and speed_of go together, for runs that train")
    measured = scales, key_scales, slopes, interpolations
    return Run(row["name"], recipe, row.get("predicted", ""), *measured, method, extended, *timed, tried)


def in_equal_time(run: Run, out: Path, study: str) -> Run:
    """`run` with as many steps as fit into the training time of the run that it names; one that names none as it is.

    Raises ValueError where a Record is missing, or where steps of the other have another size."""
    if run.seconds_of is None or run.speed_of is None:
        return run
    found = {}
    for name in (run.seconds_of, run.speed_of):
        file = record_file(out, study, name)
        if not file.is_file():
            raise ValueError(f"run {run.name!r}: its time is that of {name!r}, which is not measured: no {file}")
        record = Record.load(file)
        found[name] = record.config["recipe"], next(r["value"] for r in record.rows if r["metric"] == "train_seconds")
    recipe, seconds = found[run.speed_of]
    train = run.recipe.train
    mine = run.recipe.data.window, train.batch_size, train.gradient_accumulation
    its = recipe["data"]["window"], recipe["train"]["batch_size"], recipe["train"]["gradient_accumulation"]
    if mine != its:
        raise ValueError(
            f"run {run.name!r}: a step of {run.speed_of!r} is of another size (window, batch, accumulation: {its}, not "
            f"{mine}), so it says nothing of this one's speed"
        )
    steps = max(1, round(recipe["train"]["steps"] * found[run.seconds_of][1] / seconds))
    train = dataclasses.replace(train, steps=steps, warmup_steps=min(train.warmup_steps, steps))
    return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, train=train))


def record_file(out: Path, study: str, run: str) -> Path:
    """Where the Record of a run is; `study`: the plan's name."""
    return out / f"study_{study}_{run}.json" if study else out / f"study_{run}.json"
