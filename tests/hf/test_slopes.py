"""The attention scale: one slope while training, another when serving, each as transformers would compute it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from architectures import WINDOW, statically_scaled, tiny_model, token_ids
from torch import nn

from e2llm.hf import get_extension, install
from e2llm.positions.attention import AttentionConfig
from e2llm.positions.placement import Placement

IDS = token_ids(2, 12)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


@pytest.fixture
def model() -> nn.Module:
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("method", "rope"),
    [
        ("yarn", {"rope_type": "yarn", "original_max_position_embeddings": WINDOW}),
        ("linear", {"rope_type": "linear"}),
    ],
)
def test_slopes_are_apart_for_training_and_serving(model: nn.Module, method: str, rope: dict) -> None:
    """Served rows equal transformers' static scaling with that attention factor, placed rows another one."""
    extension = install(model, method=method, attention=AttentionConfig(training_slope=0.0, slope=0.04))
    extension.set_scale(4.0)
    served = logits(model)
    placement = Placement(4.0, np.arange(IDS.shape[1]))
    extension.place([placement, placement])
    placed = logits(model)
    assert not torch.allclose(served, placed)
    extension.remove()
    if method == "yarn":
        for found, slope in ((served, 0.04), (placed, 0.0)):
            static = statically_scaled(model, factor=4.0, attention_factor=slope * math.log(4.0) + 1.0, **rope)
            torch.testing.assert_close(found, logits(static), rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(placed, logits(statically_scaled(model, factor=4.0, **rope)), rtol=0, atol=1e-5)


def test_slopes_left_out_are_the_methods_own(model: nn.Module) -> None:
    assert AttentionConfig().serving() is None and AttentionConfig(training_slope=0.2).serving() == 0.2
    extension = install(model, method="yarn")
    extension.set_scale(8.0)
    assert float(extension._wrapper.rows.attention_scale[None]) == pytest.approx(1 + 0.1 * math.log(8))
    extension.remove()
    extension = install(model, method="yarn", attention=AttentionConfig(slope=0.3))
    extension.set_scale(1.0)
    assert extension._wrapper.rows is None, "scale 1 stays the model as it was"
    extension.place([Placement(8.0, np.arange(12))])
    assert float(extension._wrapper.rows.attention_scale[None]) == pytest.approx(1 + 0.1 * math.log(8))


def test_slopes_that_cannot_be(model: nn.Module) -> None:
    for value in (-0.1, 1.5, "steep", float("nan")):
        with pytest.raises(ValueError, match=r"attention\.slope = .*between 0 and 1"):
            AttentionConfig(slope=value)
    with pytest.raises(ValueError, match=r"attention\.slope = 0\.04: method none"):
        install(model, method="none", attention=AttentionConfig(slope=0.04))
    assert get_extension(model) is None
    install(model, method="none", attention=AttentionConfig(training_slope=0.0))
