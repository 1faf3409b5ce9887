"""Frozen weights that wait elsewhere: the numbers stay those of a model that is whole on its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model, token_ids
from peft import LoraConfig, get_peft_model
from torch import nn

from e2llm.hf import enable_activation_checkpointing, install
from e2llm.hf.offload import offload_frozen
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

IDS = token_ids(2, 24)
CPU = torch.device("cpu")
PLACES = ["cpu", "disk"]


def adapted(family: str = "llama", targets: Any = "all-linear") -> Any:
    base = tiny_model(family).train()
    extension = install(base, method="yarn")
    extension.sampler = PositionSampler(
        native_window=extension.native_window,
        training_window=24,
        scales=ScalesConfig(max_scale=8),
        placement=PlacementConfig(kind="jumps"),
    )
    enable_activation_checkpointing(base, early_stop=False)
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")).train()


def trained(model: nn.Module, steps: int = 4) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and adapter weights of a few AdamW steps."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in weights.items()}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_losses_and_adapters_are_the_same_to_the_last_bit(place: Any, family: str, tmp_path: Path) -> None:
    losses, weights = trained(adapted(family))
    model = adapted(family)
    assert offload_frozen(model, place, CPU, tmp_path / "offload") > 0
    found, found_weights = trained(model)
    assert found == losses and losses[-1] < losses[0]
    assert found_weights.keys() == weights.keys()
    assert all(torch.equal(found_weights[name], weights[name]) for name in weights)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_nothing_stays_on_the_device_after_a_step(place: Any, targets: Any, tmp_path: Path) -> None:
    """Also the last matrix of a layer, at which the second computation could stop early."""
    model = adapted(targets=targets)
    size = offload_frozen(model, place, CPU, tmp_path / "offload")
    trained(model, steps=1)
    away = [p for p in model.parameters() if p.device.type == "meta"]
    assert sum(p.numel() * p.element_size() for p in away) == size
    matrices = [p for layer in model.get_base_model().model.layers for p in layer.parameters() if p.dim() > 1]
    assert len(away) == sum(not p.requires_grad for p in matrices) == 14
    assert all(p.device == CPU for p in model.parameters() if p.requires_grad)
    files = list((tmp_path / "offload").glob("*")) if place == "disk" else []
    assert sum(file.stat().st_size for file in files) == (size if place == "disk" else 0)


def test_bfloat16_comes_back_from_the_disk_as_it_was(tmp_path: Path) -> None:
    model = adapted().to(torch.bfloat16)
    before = model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.detach().clone()
    told: list[tuple[int, int]] = []
    offload_frozen(model, "disk", CPU, tmp_path, lambda done, layers: told.append((done, layers)))
    layer = model.get_base_model().model.layers[1].mlp.up_proj.base_layer
    assert layer.weight.is_meta
    assert torch.equal(layer._hf_hook.weights_map["weight"], before)
    assert told == [(1, 2), (2, 2)]


def test_a_model_that_trains_all_of_it_has_nothing_to_offload(tmp_path: Path) -> None:
    model = tiny_model("llama").train()
    install(model)
    with pytest.raises(ValueError, match=r"model\.offload: no matrix of the decoder layers is frozen"):
        offload_frozen(model, "disk", CPU, tmp_path / "offload")
    assert not (tmp_path / "offload").exists()
