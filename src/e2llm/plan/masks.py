"""Masks of window x window tokens that attention holds where no kernel knows by itself what a token may see.

Flows in: a `Shape` and a recipe. Flows out: `Masks`. Which are made is transformers' choice, by the name of the
attention: none for flash and flex attention; under sdpa those that are not plainly causal (documents kept apart, a
sliding window shorter than the training window); under eager attention all. Eager attention's scores, a number for each
head and pair of tokens, are not counted anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from e2llm.config import Recipe
from e2llm.plan.shape import Shape


@dataclass(frozen=True)
class Masks:
    """Bytes for a GPU's batch of rows."""

    shared: float = 0.0
    """One mask for each kind of layer, full attention or one sliding window: a byte a pair of tokens under sdpa, of one
    row where rows have no documents of their own; a number of the weights' type under eager attention."""
    of_layer: float = 0.0
    """What a layer makes of it for itself and keeps for its backward pass: PyTorch's kernels add masks to scores, so
    under sdpa the bytes become numbers of the arithmetic's type in every call."""
    layers: int = 0
    """Layers that do; their kernels have no grouped keys beside a mask, so keys and values are repeated for each query
    head."""


def masks_of(shape: Shape, recipe: Recipe) -> Masks:
    """At the most: transformers makes none for a batch whose rows hold one document each."""
    name, window = recipe.model.attn_implementation or "sdpa", recipe.data.window
    if name not in ("sdpa", "eager"):
        return Masks()
    pairs = float(recipe.train.batch_size * window * window)
    limits = shape.sliding_windows or (None,) * shape.num_layers
    if name == "eager":
        return Masks(shared=len(set(limits)) * pairs * (4 if recipe.model.dtype == "float32" else 2))
    documents = recipe.data.document_mask
    masked: list[int | None]
    if recipe.method == "self_extend":  # keeps documents apart without one; its local layers make their own
        masked = [limit for limit in limits if limit is not None]
    else:
        masked = [limit for limit in limits if documents or (limit is not None and window >= limit)]
    shared = len(set(masked)) * (pairs if documents else float(window * window))
    number = 2 if recipe.train.precision == "bfloat16" else 4
    return Masks(shared, number * pairs if masked else 0.0, len(masked))
