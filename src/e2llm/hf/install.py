"""Wraps a model: its rotary module is exchanged, and where the method asks for it its attention.

Flows in: a transformers model, a frequency method. Flows out: its `Extension`, or a ValueError that says what is in the
way and leaves the model as it was.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from e2llm.hf.extension import Extension, get_extension
from e2llm.hf.group_tables import Grouping
from e2llm.hf.rotary import detect_layout, find_rotary_owner, is_local, layer_types, read_rope, unwrap
from e2llm.hf.scaled_rotary import ScaledRotary
from e2llm.hf.self_extend import attend_in_groups
from e2llm.positions.attention import AttentionConfig, check_attention
from e2llm.positions.frequencies import frequencies
from e2llm.positions.groups import check_neighbours, usual_neighbours


def install(
    model: nn.Module,
    *,
    method: str = "yarn",
    native_window: int | None = None,
    attention: AttentionConfig | None = None,
    neighbours: int | None = None,
) -> Extension:
    """Wrap the rotary module of this model instance; until a scale or sampler is set, its outputs stay bit for bit.

    native_window: L in tokens where the config's max_position_embeddings is not it. attention: slopes of the attention
    scale; None: the method's own. neighbours: for method self_extend, which also exchanges the model's attention:
    tokens that keep their distance; None: a quarter of L. Raises ValueError for models without a rotary module we can
    scale, for a method that cannot compose with the base's own scaling, for slopes with method none (which leaves the
    model as it was at every scale), for an attention that cannot be exchanged, and for a model that is wrapped already.
    """
    attention = attention or AttentionConfig()
    check_attention(method, attention)
    if get_extension(model) is not None:
        raise ValueError("the model is extended already: call remove() on its extension first")
    if neighbours is not None and method != "self_extend":
        raise ValueError(f"neighbours = {neighbours}: only method self_extend has them, not {method}; leave it out")
    owner: Any = find_rotary_owner(model)
    inner = owner.rotary_emb
    config: Any = unwrap(model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    ropes = {t: read_rope(inner, config, t, native_window) for t in layer_types(inner) if not is_local(t)}
    if not ropes:
        raise ValueError(f"model type {config.model_type!r}: every layer attends to a local window; nothing to scale")
    layouts = {t: detect_layout(inner, rope, t) for t, rope in ropes.items()}
    for rope in ropes.values():
        frequencies(rope, method, 1.0)  # refuse what does not compose, before anything is changed
    window = next(iter(ropes.values())).native_window
    wrapper = ScaledRotary(inner, ropes, layouts)
    wrapper.train(inner.training)
    owner.rotary_emb = wrapper
    extension = Extension(owner, wrapper, method, window, attention)
    if method == "self_extend":
        try:
            extension.grouping, extension.own_attention = _grouped(model, extension, neighbours)
        except BaseException:
            extension.remove()
            raise
    return extension


def _grouped(model: nn.Module, extension: Extension, neighbours: int | None) -> tuple[Grouping, str]:
    """How keys of `model` are told apart, and the attention that it had. Raises ValueError for a model whose layers of
    full attention are of several kinds."""
    near = usual_neighbours(extension.native_window) if neighbours is None else neighbours
    check_neighbours(near, extension.native_window)
    inner = cast(Any, unwrap(model))
    if len(extension.layer_types) > 1:
        raise ValueError(
            f"method = 'self_extend': layers of model type {inner.config.model_type!r} that see every token are of "
            f"several kinds ({', '.join(map(str, extension.layer_types))}), and its attention knows one; use method = "
            "'yarn' (the recipe recommended-yarn)"
        )
    own, inv_freq = inner.config._attn_implementation, extension.rope.inv_freq
    pairs = attend_in_groups(model, inv_freq)
    return Grouping(extension.native_window, near, inv_freq, pairs), own
