"""Weights read by one process of a group: the others get the same model without weights, to be sharded from the first.

Flows in: how the first process reads a model, how any builds an empty one. Flows out: that model in the first process;
in the others one whose parameters have a shape and one number of memory, and whose buffers (frequencies of rotary
modules, biases of routers) are the first one's; and buffers kept as they are while parameters are sent. Knows not who
sends them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def read_once(read: Callable[[], Any], build: Callable[[], Any]) -> Any:
    """`read()` in the first process, an empty `build()` in the others; a meeting of all.

    `build` is called under the meta device, in every process. Raises ValueError in every process where the first one
    could not read, or where what it read is not what was built.
    """
    if dist.get_rank() == 0:
        try:
            model = read()
            _check_same(model, _empty(build))
        except ValueError as error:
            _tell({"error": str(error)})
            raise
        _tell(_described(model))
        return model
    told = _tell(None)
    if "error" in told:
        raise ValueError(told["error"])
    model = _empty(build)
    _fill(model, told)
    return model


def as_first(do: Callable[[], Any], say: Callable[[Any], Any]) -> tuple[Any, Any]:
    """`do()` in every process, and what the first one says of what it got: a meeting of all. Raises ValueError in every
    process where the first one's `do` did."""
    try:
        found = do()
    except ValueError as error:
        _tell({"error": str(error)})
        raise
    told = _tell({"said": say(found)})
    if "error" in told:
        raise ValueError(told["error"])
    return found, told["said"]


def _empty(build: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return build()


def _tell(what: dict[str, Any] | None) -> dict[str, Any]:
    """What the first process says, in every process. Goes by the host, not the GPU."""
    box = [what]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    assert box[0] is not None
    return box[0]


def _check_same(model: nn.Module, empty: nn.Module) -> None:
    """Raise ValueError where `empty` has other parameters or buffers than `model`, such as another output layer."""
    ours, theirs = _shapes(model), _shapes(empty)
    other = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if other:
        raise ValueError(
            f"model = {type(model).__name__}: {len(other)} weights, such as {other[0]!r}, are read in another shape "
            f"({ours.get(other[0])}) than its config builds ({theirs.get(other[0])}), so that processes cannot share "
            "them out; save what was read as a folder of its own (e2llm.hf.save_model), or use distributed.strategy = "
            "ddp"
        )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    found = (*model.named_parameters(), *_buffers(model).items())
    return {name: tuple(tensor.shape) for name, tensor in found}


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """All of them: a buffer that several modules share is each one's."""
    return dict(model.named_buffers(remove_duplicate=False))


def _described(model: nn.Module) -> dict[str, Any]:
    return {
        "types": {name: p.dtype for name, p in model.named_parameters()},
        "buffers": {name: buffer.detach().cpu() for name, buffer in _buffers(model).items()},
    }


def _fill(model: nn.Module, told: dict[str, Any]) -> None:
    """The first process's buffers, and a placeholder of its type for each of its parameters."""
    for name, parameter in model.named_parameters():
        # One number each, not the meta device: Accelerate tells an optimizer's weights apart by their address.
        placeholder = torch.zeros(1, dtype=told["types"][name]).expand(parameter.shape)
        torch.utils.swap_tensors(parameter, nn.Parameter(placeholder, requires_grad=parameter.requires_grad))
    for name, buffer in told["buffers"].items():
        owner, _, own_name = name.rpartition(".")
        model.get_submodule(owner)._buffers[own_name] = buffer


def is_placeholder(parameter: torch.Tensor) -> bool:
    """Whether `parameter` stands for weights that the first process holds."""
    return parameter.numel() > 1 and parameter.untyped_storage().nbytes() == parameter.element_size()


@contextmanager
def buffers_apart(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the state dict of `model` holds parameters alone; after it, its buffers are on `device`.

    Accelerate sends what the state dict holds as shards, which buffers are not, and moves the model to the meta device
    for that, where of a buffer shared by several modules all but one stay.
    """
    owners = [(module, name) for module in model.modules() for name in module._buffers]
    kept = {owner: owner[0]._buffers[owner[1]] for owner in owners}
    saved = [(module, name) for module, name in owners if name not in module._non_persistent_buffers_set]
    for module, name in saved:
        module._non_persistent_buffers_set.add(name)
    try:
        yield
    finally:
        for module, name in saved:
            module._non_persistent_buffers_set.discard(name)
    moved = {id(buffer): buffer.to(device) for buffer in kept.values() if buffer is not None}
    for (module, name), buffer in kept.items():
        if buffer is not None:
            module._buffers[name] = moved[id(buffer)]
