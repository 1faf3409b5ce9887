"""Weights between the base's and the trained ones.

Training for long windows takes from short ones; part of the way back to the base gives most of that back and costs the
long windows little (WiSE-FT: Wortsman et al. 2022, arXiv 2109.01903, Sect. 3). Flows in: a trained model, its base.
Flows out: the same model with other weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def interpolate(model: nn.Module, base: nn.Module, share: float) -> None:
    """Every parameter of `model` becomes base + share · (trained − base), computed in float32 and rounded once.

    `base` may lie on another device, in another dtype. Raises ValueError where it is not the same architecture.
    """
    start = dict(base.named_parameters())
    for name, trained in model.named_parameters():
        if name not in start or start[name].shape != trained.shape:
            raise ValueError(f"base = {type(base).__name__}: has no parameter {name} of the trained one's size")
        _between(trained, start[name], share)


@torch.no_grad()
def interpolate_adapters(model: nn.Module, share: float) -> None:
    """The same for a PEFT model: its low-rank updates become that share of themselves, modules trained whole
    (embeddings, norms) go that far from what they were."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    done: set[int] = set()  # tied embeddings stand there twice
    for module in model.modules():
        if isinstance(module, LoraLayer):
            updates: list[Any] = [layer.weight for layer in module.lora_B.values()]
            for update in [*updates, *module.lora_embedding_B.values()]:
                update.mul_(share)
        elif isinstance(module, ModulesToSaveWrapper):
            own = dict(module.original_module.named_parameters())
            for copy in module.modules_to_save.values():
                for name, trained in copy.named_parameters():
                    if id(trained) not in done:
                        done.add(id(trained))
                        _between(trained, own[name], share)


def _between(trained: torch.Tensor, start: torch.Tensor, share: float) -> None:
    trained.copy_(torch.lerp(start.to(trained.device).float(), trained.float(), share))
