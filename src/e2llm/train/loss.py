"""The loss of a run as its recipe says it: in pieces, a share of it a teacher's, some tokens counting for more.

Flows in: a recipe and its model. Flows out: the teacher, and a context in which the model's forward computes the loss.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from e2llm.config import Recipe
from e2llm.hf.chunked_loss import chunked_forward
from e2llm.hf.compiled import compile_layers
from e2llm.hf.teacher import Teacher
from e2llm.train import distributed
from e2llm.train.distributed import Processes


def teacher_of(recipe: Recipe, model: nn.Module) -> Teacher | None:
    """The model as it is now, for `train.distill`; None without."""
    if not recipe.train.distill:
        return None
    teacher = Teacher(model, torch.bfloat16 if recipe.train.precision == "bfloat16" else None)
    if recipe.train.compile == "layers":
        compile_layers(teacher.model)
    return teacher


def loss_in_pieces(recipe: Recipe, model: nn.Module, teacher: Teacher | None) -> AbstractContextManager[None]:
    """Within the block the model computes the loss as `chunked_forward` does; its own where `train.logits_tokens` = 0.
    Raises ValueError, once entered, for a model that cannot, where the recipe needs it."""
    config = recipe.train
    if not config.logits_tokens:
        return nullcontext()
    # After adapters: an output layer that they replaced is the one to call.
    return chunked_forward(
        model,
        config.logits_tokens,
        compiled=config.compile == "layers",
        teacher=teacher,
        distill=config.distill,
        from_first=distributed.reads_once(recipe, Processes.of_environment()),
        weighted=recipe.data.weighs_tokens,
    )
