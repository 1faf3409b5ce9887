"""The five-line use from Python: extend a model you loaded, train it with your own trainer, serve it at any window."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from e2llm.config import Method, load_recipe, to_plain
from e2llm.hf import (
    CheckpointInfo,
    Extension,
    attend_far,
    attend_plainly,
    current_versions,
    get_extension,
    install,
    load_model,
    save_model,
)
from e2llm.hf.rotary import unwrap
from e2llm.infer import RequestPlan, ScaleWarning, plan_request
from e2llm.positions.attention import AttentionConfig
from e2llm.positions.choose import choose_scale
from e2llm.positions.placement import Kind, PlacementConfig, PositionSampler
from e2llm.positions.scales import Distribution, ScalesConfig


def extend(
    model: nn.Module,
    *,
    method: Method = "yarn",
    placement: Kind | PlacementConfig | None = None,
    scales: Distribution | ScalesConfig | None = None,
    max_scale: float | None = None,
    training_window: int = 4096,
    native_window: int | None = None,
    attention: AttentionConfig | None = None,
    neighbours: int | None = None,
    seed: int = 0,
) -> Extension:
    """Make a transformers causal LM draw a scale and positions for every row while it is in training mode.

    What is left out is as in the recipe `recommended-yarn`, or with method self_extend as in `recommended`: its
    placement, its scales, and with its method its slopes of the attention scale. `max_scale` with no distribution
    named draws integers 1…max_scale. `neighbours`: for method self_extend, tokens that keep their distance; None: a
    quarter of the native window.
    Works with any trainer: nothing has to pass through its collator. Evaluation mode is untouched until
    `serve_window`. `training_window` (tokens) is the longest window that will be trained; shorter batches draw for
    their own length. Row b of the n-th batch is drawn as sample n*B + b of `seed` (per rank under torch.distributed);
    `Extension.expect` names the samples instead. Returns the handle; `restore(model)` takes everything back.
    Raises ValueError for models without rotary embeddings and for methods the base cannot compose with.
    """
    recommended = load_recipe("recommended" if method == "self_extend" else "recommended-yarn")
    if placement is None:
        placement = recommended.placement
    elif not isinstance(placement, PlacementConfig):
        placement = PlacementConfig(kind=placement)
    if scales is None and max_scale is None:
        scales = recommended.scales
    elif not isinstance(scales, ScalesConfig):
        largest = recommended.scales.max_scale if max_scale is None else max_scale
        scales = ScalesConfig(distribution=scales or "uniform_integers", max_scale=largest)
    if attention is None and method == recommended.method:
        attention = recommended.attention
    extension = install(
        model, method=method, native_window=native_window, attention=attention, neighbours=neighbours
    )
    try:
        extension.sampler = PositionSampler(
            native_window=extension.native_window,
            training_window=training_window,
            scales=scales,
            placement=placement,
            seed=seed,
        )
        if placement.far_weight and extension.grouping is None:
            attend_far(model)
    except ValueError:
        extension.remove()
        raise
    extension.max_scale = scales.max_scale
    return extension


def _extension_of(model: nn.Module) -> Extension:
    extension = get_extension(model)
    if extension is None:
        raise ValueError("the model is not extended: call e2llm.extend(model) or load it with e2llm.load(folder)")
    return extension


def restore(model: nn.Module) -> None:
    """Take the extension off: the model's own rotary module, attention and generate() are back."""
    extension = _extension_of(model)
    attend_plainly(model)
    extension.remove()
    vars(unwrap(model)).pop("generate", None)


