"""What the study is to reach, and whether Records say that it does: the first table of docs/study.md.

Flows in: Records (kinds evaluate, study, study_final). Flows out: Markdown. A ratio is made within one Record, so that
both its figures are of the same documents and target tokens. Nothing is typed in but the goals themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from docs_runs import of_study

from e2llm.records import Record
from e2llm.report.formats import format_window

BASE_MODEL = "SmolLM2-135M-Instruct"
NATIVE = 8192
CORPORA = ("mathematics", "novels")
KEY_PROMPTS = 100
"""Prompts below which a share that reaches its goal proves nothing yet."""
BUDGET_STEPS = 1200
"""Steps below which a run of the study is too short to be held against the goals."""
REFERENCE = "plain"
SHOWN = ("recommended", "recommended-yarn", "recommended-yarn-without-facts")

NOTE = (
    "Perplexities are of whole windows, relative to those at 8k on the same documents and target tokens, each window "
    "read at the checkpoint's own scale for it (window / 8k in a study's run). A goal counts as met only where it "
    "holds on every corpus that was measured; keys need 100 prompts a length. Runs of the study are measured on the "
    "development documents; early ones did not score the very same tokens at each window and make no ratio. A value "
    "without the number of its seeds rests on one."
)


@dataclass(frozen=True)
class Measured:
    """One checkpoint's Records: those of several seeds together, or all of one."""

    name: str
    records: tuple[Record, ...]

    def rows(self, metric: str, **labels: Any) -> Iterator[tuple[Record, dict[str, Any]]]:
        """Rows with these labels, at one scale a window: window / L where a Record holds several."""
        for record in self.records:
            found = [
                row
                for row in record.rows
                if row["metric"] == metric
                and "depth" not in row
                and _checkpoint(record, row) == self.name
                and all(row.get(key) == value for key, value in labels.items())
            ]
            if len(found) > 1 and "window" in labels:
                found = [row for row in found if row["scale"] == max(1.0, labels["window"] / NATIVE)]
            # Several slopes at this scale: the first is the checkpoint's own.
            yield from ((record, row) for row in found[: 1 if "window" in labels else None])


@dataclass(frozen=True)
class Finding:
    """A value, what it is of, and whether it proves the goal (None: too little was asked)."""

    text: str
    met: bool | None


def _checkpoint(record: Record, row: Mapping[str, Any]) -> str:
    return str(record.config["recipe"]["name"] if record.kind == "study" else row.get("checkpoint"))


def _perplexities(one: Measured, corpus: str, windows: Sequence[int]) -> list[tuple[dict[int, float], int]]:
    """(window -> perplexity, target tokens) of each Record that holds all the windows, over the same tokens."""
    labels = {"corpus": corpus, "protocol": "whole"}
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for window in windows:
        for record, row in one.rows("perplexity", window=window, **labels):
            found.setdefault(id(record), {})[window] = row
    whole = [rows for rows in found.values() if len(rows) == len(windows) and len({r["n"] for r in rows.values()}) == 1]
    return [({w: r["value"] for w, r in rows.items()}, next(iter(rows.values()))["n"]) for rows in whole]


def _ratios(one: Measured, corpus: str, windows: Sequence[int]) -> tuple[dict[int, float], int] | None:
    """Window -> perplexity relative to the native window's, over the most tokens any Record has; a mean over the
    Records (seeds) that have as many. And how many those are."""
    found = _perplexities(one, corpus, (NATIVE, *windows))
    most = [values for values, tokens in found if tokens == max(n for _, n in found)]
    if not most:
        return None
    return {w: fmean(values[w] / values[NATIVE] for values in most) for w in windows}, len(most)


def _seeds(count: int) -> str:
    return f" ({count} seeds)" if count > 1 else ""


def _monotone(one: Measured, others: Mapping[str, Measured]) -> list[Finding]:
    windows = (32_768, 65_536, 131_072)
    found = _ratios(one, "mathematics", windows)
    if found is None:
        return []
    ratios = [found[0][window] for window in windows]
    text = " / ".join(f"{ratio:.3f}" for ratio in ratios) + _seeds(found[1])
    return [Finding(text, ratios[0] > ratios[1] > ratios[2])]


def _novels(one: Measured, others: Mapping[str, Measured]) -> list[Finding]:
    found = _ratios(one, "novels", (131_072,))
    return [Finding(f"{found[0][131_072]:.2f}{_seeds(found[1])}", found[0][131_072] < 1)] if found else []


def _far(one: Measured, others: Mapping[str, Measured]) -> list[Finding]:
    found = {corpus: _ratios(one, corpus, (262_144,)) for corpus in CORPORA}
    return [
        Finding(f"{corpus} {ratio[0][262_144]:.2f}{_seeds(ratio[1])}", ratio[0][262_144] <= 1)
        for corpus, ratio in found.items()
        if ratio is not None
    ]


def _found(task: str, window: int, least: float) -> Callable[[Measured, Mapping[str, Measured]], list[Finding]]:
    """The share of keys found at one length, over the most prompts any Record asked."""

    def look(one: Measured, others: Mapping[str, Measured]) -> list[Finding]:
        rows = [row for _, row in one.rows("retrieval", task=task, window=window)]
        most = [row for row in rows if row["n"] == max(r["n"] for r in rows)]
        if not most:
            return []
        value, prompts = fmean(row["value"] for row in most), sum(row["n"] for row in most)
        reached = value >= least
        met = None if reached and prompts < KEY_PROMPTS else reached
        return [Finding(f"{value:.2f} of {prompts}{_seeds(len(most))}", met)]

    return look


