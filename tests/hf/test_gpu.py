"""What only a CUDA device can show: `pytest -m gpu tests/hf/test_gpu.py`."""

from __future__ import annotations

import pytest
import torch
from architectures import WINDOW, tiny_model, token_ids

from e2llm.hf import install
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS = 48


def sampler() -> PositionSampler:
    return PositionSampler(
        native_window=WINDOW,
        training_window=TOKENS,
        scales=ScalesConfig(max_scale=8),
        placement=PlacementConfig(kind="jumps"),
        seed=3,
    )


def loss_and_gradients(attention: str, device: str) -> tuple[float, dict[str, torch.Tensor]]:
    """One training step of a tiny Llama, rows placed by the sampler, in float32."""
    model = tiny_model("llama", attn_implementation=attention).to(device).train()
    extension = install(model, method="yarn")
    extension.sampler = sampler()
    ids = token_ids(3, TOKENS).to(device)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_forward_and_backward_equal_the_cpus(attention: str) -> None:
    """Flex attention's backward exists on a GPU only; each backend must see the same rotations."""
    reference, gradients = loss_and_gradients("eager", "cpu")
    loss, found = loss_and_gradients(attention, "cuda")
    assert loss == pytest.approx(reference, rel=2e-3)
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 2e-2, f"{name}: {error}"


def test_compiled_layers_give_the_same_loss() -> None:
    """By region, as `train.compile = "layers"` does it."""
    torch.manual_seed(0)
    model = tiny_model("llama").to("cuda").train()
    extension = install(model, method="yarn")
    extension.sampler = sampler()
    ids = token_ids(3, TOKENS).to("cuda")
    losses = []
    for compiled in (False, True):
        if compiled:
            for layer in model.model.layers:
                layer.compile()
        extension.expect([5, 6, 7])
        with torch.autocast("cuda", torch.bfloat16):
            losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_tables_follow_the_model_to_the_device() -> None:
    """Installed on the CPU, moved afterwards; the angles stay float32 under autocast."""
    model = tiny_model("llama")
    extension = install(model, method="linear")
    extension.set_scale(3.0)
    ids = token_ids(2, TOKENS)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = model.to("cuda")(input_ids=ids.to("cuda")).logits.cpu()
    assert torch.allclose(found, expected, atol=2e-3)
