"""The README.md of an export or a checkpoint: a model card that the Hugging Face hub reads, from e2llm.json, the plan
and Records.

Flows in: what was exported and what was verified. Flows out: Markdown with YAML front matter. Nothing is guessed: a
license that is not known is left out and the card says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2llm.export.card_metadata import PARTS, front_matter, served_steps
from e2llm.export.lengths import said
from e2llm.export.plan import ExportPlan
from e2llm.export.verify import Check
from e2llm.hf import CheckpointInfo
from e2llm.records import Record, merge

_LABELS = (
    "checkpoint", "method", "suite", "corpus", "protocol", "task", "tasks", "average", "harness_metric", "split",
    "window", "scale", "depths",
)  # fmt: skip
MAX_ROWS = 60


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything that a card says."""

    name: str
    target: str
    plan: ExportPlan
    info: CheckpointInfo | None
    base_model: str
    """Where the weights came from, if it is known."""
    license: str | None
    commands: dict[str, str]
    """Runtime -> how to serve the export in it."""
    checks: Sequence[Check]
    notes: Sequence[str] = ()
    records: Sequence[Record] = field(default_factory=list)


def license_of(folder: Path | None) -> str | None:
    """The license that the README.md of a model folder names in its front matter."""
    path = None if folder is None else folder / "README.md"
    if path is None or not path.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*(\S+)\s*$", front[1], re.MULTILINE) if front else None
    return found[1].strip("'\"") if found else None


