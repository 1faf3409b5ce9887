"""The final comparison over seeds, for docs/study.md: mean and spread of every figure, and what rests on one seed.

Flows in: Records of kind study_final, one a (checkpoint, seed). Flows out: Markdown and plots; nothing where there are
none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from e2llm.records import Record
from e2llm.report import Drawing, perplexity_figure
from e2llm.report.formats import TASK_NAMES, format_count, format_value, format_window, sentence_case, slug
from e2llm.report.series import all_rows, sections, series_of

ORDER = ("base-none", "base-ntk", "base-yarn", "plain", "paper")
ORDER += ("recommended-yarn-without-facts", "recommended-yarn", "recommended")
"""Checkpoints in the order of the table; the rival comes last."""
HERO = "recommended"
"""What the README's first sentence is about."""
NOTE = (
    "Each contestant trained, calibrated on the development documents and measured once a seed, with the same budget; "
    "`benchmarks/final.py` makes the Records. Mean over seeds ± their standard deviation. `base-…` is the model before "
    "any training, read with that method."
)
Key = tuple[str, str]
"""Corpus, and what was measured."""


def final_block(records: Sequence[Record]) -> list[str]:
    """Heading, note, one table a figure, and which figures rest on one seed."""
    finals = [record for record in records if record.kind == "study_final"]
    if not finals:
        return []
    values: dict[Key, dict[str, dict[int, dict[int, float]]]] = {}
    metrics: dict[Key, str] = {}
    for record in finals:
        name, seed = record.config["recipe"]["name"], record.config["seed"]
        for row in record.rows:
            key = _key(row)
            if key is not None:
                metrics[key] = row["metric"]
                of_seed = values.setdefault(key, {}).setdefault(name, {}).setdefault(row["window"], {})
                if seed in of_seed:
                    raise ValueError(f"study_final: {name} with seed {seed} holds {key} at {row['window']} twice")
                of_seed[seed] = row["value"]
    blocks = ["## Final comparison", NOTE, *_images(records, "images")]
    untrained = {record.config["recipe"]["name"] for record in finals if not _is_trained(record)}
    for key in sorted(values, key=lambda key: (metrics[key] != "perplexity", key[1], key[0])):
        blocks += [f"{sentence_case(key[1])}, {key[0]}:", _table(values[key], metrics[key], untrained)]
    return [*blocks, _seeds(finals)]


def headline(records: Sequence[Record]) -> str:
    """The README's first figure: the longest window of the first corpus, ours against its own native window and
    against the same budget spent otherwise; "" before `recommended` was measured."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.kind == "study_final" and _is_trained(record):
            found.setdefault(record.config["recipe"]["name"], []).append(record)
    if HERO not in found:
        return ""
    ours = found[HERO][0]
    native, recipe = ours.config["native_window"], ours.config["recipe"]
    corpus, longest = min(_perplexity(ours))[0], max(_perplexity(ours), key=lambda at: at[1])[1]
    far, near = _mean(found[HERO], corpus, longest), _mean(found[HERO], corpus, native)
    if far is None or near is None:
        return ""
    others = [
        f"{words} {format_value('perplexity', value)}"
        for name, words in (("paper", "the paper's recipe gives"), ("plain", "plain fine-tuning"))
        if (value := _mean(found.get(name, []), corpus, longest)) is not None
    ]
    against = f" With the same budget {', '.join(others)}." if others else ""
    keys = [
        row
        for record in found[HERO]
        for row in record.rows
        if row.get("task") == "pass_key" and row["window"] == longest and "depth" not in row
    ]
    found_keys, asked = sum(round(row["value"] * row["n"]) for row in keys), sum(row["n"] for row in keys)
    heard = f", and finds {found_keys} of {asked} pass keys there" if keys else ""
    return (
        f"{ours.rows[-1]['base_model']}, made for windows of {format_window(native)}, after "
        f"{format_count(recipe['train']['steps'])} steps on windows of {format_window(recipe['data']['window'])} "
        f"reads {corpus} at {format_window(longest)} with perplexity **{format_value('perplexity', far)}**, "
        f"{'below' if far < near else 'above'} its own {format_value('perplexity', near)} at "
        f"{format_window(native)}{heard}.{against}"
    )


def _perplexity(record: Record) -> dict[tuple[str, int], float]:
    """(corpus, window) -> perplexity."""
    return {(r["corpus"], r["window"]): r["value"] for r in record.rows if _key(r) == (r.get("corpus"), "perplexity")}


def _mean(seeds: Sequence[Record], corpus: str, window: int) -> float | None:
    """Over those seeds of one contestant that read the window; None where none did, as when a measurement was cut
    off."""
    values = [found[corpus, window] for found in map(_perplexity, seeds) if (corpus, window) in found]
    return fmean(values) if values else None


def readme_block(records: Sequence[Record]) -> list[str]:
    """The same tables in short: what the README says of checkpoints that had the same budget."""
    blocks = final_block(records)
    if not blocks:
        return []
    finals = [record for record in records if record.kind == "study_final"]
    trained = [record for record in finals if _is_trained(record)]
    if not trained:
        return []
    train, data = trained[0].config["recipe"]["train"], trained[0].config["recipe"]["data"]
    devices = sorted({str(record.environment.get("gpu") or record.environment.get("cpu")) for record in finals})
    windows = train["batch_size"] * train["gradient_accumulation"]
    steps = f"{format_count(train['steps'])} steps of {windows} windows of {data['window']} tokens for each"
    head = (
        f"Equal budgets: {finals[0].rows[-1]['base_model']}, one {' or '.join(devices)}, {steps}, read at the scale "
        "that was calibrated for the window on other documents."
    )
    images = _images(records, "docs/images")
    # What rests on one seed is said below the tables.
    return [head, *images, *(block.replace(" (one seed)", "") for block in blocks[2 + len(images) :])]


def image_drawings(records: Sequence[Record]) -> dict[str, Drawing]:
    """File name -> perplexity against the window, one plot a corpus, of each contestant's first seed."""
    first: dict[str, Record] = {}
    for record in sorted((r for r in records if r.kind == "study_final"), key=lambda r: r.config["seed"]):
        first.setdefault(record.config["recipe"]["name"], record)
    found = {}
    for section in sections(all_rows([first[name] for name in _ordered(first)]), "perplexity"):
        if any(len(one.points) > 1 for one in series_of(section)):
            name = slug("final-perplexity", section.labels["corpus"])
            drawing = perplexity_figure(section, name=name)
            assert drawing is not None, "a series of several windows can be drawn"
            found[f"{name}.svg"] = drawing
    return found


