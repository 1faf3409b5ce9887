"""A GGUF whose scale is left open: what stands beside the file, and the proof at the scales that may be chosen.

Flows in: the engine, the plan, the file of unscaled weights. Flows out: e2llm.json (where the checkpoint has one or a
method was given), tokenizer and generation config in the folder, and `Check`s of what llama.cpp makes of each scale.
`e2llm serve --engine llamacpp` reads such a folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from e2llm.export import runtimes
from e2llm.export.gguf_context import METHODS, context_rope
from e2llm.export.plan import ExportPlan
from e2llm.export.verify import Check, Probe, ask_engine, require
from e2llm.hf import CheckpointInfo, Extension
from e2llm.infer import Engine
from e2llm.positions.frames import Frames, check_movable
from e2llm.positions.groups import group_of_scale
from e2llm.records import portable


def check_open(plan: ExportPlan) -> None:
    """Raise ValueError where a scale cannot be told to llama.cpp, before anything is written."""
    if plan.method not in METHODS:
        raise ValueError(
            f"method = {plan.method!r}: llama.cpp's contexts are told {', '.join(METHODS)}; give a window, or serve "
            "with `e2llm serve`"
        )
    if plan.method == "self_extend":
        check_movable(plan.neighbours)
    for scale in plan.open_scales:
        context_rope(plan.ropes[None], plan.method, scale, plan.slope)


def write_beside(folder: Path, engine: Engine) -> None:
    """What a server needs beside the weights."""
    engine.tokenizer.save_pretrained(folder)
    generation: Any = getattr(engine.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    assumed = "yarn" if engine.extension.rope.rope_type in ("default", "dynamic") else "linear"
    if engine.info is None and engine.extension.method == assumed:
        return  # what is served without one, with a line that says so
    info_of(engine.extension, engine.max_scale, engine.info).save(folder)


def info_of(extension: Extension, max_scale: float, info: CheckpointInfo | None) -> CheckpointInfo:
    """e2llm.json as the engine serves: the checkpoint's own, or of a method and a window that were given instead."""
    serving = extension.attention.serving()
    told = info or CheckpointInfo(
        method=extension.method,
        native_window=extension.native_window,
        training_window=extension.native_window,
        max_scale=max_scale,
    )
    own = info is not None and info.method == extension.method
    return dataclasses.replace(
        told,
        method=extension.method,
        native_window=extension.native_window,
        max_scale=max_scale,
        neighbours=extension.neighbours,
        attention=told.attention if own else {} if serving is None else {"training_slope": serving},
        schedule=[dataclasses.asdict(step) for step in extension.schedule],
        base_model=str(portable(told.base_model)),
        data=portable(told.data),
    )


def prove(path: Path, plan: ExportPlan, engine: Engine, probe: Probe, kind: str) -> Iterator[Check]:
    """Frequencies of all scales; logits and perplexity in llama.cpp at the least and the largest above 1."""
    above = [scale for scale in plan.open_scales if scale > 1]
    shown = ", ".join(f"{scale:g}" for scale in plan.open_scales)
    check_open(plan)
    yield Check("frequencies of llama.cpp's contexts", True, f"those of scales {shown} agree by ggml's formulas")
    for scale in sorted({*above[:1], *above[-1:]}):
        told = context_rope(plan.ropes[None], plan.method, scale, plan.slope)
        frames = _exact_frames(plan, scale)
        if frames is not None and len(probe.long) <= plan.neighbours:
            near = f"the probe's {len(probe.long)} tokens are near ones, which no scale reads otherwise"
            yield Check(f"far tokens in llama.cpp at scale {scale:g}", None, near)
            continue
        scaled = ask_engine(engine, dataclasses.replace(plan, scale=scale), probe.long)
        yield require(runtimes.check_context(path, scaled, kind, told, scale, frames))


def _exact_frames(plan: ExportPlan, scale: float) -> Frames | None:
    """With a frame for every token; None where no keys are moved."""
    if plan.method != "self_extend":
        return None
    group = group_of_scale(scale, plan.native_window, plan.neighbours)
    return None if group == 1 else Frames(group, plan.neighbours, 1, 1)
