"""What a model's config alone says that a recipe cannot have of it, told before weights are read.

Flows in: a recipe. Flows out: nothing, or the ValueError that the loaded model would have led to, minutes later where
it is large.
"""

from __future__ import annotations

from typing import Any

from e2llm.config import Recipe
from e2llm.hf.extended import empty_model, extend_as_told
from e2llm.hf.far_attention import check_far
from e2llm.hf.load import load_config, load_info
from e2llm.hf.self_extend import check_trains
from e2llm.train.adapters import check_targets


def check_unloaded(recipe: Recipe) -> None:
    """Raise ValueError for a method, an attention or names for adapters that the recipe's model does not take.

    The model is built without weights. Where that is not possible (a model's own code, an unknown type) nothing is
    said: loading says it.
    """
    model = recipe.model
    config = load_config(model.name, trust_remote_code=model.trust_remote_code)
    try:
        empty: Any = empty_model(config, trust_remote_code=model.trust_remote_code)
    except Exception:
        return
    if recipe.method == "self_extend":
        check_trains(empty)
    if recipe.weighs_by_channels:
        check_far(model.attn_implementation or empty.config._attn_implementation)
    check_targets(empty, recipe.lora)
    extend_as_told(
        empty,
        model.name,
        load_info(model.name),
        method=recipe.method,
        native_window=model.native_window,
        attention=recipe.attention,
        neighbours=recipe.neighbours or None,
    )
