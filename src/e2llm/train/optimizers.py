"""Which optimizer trains a recipe, where it is not the Trainer's own AdamW."""

from __future__ import annotations

from typing import Any

import torch

from e2llm.config import Recipe
from e2llm.train.split_adamw import SplitAdamW


def optimizer_of(recipe: Recipe) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Class and arguments for the Trainer; None leaves the choice to it."""
    given: dict[str, Any] = {"lr": recipe.train.learning_rate, "betas": tuple(recipe.train.betas)}
    if recipe.distributed.tensor_parallel > 1:
        return AdamWByMesh, given | {"fused": True}
    return (SplitAdamW, given) if recipe.train.optimizer == "adamw_split" else None


class AdamWByMesh(torch.optim.AdamW):
    """AdamW whose fused step takes the parameters of one device mesh at a time: PyTorch's takes no others together.

    Its groups are those that it was given, so that its state can be read by a run without tensor parallelism.
    """

    def step(self, closure: Any = None) -> Any:
        """As AdamW's."""
        groups = self.param_groups
        self.param_groups = [part for group in groups for part in _by_mesh(group)]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    parts: dict[Any, list[torch.Tensor]] = {}
    for parameter in group["params"]:
        parts.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [group | {"params": part} for part in parts.values()]
