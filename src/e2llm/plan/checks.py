"""Warnings on a checkpoint's config: what makes a runtime scale twice, forget the base or refuse.

Flows in: a config.json's own keys (not transformers' reading of them, which fills in what is missing) and e2llm.json.
Flows out: sentences. Names of methods are those of a config's `rope_type`.
"""

from __future__ import annotations

from typing import Any

from e2llm.hf import CheckpointInfo

VLLM = {
    *("default", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3", "mllama4", "proportional", "mrope"),
    *("deepseek_yarn", "deepseek_llama_scaling", "openpangu", "bailing_mrope"),
}
"""What vLLM 0.32 knows (its "dynamic" and "ntk" are static)."""
LLAMACPP = {"default", "linear", "yarn", "longrope", "llama3"}
"""What its converter writes: the scaling types of a GGUF, and llama3 as a table of frequencies."""
_MULTIPLIED = {"linear", "dynamic", "yarn"}
"""Methods whose window runtimes take to be the factor times the original window, or max_position_embeddings without."""


def warnings_of(raw: dict[str, Any], info: CheckpointInfo | None) -> list[str]:
    """One sentence for each trap found."""
    text = raw.get("text_config") if isinstance(raw.get("text_config"), dict) else raw
    assert text is not None
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    layers = {key: value for key, value in rope.items() if isinstance(value, dict)} or {"": rope}
    found = []
    for layer, parameters in layers.items():
        found += _of_rope(text, parameters, f"{layer}: " if layer else "", info)
    window = text.get("max_position_embeddings")
    if info is not None and window and window != info.native_window:
        found.append(
            f"max_position_embeddings is {window}, e2llm.json says the native window is {info.native_window}: a "
            "runtime that multiplies it by a scale ends too far; set it back"
        )
    return found


def _of_rope(text: dict[str, Any], rope: dict[str, Any], where: str, info: CheckpointInfo | None) -> list[str]:
    found = []
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    factor, window = rope.get("factor"), text.get("max_position_embeddings")
    if kind == "default" and factor is not None:
        found.append(f"{where}factor {factor} without a rope_type: nothing scales by it; name the method")
    if kind in _MULTIPLIED and not isinstance(factor, (int, float)):
        found.append(f"{where}{kind} with the factor {factor!r}, which is no number: runtimes stop or do not scale")
        factor = None
    original = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
    if "rope_theta" not in rope and "rope_theta" not in text and "rotary_emb_base" not in text:
        found.append(f"{where}no rope_theta: each runtime assumes a base of its own (10000 in most); write the model's")
    if kind in _MULTIPLIED and info is not None:
        found.append(
            f"{where}the config scales by {kind} and e2llm.json says that the scale is chosen for each request: read "
            "by e2llm it would be scaled twice; take rope_type out"
        )
    if kind in _MULTIPLIED and factor and window:
        if original and window > original:
            found.append(
                f"{where}max_position_embeddings ({window}) is extended already, from {original}: a runtime that takes "
                f"it for the native window would end at {int(window * factor)}"
            )
        elif not original:
            found.append(
                f"{where}{kind} by {factor:g} without original_max_position_embeddings: runtimes take {window} for "
                "the native window; if it is the extended one, the factor is applied to it again"
            )
    for runtime, known in (("vLLM", VLLM), ("llama.cpp", LLAMACPP)):
        if kind not in known:
            found.append(f"{where}rope_type {kind!r} is not known to {runtime}")
    return found
