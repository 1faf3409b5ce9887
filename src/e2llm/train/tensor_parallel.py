"""Training with layers that groups of processes compute together: `distributed.tensor_parallel`.

Flows in: a recipe, a trainer before it prepares its model. Flows out: a trainer whose model is cut for the group
(`hf.tensor_parallel`) before Accelerate shards it further by FSDP2 over the groups: a group is to FSDP2 what a process
is without. So checkpoints, their resumption on any number of processes and the finished model are FSDP2's.

Processes of a group are neighbours (0 and 1, 2 and 3, …) and see the same samples.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from accelerate import ParallelismConfig
from torch import nn

from e2llm.config import Recipe
from e2llm.hf.load import load_config
from e2llm.hf.tensor_parallel import check_shares, share_out

TENSOR = "tp"
"""Accelerate's name of the mesh dimension along which layers are cut."""


class Groups(ParallelismConfig):
    """Accelerate's dimensions (FSDP2, tensor parallel) where it leaves out what is not as it expects: a single group is
    a dimension of FSDP2 too, and weights that are cut already are not to be wrapped again."""

    @property
    def dp_shard_enabled(self) -> bool:
        """Whether FSDP2 has a dimension: always."""
        return True

    @property
    def tp_enabled(self) -> bool:
        """Whether Accelerate is to see to the tensor parallel dimension: no."""
        return False

    @property
    def active_mesh_dims(self) -> list[str]:
        """Both."""
        return ["dp_shard", TENSOR]


def check_model(recipe: Recipe) -> None:
    """Raise ValueError where the recipe's model cannot be shared by so many processes; reads its config alone."""
    processes = recipe.distributed.tensor_parallel
    if processes > 1 and recipe.model.name:
        trust = recipe.model.trust_remote_code
        check_shares(load_config(recipe.model.name, trust_remote_code=trust), processes)


def cut_first(accelerator: Any) -> None:
    """Let `accelerator` prepare models that are cut for its groups."""
    own = accelerator.prepare

    @functools.wraps(own)
    def prepare(*given: Any, **options: Any) -> Any:
        for model in given:
            if isinstance(model, nn.Module):
                changed = share_out(model, accelerator.torch_device_mesh[TENSOR])
                for optimizer in given:
                    if isinstance(optimizer, torch.optim.Optimizer):
                        for group in optimizer.param_groups:
                            group["params"] = [changed.get(p, p) for p in group["params"]]
        return own(*given, **options)

    accelerator.prepare = prepare
