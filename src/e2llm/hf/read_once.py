"""Weights read by one process of a group: the others get the same model without weights, to be sharded from the first.

Flows in: how the first process reads a model, how any builds an empty one. Flows out: that model in the first process;
in the others one whose parameters have a shape and one number of memory, and whose buffers (frequencies of rotary
modules among them, which no state dict holds) are the first one's. Knows not who sends the weights on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def read_once(read: Callable[[], Any], build: Callable[[], Any]) -> Any:
    """`read()` in the first process, an empty `build()` in the others; a meeting of all.

    `build` is called under the meta device. A model with buffers in its state dict is read by every process: those are
    not sharded, and Accelerate sends sharded tensors only. Raises ValueError in every process where the first one could
    not read.
    """
    if dist.get_rank() == 0:
        try:
            model = read()
        except ValueError as error:
            _tell({"error": str(error)})
            raise
        _tell({"whole": has_saved_buffers(model)} if has_saved_buffers(model) else _described(model))
        return model
    told = _tell(None)
    if "error" in told:
        raise ValueError(told["error"])
    if told.get("whole"):
        return read()
    with torch.device("meta"):
        model = build()
    _fill(model, told)
    return model


def has_saved_buffers(model: nn.Module) -> bool:
    """Whether the state dict holds more than parameters."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return any(name not in names for name in model.state_dict())


def _tell(what: dict[str, Any] | None) -> dict[str, Any]:
    box = [what]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    assert box[0] is not None
    return box[0]


def _described(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()},
        "buffers": {name: buffer.detach().cpu() for name, buffer in model.named_buffers()},
    }


def _fill(model: nn.Module, told: dict[str, Any]) -> None:
    """The first process's types and buffers. What is built from a config must be what was read."""
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found == {name: shape for name, (shape, _) in told["parameters"].items()}, "the config builds another model"
    for name, parameter in model.named_parameters():
        # One number each, not the meta device: Accelerate tells an optimizer's weights apart by their address.
        placeholder = torch.empty(1, dtype=told["parameters"][name][1]).expand(parameter.shape)
        torch.utils.swap_tensors(parameter, nn.Parameter(placeholder, requires_grad=parameter.requires_grad))
    assert {name for name, _ in model.named_buffers()} == told["buffers"].keys(), "the config builds other buffers"
    for name, buffer in told["buffers"].items():
        owner, _, own_name = name.rpartition(".")
        model.get_submodule(owner)._buffers[own_name] = buffer


def is_placeholder(parameter: torch.Tensor) -> bool:
    """Whether `parameter` stands for weights that the first process holds."""
    return parameter.numel() > 1 and parameter.untyped_storage().nbytes() == parameter.element_size()
