"""How long an optimizer step takes on several GPUs: computing, what they exchange, and how much of it stands beside.

Flows in: a `Shape`, a recipe, a GPU and how many. Flows out: a `Step`.
"""

from __future__ import annotations

from dataclasses import dataclass

from e2llm.config import Recipe
from e2llm.plan.exchange import Exchange, exchanged
from e2llm.plan.shape import Shape
from e2llm.plan.speed import Gpu, tokens_per_second


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    windows: int
    """Over all GPUs."""
    computing: float
    """Seconds that a GPU computes."""
    exchange: Exchange
    """What each GPU sends."""
    seconds: float
    """Of the step."""
    tokens_per_second: float
    """Over all GPUs."""


def step_of(shape: Shape, recipe: Recipe, gpu: Gpu, gpus: int) -> Step | None:
    """None for what the constants of speed do not cover (`tokens_per_second`)."""
    speed = tokens_per_second(shape, recipe, gpu)
    if speed is None:
        return None
    train, window = recipe.train, recipe.data.window
    whole = recipe.distributed.global_batch or train.batch_size * train.gradient_accumulation * gpus
    computing = whole * window / gpus / speed
    exchange = exchanged(shape, recipe, gpus, max(1, whole // (train.batch_size * gpus)))
    seconds = max(computing, exchange.seconds)  # exchange runs beside the backward pass; what is longer counts
    return Step(whole, computing, exchange, seconds, whole * window / seconds)
