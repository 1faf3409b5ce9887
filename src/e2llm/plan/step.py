"""How long an optimizer step takes: computing, what sharding copies, what GPUs exchange, and the optimizer.

Flows in: a `Shape`, a recipe, a GPU and how many. Flows out: a `Step`. Exchange runs beside computing, so the longer of
the two counts; the optimizer runs after both. Its traffic grows with the weights and not with the tokens: with one
window a GPU it is a seventh of the 1B shape's step, with eight a fiftieth.
"""

from __future__ import annotations

from dataclasses import dataclass

from e2llm.config import Recipe
from e2llm.plan.exchange import Exchange, exchanged
from e2llm.plan.frozen import frozen_seconds
from e2llm.plan.memory import shards_of, trained_parameters
from e2llm.plan.shape import Shape
from e2llm.plan.speed import SHARES, Gpu, Shares, is_known, seconds_per_token

UPDATED, UPDATED_SPLIT = 40.0, 28.0
"""Bytes a trained weight that an optimizer step moves. adamw: weight, gradient and two moments read, all but the
gradient written, and the gradient read and written by clipping, read by its norm. adamw_split: the same with 16-bit
gradients and halves of weights, clipping included in the one pass."""


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    windows: int
    """Over all GPUs."""
    computing: float
    """Seconds of a GPU's forward and backward passes, with what sharding copies and `frozen`."""
    frozen: float
    """Seconds of these that unpacking or fetching a frozen base takes."""
    optimizer: float
    """Seconds that a GPU updates its weights."""
    exchange: Exchange
    """What each GPU sends."""
    seconds: float
    """Of the step."""
    tokens_per_second: float
    """Over all GPUs."""


def copied_bytes(shape: Shape, recipe: Recipe, gpus: int) -> float:
    """Bytes that a GPU moves in its own memory for sharded weights, in one batch: each gather casts its shard to 16
    bits and copies the whole out of the buffer, each scatter copies gradients in, as float32."""
    shards, sharded = shards_of(recipe, gpus)
    if not sharded:
        return 0.0
    cast = 6.0 if recipe.model.dtype == "float32" else 0.0
    gathers = 2 if recipe.distributed.reshard else 1
    return gathers * shape.num_parameters * (cast / shards + 4.0) + 6.0 * trained_parameters(shape, recipe)


def updated_bytes(shape: Shape, recipe: Recipe, gpus: int) -> float:
    """Bytes that the optimizer moves on each GPU."""
    each = UPDATED_SPLIT if recipe.train.optimizer == "adamw_split" else UPDATED
    return each * trained_parameters(shape, recipe) / shards_of(recipe, gpus)[0]


def beside_bytes(shape: Shape, recipe: Recipe, gpus: int) -> tuple[int, int, float, float]:
    """(windows of a step over all GPUs, batches of each GPU, bytes that sharding copies, bytes of the optimizer)."""
    batches = recipe.accumulation(gpus)
    windows, copied = recipe.train.batch_size * batches * gpus, batches * copied_bytes(shape, recipe, gpus)
    return windows, batches, copied, updated_bytes(shape, recipe, gpus)


def step_of(shape: Shape, recipe: Recipe, gpu: Gpu, gpus: int = 1, shares: Shares = SHARES) -> Step | None:
    """None for what the constants of speed do not cover (`speed.is_known`)."""
    if not is_known(recipe, shape):
        return None
    windows, batches, copied, updated = beside_bytes(shape, recipe, gpus)
    tokens = windows * recipe.data.window
    frozen = batches * frozen_seconds(shape, recipe, gpu)
    computing = tokens / gpus * seconds_per_token(shape, recipe, gpu, shares) + copied / gpu.bytes_per_second + frozen
    optimizer = updated / gpu.bytes_per_second
    exchange = exchanged(shape, recipe, gpus, batches)
    seconds = max(computing, exchange.seconds) + optimizer
    return Step(windows, computing, frozen, optimizer, exchange, seconds, tokens / seconds)
