"""What each runtime makes of a checkpoint's config and e2llm.json: which scales, to which window, what it ignores.

Flows in: a transformers config, what e2llm.json says. Flows out: an `Applied` for each runtime. Our own engines and our
plugin are asked themselves, on a model without weights; vLLM's lengths are those by which exports are checked. What
transformers, vLLM and llama.cpp know by name is in `plan.checks`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from e2llm.export.gguf_layout import find_architecture, rope_keys
from e2llm.export.lengths import vllm_lengths
from e2llm.export.open_gguf import check_open
from e2llm.export.plan import make_open_plan
from e2llm.hf import CheckpointInfo
from e2llm.hf.exported import EXPORT_MARK, exported_window
from e2llm.hf.extended import UnknownScaling, empty_model, extend_as_told
from e2llm.hf.rotary import is_local
from e2llm.infer import Engine
from e2llm.plan.checks import LLAMACPP, VLLM
from e2llm.vllm_plugin.marking import mark, scaling_of
from e2llm.vllm_plugin.refusals import UNTESTED

LONGEST_SHOWN = 60
"""Characters of the scales in the table."""
_OVER = "e2llm over llama.cpp"


@dataclass(frozen=True)
class Applied:
    """What one runtime does with the model."""

    runtime: str
    method: str
    """How frequencies are scaled, in the words of a config's rope_type or of e2llm's methods."""
    scales: tuple[float, ...]
    """Factors that a request can be read at, by what the config or the checkpoint names; () where it is refused."""
    window: int | None
    """Longest text in tokens that it takes; None: nothing bounds it."""
    notes: tuple[str, ...] = ()
    """What is ignored, changed or refused, and why."""


def applied(config: Any, info: CheckpointInfo | None, name: str) -> list[Applied]:
    """Of transformers, vLLM without and with our plugin, llama.cpp, and our engine, over llama.cpp too.

    config: transformers' reading of config.json. info: e2llm.json beside it. name: of the model, a folder where it is
    one.
    """
    alone = _vllm(config, info)
    try:
        model = empty_model(config)
    except UnknownScaling as error:
        refused = (str(error),)
        theirs = Applied("transformers", _rope(config)[1], (), None, refused)
        ours = _ours_refused(info, refused)
    else:
        theirs, ours = _transformers(config, info), _ours(model, info, name)
    return [theirs, alone, _plugin(config, name, alone), _llamacpp(config, info), *ours]


def table(rows: list[Applied]) -> list[str]:
    """Lines of text."""
    lines = ["what runtimes apply:", f"  {'runtime':26}{'method':10}{'longest text':>14}   scales"]
    for row in rows:
        window = "–" if not row.scales else "no bound" if row.window is None else f"{row.window:,}"
        scales = ", ".join(f"{scale:g}" for scale in row.scales) or "refused"
        if len(scales) > LONGEST_SHOWN:
            scales = f"{len(row.scales)} from {row.scales[0]:g} to {row.scales[-1]:g}"
        lines.append(f"  {row.runtime:26}{row.method:10}{window:>14}   {scales}")
        lines += [f"      {note}" for note in row.notes]
    return lines


def _rope(config: Any) -> tuple[dict[str, Any], str, tuple[float, ...]]:
    """(parameters of the layers that see everything, their rope_type, the factors that it names); without rotary
    positions ({}, "none", (1,))."""
    text = config.get_text_config()
    parameters = dict(getattr(text, "rope_parameters", None) or {})
    layers = {key: value for key, value in parameters.items() if isinstance(value, dict) and not is_local(key)}
    rope = dict(next(iter(layers.values()))) if layers else parameters
    kind = str(rope.get("rope_type") or "default") if rope else "none"
    told = rope.get("factor")
    # Plain frequencies take no factor; what is no number is among the warnings.
    factor = float(told) if kind != "default" and isinstance(told, (int, float)) and told else 1.0
    original = rope.get("original_max_position_embeddings")
    if kind == "longrope" and original:
        factor = factor if told else float(text.max_position_embeddings / original)
        # Divisors that are the same at both ends are one set, whatever the length: how exports say a fixed scale.
        return rope, kind, (1.0, factor) if rope.get("short_factor") != rope.get("long_factor") else (factor,)
    return rope, kind, (factor,)


def _said(config: Any, info: CheckpointInfo | None, factors: tuple[float, ...]) -> tuple[tuple[float, ...], list[str]]:
    """(factors, with an export's own scale where its config names none; notes on what only e2llm reads)."""
    notes: list[str] = []
    told = getattr(config, EXPORT_MARK, None)
    if isinstance(told, dict) and "scale" in told:
        return (float(told["scale"]),), notes  # ntk is said as another theta, which has no factor
    if info is not None and info.method != "none" and info.max_scale > 1:
        remedy = "e2llm alone reads more" if info.method == "self_extend" else "`e2llm export` fixes one"
        notes.append(
            f"ignores e2llm.json: past {info.native_window:,} tokens there is no scale but the config's own; {remedy}"
        )
    return factors, notes


def _transformers(config: Any, info: CheckpointInfo | None) -> Applied:
    rope, kind, named = _rope(config)
    factors, notes = _said(config, info, named)
    if kind == "llama3":
        notes.append("as its makers published it, up to max_position_embeddings; e2llm calls that scale 1")
    if kind == "dynamic":
        notes.append("the factor grows with the length read; keys in the cache keep the one they were written with")
    if kind == "longrope" and len(factors) > 1:
        text = config.get_text_config()
        original = rope.get("original_max_position_embeddings") or text.max_position_embeddings
        notes.append(f"switches at {original:,} tokens, in the middle of a text too")
    return Applied("transformers", kind, factors, None, tuple(notes))


def _vllm(config: Any, info: CheckpointInfo | None) -> Applied:
    rope, kind, factors = _rope(config)
    if kind not in {*VLLM, "none"}:
        return Applied("vLLM", kind, (), None, (f"knows no rope_type {kind!r}",))
    factors, notes = _said(config, info, factors)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)  # GPT-2 has it by another name
    if not longest:
        return Applied("vLLM", kind, factors, None, (*notes, "the config names no longest text"))
    text = config.get_text_config().to_dict() | {"max_position_embeddings": longest}
    if kind == "yarn" and not rope.get("original_max_position_embeddings"):
        return Applied("vLLM", kind, (), None, ("its YaRN needs original_max_position_embeddings",))
    found = vllm_lengths(text)
    least = min(found, key=lambda bound: found[bound])
    if len({*found.values()}) > 1:
        notes.append("; ".join(f"{bound}: {tokens:,}" for bound, tokens in found.items()))
    meant = exported_window(config)
    if meant is not None and found[least] < meant:
        notes.append(f"exported for {meant:,} tokens: start it with the command of `e2llm export --to vllm`")
    if kind == "dynamic":
        notes.append("static: the base is changed once, by the factor, whatever the length")
    if kind == "yarn" and rope.get("attention_factor") is not None and rope.get("attn_factor") is None:
        notes.append(
            f"versions to 2026 ignore attention_factor {rope['attention_factor']:g} and take 0.1 ln(factor) + 1; "
            "`e2llm export --to vllm` says it for both"
        )
    return Applied("vLLM", kind, factors, found[least], tuple(notes))


