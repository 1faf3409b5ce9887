"""The longest text that a runtime takes from what was exported, by the runtime's own rules.

Flows in: config.json with the command line's overrides, a GGUF's metadata, a Modelfile. Flows out: `Check`s against
the window that was asked for. A calibrated schedule may read a window W at a scale g with g × L < W (L: native window):
a runtime that computes its longest text, or the rows of its tables, as g × L then refuses W or reads past its table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from e2llm.export.plan import ExportPlan
from e2llm.export.verify import Check

_OWN_LENGTH = {"su", "longrope", "llama3"}
"""Types whose max_position_embeddings vLLM takes as it is in every version."""


def said(plan: ExportPlan) -> str:
    """The window and what it is read at."""
    reach = int(plan.scale * plan.native_window)
    past = f", past scale × native window = {reach}" if plan.window > reach else ""
    return f"{plan.window} tokens at scale {plan.scale:g}{past}"


def vllm_lengths(text: dict[str, Any]) -> dict[str, int]:
    """What bounds a text in vLLM -> tokens. `text`: settings of the language model, overrides put in.

    The length is max_position_embeddings times the factor; YaRN's was original_max_position_embeddings times the factor
    until 2026 and is max_position_embeddings since (vllm-project/vllm#56446). The table of cos and sin has as many
    rows as the type says: YaRN's always original_max_position_embeddings times the factor.
    """
    found: dict[str, int] = {}
    longest = int(text["max_position_embeddings"])
    for name, rope in _rotaries(text).items():
        kind, factor = rope.get("rope_type", "default"), float(rope.get("factor") or 1.0)
        scaled = int(longest if kind in {*_OWN_LENGTH, "default"} else longest * factor)
        if kind == "yarn":
            rows = int(rope["original_max_position_embeddings"] * factor)
            found |= {f"longest text{name}, to 2026": rows, f"longest text{name}": longest, f"rows of YaRN{name}": rows}
        else:
            found |= {f"longest text{name}": scaled, f"rows of {kind}{name}": scaled}
    return found


def _rotaries(text: dict[str, Any]) -> dict[str, dict[str, Any]]:
    parameters = text.get("rope_parameters") or {}
    by_type = {f" ({key})": value for key, value in parameters.items() if isinstance(value, dict)}
    full = {name: rope for name, rope in by_type.items() if "full_attention" in name}
    return full or by_type or {"": parameters}


def check_vllm_length(
    config: dict[str, Any], overrides: dict[str, Any], section: str | None, plan: ExportPlan
) -> Check:
    """Whether vLLM reads the plan's window: `config` is config.json, `section` the part with the language model."""
    text = config if section is None else config[section]
    found = vllm_lengths({**text, **(overrides if section is None else overrides.get(section, {}))})
    least = min(found, key=lambda name: found[name])
    detail = f"{said(plan)}; by vLLM's rules the shortest of its bounds is {found[least]} ({least})"
    return Check("window in vLLM", found[least] >= plan.window, detail)


def check_folder_length(folder: Path, plan: ExportPlan) -> Check:
    """transformers bounds nothing but what a tokenizer warns of."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return Check("window in transformers", True, f"{said(plan)}; nothing bounds it")
    limit = AutoTokenizer.from_pretrained(str(folder)).model_max_length
    told = "nothing bounds it" if limit > 10**9 else f"the tokenizer's limit is {limit}"
    return Check("window in transformers", limit >= plan.window, f"{said(plan)}; {told}")


def check_gguf_length(context_length: int, modelfile: Path | None, plan: ExportPlan) -> Check:
    """llama.cpp takes `context_length` for what the model was made for; Ollama also cuts num_ctx there."""
    detail, passed = f"{said(plan)}; context_length is {context_length}", context_length >= plan.window
    if modelfile is not None:
        found = re.search(r"^PARAMETER num_ctx (\d+)$", modelfile.read_text(encoding="utf-8"), re.MULTILINE)
        asked = int(found[1]) if found else 0
        detail, passed = f"{detail}, num_ctx {asked}", passed and asked == plan.window
    return Check("window in Ollama" if modelfile is not None else "window in llama.cpp", passed, detail)
