"""Frozen weights of decoder layers that wait in host memory or on a disk until a layer is computed.

Flows in: a model in host memory, its adapters added. Flows out: the same model, trained weights and small ones on the
device, the frozen matrices of its decoder layers brought there by Accelerate's hooks for one call at a time. Knows no
recipe. The backward pass needs a layer's weights once more: checkpointed layers, computed again there, fetch them
again; without checkpointing autograd would hold every weight on the device from the forward pass on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from e2llm.hf.rotary import find_rotary_owner

Place = Literal["cpu", "disk"]


def offload_frozen(
    model: nn.Module,
    place: Place,
    device: torch.device,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, layers: None,
) -> int:
    """Offload the frozen matrices of `model`'s decoder layers and bring all else to `device`. Returns their bytes.

    cpu: host memory, pinned where the device is a GPU. disk: a file a matrix in `folder`, which must be empty or absent
    and is the caller's to remove once the model is no longer used. `progress(done, layers)` is told of every layer.
    Raises ValueError for a model of which nothing is frozen.
    """
    layers = list(find_rotary_owner(model).layers)  # type: ignore[union-attr,arg-type]
    chosen = [_offloadable(layer) for layer in layers]
    if not any(chosen):
        raise ValueError("model.offload: no matrix of the decoder layers is frozen, so none can be offloaded")
    _bring(model, device, {id(module) for modules in chosen for _, module in modules})
    size = 0
    if place == "disk":
        folder.mkdir(parents=True, exist_ok=True)
    for number, modules in enumerate(chosen):
        for name, module in modules:
            size += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
            label = f"{number}.{name}"
            _hook(module, device, _on_disk(module, folder, label) if place == "disk" else _in_memory(module, device))
        progress(number + 1, len(layers))
    # The Trainer and Accelerate move a model to the device, unless this map names several places. No strings: at "cpu"
    # or "disk" PEFT would place the model anew when it loads an adapter.
    model.hf_device_map = {"": device, "decoder layers": torch.device("meta")}  # type: ignore[assignment]
    return size


def _offloadable(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of a layer's modules that own frozen matrices and nothing trained."""
    found = []
    for name, module in layer.named_modules():
        own = list(module.parameters(recurse=False))
        if any(p.dim() > 1 for p in own) and not any(p.requires_grad for p in own):
            found.append((name, module))
    return found


def _bring(model: nn.Module, device: torch.device, without: set[int]) -> None:
    for module in model.modules():
        if id(module) in without:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device)  # in place: the optimizer and tied layers share the object
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _hook(module: nn.Module, device: torch.device, weights: Mapping[str, torch.Tensor]) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(module, AlignDevicesHook(execution_device=device, offload=True, weights_map=weights))


def _in_memory(module: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    named = ((name, parameter.detach().cpu()) for name, parameter in module.named_parameters(recurse=False))
    return {name: tensor.pin_memory() if device.type == "cuda" else tensor for name, tensor in named}


def _on_disk(module: nn.Module, folder: Path, label: str) -> Mapping[str, torch.Tensor]:
    from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, offload_weight

    index: dict[str, Any] = {}
    for name, parameter in module.named_parameters(recurse=False):
        offload_weight(parameter.detach(), f"{label}.{name}", str(folder), index)
    loader = OffloadedWeightsLoader(save_folder=str(folder), index=index)
    found: Mapping[str, torch.Tensor] = PrefixedDataset(loader, f"{label}.")
    return found