def serve_window(model: nn.Module, window: int | Literal["auto"]) -> None:
    """Set the scale for a window of `window` tokens (prompt and new tokens), or choose it in every generate() call.

    auto: smallest step of the checkpoint's schedule (the ladder 1, 2, 4, ..., max_scale without one) that holds the
    longest prompt of the batch and its new tokens, fixed for the whole call. A call that names no limit gets 1024 new
    tokens, fewer where the largest trained window ends before. Warns (`ScaleWarning`) where a scale lies outside what
    training drew. Raises ValueError for a
    window below 1 or a model that is not extended.
    """
    extension, inner = _extension_of(model), unwrap(model)
    vars(inner).pop("generate", None)
    model.eval()
    if window == "auto":
        if not hasattr(inner, "generate"):
            raise ValueError(f"window = 'auto': {type(inner).__name__} has no generate(); name a window in tokens")
        # No closure: a copy of the model, or one that was pickled, generates with itself.
        vars(inner)["generate"] = functools.partial(_generate, inner)
        return
    if isinstance(window, str):
        raise ValueError(f"window = {window!r}: give tokens, or 'auto'")
    choice = choose_scale(window, extension.native_window, max_scale=extension.max_scale, schedule=extension.schedule)
    if choice.warning:
        warnings.warn(choice.warning, ScaleWarning, stacklevel=2)
    extension.set_scale(choice.scale)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own generate() at the scale of this request."""
    extension = _extension_of(model)
    plan = _plan(model, extension, args, kwargs)
    for message in plan.warnings:
        warnings.warn(message, ScaleWarning, stacklevel=2)
    extension.set_scale(plan.scale)
    if not _limit(model, kwargs):
        kwargs["max_new_tokens"] = plan.max_new_tokens
    return type(model).generate(model, *args, **kwargs)


def _plan(model: Any, extension: Extension, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RequestPlan:
    """Scale and new tokens of one generate() call."""
    prompt = next((kwargs[k] for k in ("input_ids", "inputs", "inputs_embeds") if kwargs.get(k) is not None), None)
    prompt = args[0] if prompt is None and args else prompt
    if not isinstance(prompt, torch.Tensor):
        raise ValueError("generate() was called without input_ids: the scale is chosen from the prompt's length")
    length, limit = int(prompt.shape[1]), _limit(model, kwargs)
    new_tokens = limit.get("max_new_tokens")
    if new_tokens is None and limit:  # transformers writes one token at least, however long the prompt
        new_tokens = max(limit["max_length"] - length, 1)
    return plan_request(
        length,
        native_window=extension.native_window,
        max_scale=extension.max_scale,
        schedule=extension.schedule,
        max_new_tokens=new_tokens,
    )


def _limit(model: Any, kwargs: dict[str, Any]) -> dict[str, int]:
    """The limit that a generate() call names: one of max_new_tokens and max_length, tokens; {} where it names none.

    A checkpoint's own max_length is no wish of the call's: often it is the whole native window.
    """
    given = kwargs.get("generation_config")
    own = given if given is not None else model.generation_config
    candidates = (
        ("max_new_tokens", kwargs.get("max_new_tokens")),
        ("max_new_tokens", own.max_new_tokens),
        ("max_length", kwargs.get("max_length")),
        ("max_length", None if given is None else given.max_length),
    )
    return next(({name: int(value)} for name, value in candidates if value is not None), {})


def checkpoint_info(model: nn.Module, *, base_model: str = "", checkpoint: str = "") -> CheckpointInfo:
    """What e2llm.json says of a model that `extend` made ready. Raises ValueError for any other."""
    extension = _extension_of(model)
    sampler = extension.sampler
    if sampler is None:
        raise ValueError("the model was installed without a sampler, so how it was trained is not known: use extend()")
    return CheckpointInfo(
        method=extension.method,
        native_window=extension.native_window,
        training_window=sampler.training_window,
        max_scale=sampler.scales.max_scale,
        placement=to_plain(sampler.placement),
        scales=to_plain(sampler.scales),
        attention=to_plain(extension.attention),
        neighbours=extension.neighbours,
        schedule=[{"window": step.window, "scale": step.scale} for step in extension.schedule],
        base_model=base_model or str(getattr(model.config, "_name_or_path", "")).rsplit("/", 1)[-1],
        checkpoint=checkpoint,
        seed=sampler.seed,
        versions=current_versions("torch", "transformers"),
    )


def save(model: nn.Module, tokenizer: Any, folder: str | Path, *, base_model: str = "", checkpoint: str = "") -> Path:
    """Write an extended model as a plain HF folder with e2llm.json beside the weights; whole or not at all."""
    info = checkpoint_info(model, base_model=base_model, checkpoint=checkpoint)
    return save_model(model, tokenizer, folder, info)


def load(folder: str, **arguments: Any) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a saved folder, its extension installed from e2llm.json. Arguments as `hf.load_model`'s."""
    model, tokenizer, _ = load_model(folder, **arguments)
    return model, tokenizer