def _images(records: Sequence[Record], folder: str) -> list[str]:
    seeds = {r.config["seed"] for r in records if r.kind == "study_final" and _is_trained(r)}
    of = f", seed {min(seeds)}" if len(seeds) > 1 else ""
    return [
        f"![Perplexity against the window, {file.removeprefix('final-perplexity-').removesuffix('.svg')}{of}]"
        f"({folder}/{file})"
        for file in image_drawings(records)
    ]


def _is_trained(record: Record) -> bool:
    """Older Records, of trained contestants all, do not say."""
    return bool(record.config.get("trained", True))


def _key(row: Mapping[str, Any]) -> Key | None:
    """Which table a row belongs to; None for speed, and for keys by depth."""
    if "depth" in row:
        return None
    if row["metric"] == "perplexity":
        return row["corpus"], "perplexity"
    return (row["corpus"], TASK_NAMES[row["task"]]) if row["metric"] == "retrieval" else None


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def _table(found: Mapping[str, Mapping[int, Mapping[int, float]]], metric: str, untrained: Collection[str]) -> str:
    windows = sorted({window for one in found.values() for window in one})
    lines = [["checkpoint", *map(format_window, windows)], ["---", *["---:"] * len(windows)]]
    for name in _ordered(found):
        values = {window: list(found[name].get(window, {}).values()) for window in windows}
        lines.append([f"`{name}`", *(_cell(values[window], metric, name in untrained) for window in windows)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(values: Sequence[float], metric: str, untrained: bool) -> str:
    """Mean ± standard deviation; a single value of a trained checkpoint says that it is one."""
    if not values:
        return "–"
    mean = format_value(metric, fmean(values))
    if untrained:
        return mean
    return f"{mean} ± {stdev(values):.2g}" if len(values) > 1 else f"{mean} (one seed)"


def _seeds(finals: Sequence[Record]) -> str:
    seeds: dict[str, list[int]] = {}
    for record in filter(_is_trained, finals):
        seeds.setdefault(record.config["recipe"]["name"], []).append(record.config["seed"])
    said = ", ".join(f"`{name}` {', '.join(map(str, sorted(seeds[name])))}" for name in _ordered(seeds))
    single = [f"`{name}`" for name in _ordered(seeds) if len(seeds[name]) == 1]
    return f"Seeds: {said}." + (f" What is said of {', '.join(single)} rests on one seed." if single else "")
