"""Seconds that a frozen base takes which does not lie on the GPU in 16 bits: unpacking 4-bit weights, fetching others.

Flows in: a `Shape`, a recipe, a GPU's data sheet. Flows out: seconds of one batch, beside those of `plan.speed`. The
first constant rests on five runs of the 7B shape, one on an H100 and four on an H200, the second on two.
"""

from __future__ import annotations

from e2llm.config import Recipe
from e2llm.plan.memory import offloaded_bytes, packed_parameters
from e2llm.plan.shape import Shape
from e2llm.plan.speed import Gpu

UNPACKED = 15.7
"""Bytes that go through memory for each 4-bit weight each time that it is used, beside what its product takes. Written
in 16 bits and read in four, it would be 2.5 by a kernel at full speed. The mean of runs that say 13.4 to 19.2."""
FETCHED_PER_SECOND = 23.8e9
"""Bytes that `model.offload = cpu` brings to the GPU in a second: copies that nothing runs beside. The mean of one
run with one window and one with two."""


def uses_of(recipe: Recipe) -> int:
    """Times that a batch reads each frozen weight: forward, backward, and where layers are computed again once more."""
    return 3 if recipe.train.gradient_checkpointing else 2


def fetched_bytes(shape: Shape, recipe: Recipe) -> float:
    """Bytes that a batch brings to the GPU: each layer for its forward pass, and once for both that follow."""
    return 2 * offloaded_bytes(shape, recipe)


def frozen_seconds(shape: Shape, recipe: Recipe, gpu: Gpu) -> float:
    """Of one batch; 0 for a base in 16 bits on the GPU."""
    unpacked = UNPACKED * uses_of(recipe) * packed_parameters(shape, recipe) / gpu.bytes_per_second
    return unpacked + fetched_bytes(shape, recipe) / FETCHED_PER_SECOND