def _plugin(config: Any, name: str, alone: Applied) -> Applied:
    """As vLLM would be told: `mark` changes its config, and this one is a copy."""
    runtime = "vLLM with e2llm's plugin"
    model = SimpleNamespace(model=name, hf_config=copy.deepcopy(config), hf_overrides={})
    try:
        mark(model)
    except ValueError as error:
        return Applied(runtime, "e2llm", (), None, (str(error),))
    scaling = scaling_of(model)
    if scaling is None:
        return Applied(runtime, alone.method, alone.scales, alone.window, ("leaves this model to vLLM",))
    notes = (f"each request at its own scale; on a GPU {UNTESTED}",)
    return Applied(runtime, scaling.method, scaling.scales, scaling.max_window, notes)


def _llamacpp(config: Any, info: CheckpointInfo | None) -> Applied:
    """A file by llama.cpp's own converter."""
    rope, kind, factors = _rope(config)
    factors, notes = _said(config, info, factors)
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    notes.append("takes longer texts when its context is made larger")
    if kind not in {*LLAMACPP, "none"}:
        factors = (1.0,)
        notes.append(f"its converter has no word for rope_type {kind!r}: the file is unscaled, or it stops")
    if kind == "yarn" and rope.get("attention_factor") is not None:
        notes.append(
            f"attention_factor {rope['attention_factor']:g} may be dropped by its converter; "
            "`e2llm export --to gguf` writes it"
        )
    return Applied("llama.cpp", kind, factors, int(window) if window else None, tuple(notes))


def _ours_refused(info: CheckpointInfo | None, reasons: tuple[str, ...]) -> list[Applied]:
    method = info.method if info is not None else "yarn"
    return [Applied(runtime, method, (), None, reasons) for runtime in ("e2llm", _OVER)]


def _ours(model: Any, info: CheckpointInfo | None, name: str) -> list[Applied]:
    """`e2llm generate` and `serve`, and `serve --engine llamacpp`, which makes a file with scales left open. `model`:
    without weights; it is extended."""
    config = model.config
    try:
        extension = extend_as_told(model, name, info)
    except ValueError as error:
        return _ours_refused(info, (str(error),))
    engine = Engine(model, None, info=info)
    plan = make_open_plan(engine)
    reach = max([int(engine.native_window * engine.max_scale), *(step.window for step in extension.schedule)])
    notes = []
    _, kind, factors = _rope(config)
    fixed = exported_window(config) is not None
    scales = plan.open_scales if extension.method != "none" else (1.0,)
    if fixed:
        scales, _ = _said(config, info, factors)
        notes.append("an export: read as its config scales it")
    elif kind not in ("none", "default", "dynamic") and max(factors) > 1:
        notes.append(f"on top of the config's own {kind} by {max(factors):g}")
    if info is None and not fixed:
        notes.append("no e2llm.json: longer requests are read at further scales, with a warning")
    rows = [Applied("e2llm", extension.method, scales, reach, tuple(notes))]
    if fixed:
        told = "an export is served from the .gguf file of `e2llm export --to gguf`"
        return [*rows, Applied(_OVER, extension.method, (), None, (told,))]
    try:
        architecture = find_architecture(config.get_text_config(), reach)
        check_open(plan)
        rope_keys(plan, architecture)
    except ValueError as error:
        return [*rows, Applied(_OVER, extension.method, (), None, (str(error),))]
    return [*rows, Applied(_OVER, extension.method, scales, reach)]
