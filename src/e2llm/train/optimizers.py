"""Which optimizer trains a recipe, where it is not the Trainer's own AdamW."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from e2llm.config import Recipe
from e2llm.train.split_adamw import SplitAdamW
from e2llm.train.tensor_parallel import TENSOR


def optimizer_of(recipe: Recipe) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Class and arguments for the Trainer; None leaves the choice to it."""
    given: dict[str, Any] = {"lr": recipe.train.learning_rate, "betas": tuple(recipe.train.betas)}
    if recipe.distributed.tensor_parallel > 1:
        return AdamWByMesh, given | {"fused": True}
    return (SplitAdamW, given) if recipe.train.optimizer == "adamw_split" else None


class AdamWByMesh(torch.optim.AdamW):
    """AdamW of a model whose weights are cut for tensor parallelism and then sharded, all of them DTensors.

    Its fused step takes the parameters of one device mesh at a time: PyTorch's takes no others together. Afterwards the
    weights that every process of a group holds are those of its first one: gradients of the copies are summed over
    other processes each, maybe in another order, and would let them drift. Its groups are those that it was given, so
    that its state can be read by a run without tensor parallelism.
    """

    def step(self, closure: Any = None) -> Any:
        """As AdamW's."""
        groups = self.param_groups
        self.param_groups = [part for group in groups for part in _by_mesh(group)]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        _agree([parameter for group in groups for parameter in group["params"]])
        return loss


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    parts: dict[Any, list[Any]] = {}
    for parameter in group["params"]:
        parts.setdefault(parameter.device_mesh, []).append(parameter)
    return [group | {"params": part} for part in parts.values()]


@torch.no_grad()
def _agree(parameters: list[Any]) -> None:
    among = next(p.device_mesh[TENSOR].get_group() for p in parameters if TENSOR in p.device_mesh.mesh_dim_names)
    for parameter in parameters:
        placed = dict(zip(parameter.device_mesh.mesh_dim_names, parameter.placements, strict=True))
        if not (TENSOR in placed and placed[TENSOR].is_shard()):
            dist.broadcast(parameter.to_local(), group=among, group_src=0)
