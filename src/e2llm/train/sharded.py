"""Sharded checkpoints: what a checkpoint says of the run that wrote it, and whole weights out of many shards.

Flows in: a Trainer checkpoint folder. Flows out: whether these processes may go on from it, a plain model with its
weights. Reading whole weights needs host memory for one copy and no other process.

    none, ddp    model.safetensors (or adapter) and optimizer.pt: any number of processes
    fsdp2        torch.distributed.checkpoint folders: any number of processes
    deepspeed    ZeRO's partitions: the same number of processes only
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from e2llm.config import Recipe
from e2llm.config_distributed import DistributedConfig
from e2llm.train.distributed import Processes, windows_per_step

COMPLETE = "COMPLETE"
"""File written last into a checkpoint folder: without it the folder is the rest of a save that was cut off. Holds
`described`."""
WHOLE = ("none", "ddp")
"""Strategies under which each process holds all weights."""
_FAMILIES = {"none": "whole", "ddp": "whole", "fsdp2": "fsdp2", "deepspeed": "deepspeed"}


def described(recipe: Recipe, world: int) -> dict[str, Any]:
    """What a checkpoint must say for another number of processes to go on from it."""
    return {
        "strategy": recipe.distributed.strategy,
        "processes": world,
        "windows_per_step": windows_per_step(recipe, world),
    }


def same_run(first: Recipe, second: Recipe) -> bool:
    """Whether two recipes make the same steps: how these are spread over processes may differ, and what is checked
    before."""

    def core(recipe: Recipe) -> Recipe:
        train = dataclasses.replace(recipe.train, batch_size=1, gradient_accumulation=1, check_memory=True)
        return dataclasses.replace(recipe, train=train, distributed=DistributedConfig())

    return core(first) == core(second)


def check_resume(checkpoint: Path, recipe: Recipe, processes: Processes) -> None:
    """Raise ValueError where these processes cannot go on from `checkpoint` as the run that wrote it would have."""
    text = (checkpoint / COMPLETE).read_text()
    if not text:  # of a version that wrote none; such runs were of one process
        return
    told, now = json.loads(text), described(recipe, processes.world)
    strategy = recipe.distributed.strategy
    if _FAMILIES[told["strategy"]] != _FAMILIES[strategy]:
        raise ValueError(
            f"distributed.strategy = {strategy!r}: {checkpoint} was written by strategy {told['strategy']!r}; resume "
            "with that one (on any number of processes, one included), or train again"
        )
    if told["windows_per_step"] != now["windows_per_step"]:
        whole = told["windows_per_step"]
        raise ValueError(
            f"a step here takes {now['windows_per_step']} windows, {checkpoint} was written by steps of {whole}: "
            f"set distributed.global_batch={whole} and train.gradient_accumulation=1"
        )
    if strategy == "deepspeed" and told["processes"] != processes.world:
        raise ValueError(
            f"{checkpoint} was written by {told['processes']} processes, and ZeRO's partitions cannot be read by "
            f"{processes.world}: start as many, or use strategy 'fsdp2', whose checkpoints any number can read"
        )


def load_whole(model: nn.Module, checkpoint: Path, strategy: str) -> None:
    """Put the weights of a sharded checkpoint into `model` (adapters added already, if the run had any)."""
    if strategy == "deepspeed":
        state = _zero_weights(checkpoint)
        unknown = model.load_state_dict(state, strict=False).unexpected_keys
        assert not unknown, f"{checkpoint}: weights {unknown[:4]} are not the model's"
        return
    import torch.distributed.checkpoint as dcp
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    adapted = isinstance(model, PeftModel)
    state = get_peft_model_state_dict(model) if adapted else model.state_dict()
    state = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    folder = checkpoint / "pytorch_model_fsdp_0"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked for
        dcp.load({"model": state}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    if adapted:
        set_peft_model_state_dict(model, state)
    else:
        model.load_state_dict(state)


def _zero_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    return state
