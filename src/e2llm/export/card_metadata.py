"""The front matter of a model card, as the Hugging Face hub reads it: license, base, data sets, results.

Flows in: what was exported, Records. Flows out: YAML. Results go into the hub's `model-index`; only rows of this very
checkpoint, read as the export reads it, are put there: the hub shows them as the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from e2llm.positions.choose import Step, ladder, parse_schedule

if TYPE_CHECKING:
    from e2llm.export.card import CardFacts
    from e2llm.hf import CheckpointInfo

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NAMED = ("task", "tasks", "average", "harness_metric", "filter", "protocol", "window", "scale", "method")
"""Labels that say what a metric's value is of."""
PARTS = ("depth", "position", "split", "step")
"""Labels of rows that are one part of another row's value, or a point of a curve."""
_SUITES = {"longbench": ("THUDM/LongBench", "LongBench"), "leval": ("L4NLP/LEval", "L-Eval")}
"""Suite -> its data set on the hub, and that one's name."""


def front_matter(facts: CardFacts) -> str:
    """From `---` to `---`. What is not known is a comment that says what to fill in."""
    from huggingface_hub import EvalResult, ModelCardData

    plan, info = facts.plan, facts.info
    library = {"hf": "transformers", "vllm": "transformers", "peft": "peft"}.get(facts.target, "gguf")
    known_base = bool(_HUB_NAME.fullmatch(facts.base_model))
    results = [EvalResult(**found) for found in own_results(facts)]
    data = ModelCardData(
        license=facts.license,
        base_model=facts.base_model if known_base else None,
        base_model_relation="finetune" if known_base and info is not None else None,
        datasets=sorted(hub_datasets(info.data if info is not None else [])) or None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["e2llm", "long-context", plan.method, *(["gguf"] if library == "gguf" else [])],
        model_name=facts.name,
        eval_results=results or None,
    )
    lines = [] if facts.license else ["# license: fill in before publishing"]
    lines += [] if known_base else ["# base_model: owner/name of the model that was extended"]
    return "\n".join(["---", *lines, data.to_yaml().strip(), "---"])


def hub_datasets(data: Sequence[dict[str, Any]]) -> set[str]:
    """Names of the hub data sets among the sources of `e2llm.json`."""
    hub = [str(entry["path"])[4:] for entry in data if str(entry.get("path", "")).startswith("hub:")]
    return {name for name in hub if _HUB_NAME.fullmatch(name)}


def own_results(facts: CardFacts) -> Iterator[dict[str, Any]]:
    """Arguments of an `EvalResult` for each row that was measured on this checkpoint as the export is read. `n` and the
    95 % interval stand in `metric_args`, where the hub has no field of its own for them."""
    seen: dict[tuple[str, ...], set[float]] = {}
    for record in facts.records:
        for row in record.rows if record.kind == "evaluate" else []:
            if not _is_own(row, facts) or any(label in row for label in PARTS):
                continue
            data = _data_set(row)
            named = (f"{key} {_shown(row[key])}" for key in _NAMED if row.get(key) not in (None, "none"))
            name, value = ", ".join([row["metric"], *named]), float(f"{row['value']:.6g}")
            found = seen.setdefault((*data.values(), name), set())
            if value in found:  # the same figure in two Records
                continue
            if found:  # measured again: both stay, told apart
                name += f", {record.path.stem if record.path else f'measurement {len(found) + 1}'}"
            found.add(value)
            yield {
                "task_type": "text-generation",
                **data,
                "metric_type": row["metric"],
                "metric_value": value,
                "metric_name": name,
                "metric_args": {"n": row["n"], **_ends(row)},
            }


def _data_set(row: dict[str, Any]) -> dict[str, str]:
    """What a row was measured on, as the hub names it: a benchmark's task, or a text by its label."""
    suite = row.get("suite")
    if suite in _SUITES:
        of, name = _SUITES[suite]
        task = str(row.get("task") or row.get("tasks"))
        return {"dataset_type": of, "dataset_config": task, "dataset_name": f"{name} {task}"}
    name = str(row.get("corpus") or (row.get("task") if suite else None) or "unnamed text")
    return {"dataset_type": re.sub(r"\W+", "-", name.lower()).strip("-") or "unnamed", "dataset_name": name}


def _ends(row: dict[str, Any]) -> dict[str, float]:
    return {key: float(f"{row[key]:.6g}") for key in ("low", "high") if row.get(key) is not None}


def _is_own(row: dict[str, Any], facts: CardFacts) -> bool:
    """Whether a row is of this checkpoint as it is exported: a fixed scale has the rows of that scale alone, an open
    export those of each window at the scale that serves it."""
    named = facts.info.checkpoint if facts.info is not None else ""
    if row.get("checkpoint") is not None and row["checkpoint"] != named:
        return False
    if row.get("method") is not None and row["method"] != facts.plan.method:
        return False
    if row.get("scale") is None:
        return True
    window = row.get("window")
    fits = [step for step in served_steps(facts.info) if window is not None and step.window >= window]
    if facts.plan.open_scales and fits:
        return abs(row["scale"] - fits[0].scale) < 1e-9  # type: ignore[no-any-return]
    scales = facts.plan.open_scales or (facts.plan.scale,)
    return any(abs(row["scale"] - scale) < 1e-9 for scale in scales)


def served_steps(info: CheckpointInfo | None) -> tuple[Step, ...]:
    """Windows and the scale that serving reads each with: the calibrated ones of e2llm.json, or the ladder's."""
    if info is None:
        return ()
    return parse_schedule(info.schedule) or tuple(
        Step(int(scale * info.native_window), scale) for scale in ladder(info.max_scale)
    )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