def _inside(one: Measured, others: Mapping[str, Measured]) -> list[Finding]:
    """The native window against plain fine-tuning, where both read the same tokens."""
    reference = others.get(REFERENCE)
    found = []
    for corpus in CORPORA if reference else ():
        assert reference is not None
        ours, theirs = _perplexities(one, corpus, (NATIVE,)), _perplexities(reference, corpus, (NATIVE,))
        common = sorted({n for _, n in ours} & {n for _, n in theirs})
        if not common:
            continue
        values, plain = ([v[NATIVE] for v, n in perplexities if n == common[-1]] for perplexities in (ours, theirs))
        change = fmean(values) / fmean(plain) - 1
        found.append(Finding(f"{corpus} {100 * change:+.1f} %{_seeds(min(len(values), len(plain)))}", change <= 0.005))
    return found


def _short(one: Measured, others: Mapping[str, Measured]) -> list[Finding]:
    """Mean accuracy of the short tasks against plain fine-tuning, over the same tasks and questions."""

    def accuracies(of: Measured) -> dict[tuple[str, int], float]:
        rows = [row for _, row in of.rows("accuracy", suite="short", harness_metric="acc")]
        keys = {(str(row["task"]), int(row["n"])) for row in rows}
        return {key: fmean(r["value"] for r in rows if (r["task"], r["n"]) == key) for key in sorted(keys)}

    ours, theirs = accuracies(one), accuracies(others[REFERENCE]) if REFERENCE in others else {}
    if not ours or ours.keys() != theirs.keys():
        return []
    points = 100 * (fmean(ours.values()) - fmean(theirs.values()))
    return [Finding(f"{points:+.1f} points, {len(ours)} tasks", points >= -0.5)]


@dataclass(frozen=True)
class Goal:
    """One row of the table."""

    figure: str
    wanted: str
    look: Callable[[Measured, Mapping[str, Measured]], list[Finding]]
    parts: int = 1
    """Findings that there have to be: corpora that the goal speaks of."""


GOALS = (
    Goal("perplexity, mathematics, 32k / 64k / 128k", "falling", _monotone),
    Goal("perplexity, novels, 128k", "below 1", _novels),
    *(
        Goal(f"pass key, {format_window(window)}", "0.95 or more", _found("pass_key", window, 0.95))
        for window in (32_768, 65_536, 131_072)
    ),
    Goal("`uuid_kv`, 64k", "0.9 or more", _found("uuid_kv", 65_536, 0.9)),
    Goal("perplexity at 8k against plain fine-tuning", "+0.5 % or less", _inside, parts=2),
    Goal("perplexity, 256k", "1 or less", _far, parts=2),
    Goal("short tasks against plain fine-tuning", "-0.5 points or better", _short),
)


def goals_block(records: Sequence[Record]) -> list[str]:
    """Heading, note and one table: a row a goal, a column a checkpoint."""
    results, study = _subjects(records)
    shown = [(name, results[name], results) for name in SHOWN if name in results]
    shown += [(f"study: {name}", one, study) for name, one in study.items() if name != REFERENCE and _trained(one)]
    head = ["figure", "goal", *(f"`{name}`" for name, _, _ in shown)]
    lines = [head, ["---"] * len(head)]
    for goal in GOALS:
        cells = [_cell(goal, goal.look(one, others)) for _, one, others in shown]
        lines.append([goal.figure, goal.wanted, *cells])
    return ["## Goals", NOTE, "\n".join("| " + " | ".join(line) + " |" for line in lines)]


def _cell(goal: Goal, found: Sequence[Finding]) -> str:
    """The values and the verdict; one finding that fails decides, a missing one leaves it open."""
    values = ", ".join(one.text for one in found)
    if any(one.met is False for one in found):
        return f"{values}: **not met**"
    if len(found) < goal.parts:
        return f"{values}: not measured whole" if found else "not measured"
    return f"{values}: too few prompts" if any(one.met is None for one in found) else f"{values}: met"


def _subjects(records: Sequence[Record]) -> tuple[dict[str, Measured], dict[str, Measured]]:
    """Checkpoint -> its Records on the evaluation's documents, and run -> its Record on the study's.

    A final comparison replaces the single runs: all its Records of a checkpoint together, a seed each.
    """
    finals = [record for record in records if record.kind == "study_final"]
    single = [r for r in records if r.kind == "evaluate" and any(x.get("base_model") == BASE_MODEL for x in r.rows)]
    names = {row["checkpoint"] for record in single for row in record.rows if row.get("checkpoint")}
    results = {name: Measured(name, tuple(single)) for name in sorted(names)}
    for name in sorted({record.config["recipe"]["name"] for record in finals}):
        own = tuple(record for record in finals if record.config["recipe"]["name"] == name)
        results[name] = Measured(name, own + tuple(r for r in single if not _overlaps(r, name, own)))
    return results, {name: Measured(name, (record,)) for name, record in of_study(records).items()}


def _overlaps(record: Record, name: str, finals: Sequence[Record]) -> bool:
    """Whether a single run measured what the final comparison has from several seeds. Of perplexities all have to be
    there: one of a window that it has not is held against the native window's in the same Record."""
    metrics = {(row["metric"], row.get("task"), row.get("window")) for final in finals for row in final.rows}
    own = [row for row in record.rows if row.get("checkpoint") == name]
    there = [row for row in own if (row["metric"], row.get("task"), row.get("window")) in metrics]
    read = [row for row in own if row["metric"] == "perplexity"]
    return any(row["metric"] != "perplexity" for row in there) or (bool(read) and all(row in there for row in read))


def _trained(one: Measured) -> bool:
    steps = one.records[0].config["recipe"].get("train", {}).get("steps", 0)
    return bool(steps >= BUDGET_STEPS)
