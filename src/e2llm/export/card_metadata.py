"""The front matter of a model card, as the Hugging Face hub reads it: license, base, data sets, results.

Flows in: what was exported, Records. Flows out: YAML. Results go into the hub's `model-index`; only rows of this very
checkpoint, read as the export reads it, are put there: the hub shows them as the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e2llm.export.card import CardFacts

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NAMED = ("task", "protocol", "window", "scale", "method")
"""Labels that say what a metric's value is of."""


def front_matter(facts: CardFacts) -> str:
    """From `---` to `---`. What is not known is a comment that says what to fill in."""
    from huggingface_hub import EvalResult, ModelCardData

    plan, info = facts.plan, facts.info
    library = "transformers" if facts.target in ("hf", "vllm") else "gguf"
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
    """Arguments of an `EvalResult` for each row that was measured on this checkpoint at a scale of the export."""
    seen: set[tuple[str, str]] = set()
    for record in facts.records:
        for row in record.rows if record.kind == "evaluate" else []:
            if not _is_own(row, facts) or "depth" in row or "split" in row:
                continue
            corpus = str(row.get("corpus", "unnamed text"))
            name = ", ".join([row["metric"], *(f"{key} {_shown(row[key])}" for key in _NAMED if key in row)])
            if (corpus, name) in seen:  # the same figure in two Records
                continue
            seen.add((corpus, name))
            yield {
                "task_type": "text-generation",
                "dataset_type": re.sub(r"\W+", "-", corpus.lower()).strip("-") or "unnamed",
                "dataset_name": corpus,
                "metric_type": row["metric"],
                "metric_value": float(f"{row['value']:.6g}"),
                "metric_name": name,
            }


def _is_own(row: dict[str, Any], facts: CardFacts) -> bool:
    """Whether a row is of this checkpoint as it is exported: a fixed scale has the rows of that scale alone."""
    named = facts.info.checkpoint if facts.info is not None else ""
    if row.get("checkpoint") is not None and row["checkpoint"] != named:
        return False
    if row.get("method") is not None and row["method"] != facts.plan.method:
        return False
    scales = facts.plan.open_scales or (facts.plan.scale,)
    return row.get("scale") is None or any(abs(row["scale"] - scale) < 1e-9 for scale in scales)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