def model_card(facts: CardFacts) -> str:
    """The whole README.md."""
    parts = [
        front_matter(facts),
        f"# {facts.name}, {'any window' if facts.plan.open_scales else f'{_tokens(facts.plan.window)} tokens'}",
        _summary(facts),
        _facts_table(facts),
        _windows(facts),
        _usage(facts),
        _training(facts.info),
        _verification(facts),
        _results(facts.records),
        _license(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 and count >= 1024 else str(count)


def _summary(facts: CardFacts) -> str:
    plan = facts.plan
    if plan.open_scales:
        return _open_summary(facts)
    text = (
        f"A checkpoint of native window {plan.native_window}, exported at the fixed scale {plan.scale:g} "
        f"({plan.method}) for windows of up to {plan.window} tokens. It needs nothing of e2llm to be served: the scale "
        f"is in the {'configuration' if facts.target in ('hf', 'vllm') else 'metadata of the GGUF file'}."
    )
    if plan.scale > 1:
        text += (
            f" A fixed scale costs some quality on short inputs; for requests below {plan.native_window} tokens the "
            "checkpoint itself at scale 1 is better, and `e2llm serve` chooses for every request."
        )
    if plan.window > plan.scale * plan.native_window:
        text += (
            f" A calibration found this scale best for this window: {said(plan)}. A runtime that takes scale × native "
            "window for the longest text has to be told the window, as the commands below do."
        )
    return "\n\n".join([text, *_notes(facts)])


def _notes(facts: CardFacts) -> list[str]:
    return [f"**Note:** {note}." for note in facts.notes]


def _open_summary(facts: CardFacts) -> str:
    by = "`e2llm serve --engine llamacpp`" if facts.target in ("gguf", "ollama") else "`e2llm serve`"
    text = (
        f"The unscaled weights of a checkpoint of native window {facts.plan.native_window}. {by} reads every request "
        f"at the scale that its length asks for, from e2llm.json. Other runtimes read it within "
        f"{facts.plan.native_window} tokens"
    )
    if facts.plan.method == "self_extend":
        text += ": they have no attention that reads far tokens in groups."
    else:
        text += "; for a longer window in them, `e2llm export` one with `--window`."
    return "\n\n".join([text, *_notes(facts)])


def _windows(facts: CardFacts) -> str:
    """Which scale reads what, as serving the checkpoint itself chooses: e2llm.json's schedule, or the ladder."""
    info, plan = facts.info, facts.plan
    if info is None:
        return ""
    steps = served_steps(info)
    how = "measured by a calibration" if info.schedule else "the smallest step of 1, 2, 4, … that holds them"
    lines = ["## Windows", "", f"Prompt and new tokens of a request, and the scale that reads them best ({how}):", ""]
    lines += ["| up to tokens | scale |", "|---:|---:|", *(f"| {step.window} | {step.scale:g} |" for step in steps)]
    largest = int(info.native_window * info.max_scale)
    fixed = "" if plan.open_scales else f" This export has scale {plan.scale:g}."
    return "\n".join([*lines, "", f"Training went up to {largest} tokens.{fixed}"])


def _facts_table(facts: CardFacts) -> str:
    plan = facts.plan
    if plan.open_scales:
        scales = [("scales", ", ".join(f"{scale:g}" for scale in plan.open_scales))]
    else:
        scales = [
            ("window", f"{plan.window} tokens"),
            ("scale", f"{plan.scale:g}"),
            ("attention scale on cos and sin", f"{next(iter(plan.frequencies().values())).attention_scale:.6f}"),
        ]
    rows = [
        ("base model", facts.base_model or "not known"),
        *scales,
        ("method", plan.method),
        ("native window", f"{plan.native_window} tokens"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _usage(facts: CardFacts) -> str:
    blocks = [f"{runtime}:\n\n```\n{command}\n```" for runtime, command in facts.commands.items()]
    return "\n\n".join(["## Use", *blocks])


def _training(info: CheckpointInfo | None) -> str:
    if info is None:
        return "## Training\n\nNo e2llm.json came with the checkpoint: the scale was put on a model not trained for it."
    lines = [
        "## Training",
        f"Recipe `{info.checkpoint or 'not named'}`: method {info.method}, windows of {info.training_window} tokens, "
        f"scales up to {info.max_scale:g}, {info.steps} steps, {info.tokens} tokens, seed {info.seed}.",
    ]
    settings = {"placement": info.placement, "scales": info.scales, "attention": info.attention}
    said = {key: value for key, value in settings.items() if value}
    if said:
        lines.append("```json\n" + json.dumps(said, indent=2) + "\n```")
    if info.data:
        lines += ["Data:", "\n".join(f"- {_source(entry)}" for entry in info.data)]
    if info.versions:
        lines.append("Made with " + ", ".join(f"{name} {version}" for name, version in info.versions.items()) + ".")
    return "\n\n".join(lines)


def _source(entry: dict[str, Any]) -> str:
    """One line of provenance; absolute paths keep their last name only."""
    shown = {k: Path(v).name if isinstance(v, str) and Path(v).is_absolute() else v for k, v in entry.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if isinstance(value, str | int | float))


def _verification(facts: CardFacts) -> str:
    if not facts.checks:
        return ""
    return "\n".join(["## Verification", "", *(f"- {check.line()}" for check in facts.checks)])


def _results(records: Sequence[Record]) -> str:
    """A table of rows; single depths, positions and steps are left to the Records."""
    merged = merge(records)
    if not merged:
        return ""
    rows = [row for row in merged if not any(label in row for label in PARTS if label != "split")]
    shown = rows[:MAX_ROWS]
    labels = [label for label in _LABELS if any(row.get(label) is not None for row in shown)]
    header = [*labels, "metric", "value", "95 % interval", "unit", "n"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in shown:
        ends = f"{row['low']:.4g}–{row['high']:.4g}" if row.get("low") is not None else "–"
        cells = ["" if row.get(label) is None else row[label] for label in labels]
        cells += [row["metric"], f"{row['value']:.4g}", ends, row["unit"], row["n"]]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    left = len(merged) - len(shown)
    more = f"\n\n{left} further rows are in the Records." if left > 0 else ""
    return "## Results\n\n" + "\n".join(lines) + more


def _license(facts: CardFacts) -> str:
    if facts.license:
        return f"## License\n\n{facts.license}, as the model's own card says."
    return (
        "## License\n\nNot known. Before publishing, put the license of the base model (and of the "
        "data, where it asks for that) into the front matter above."
    )
