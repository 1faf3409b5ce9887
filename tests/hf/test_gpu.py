"""What only a CUDA device can show: `pytest -m gpu tests/hf/test_gpu.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import WINDOW, tiny_model, token_ids
from far_masks import written_out
from torch.nn.attention import SDPBackend, sdpa_kernel

from e2llm.hf import attend_far, install
from e2llm.positions.placement import Placement, PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Third parties' own, out of our reach.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
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


def test_a_flash_kernel_weighs_far_keys_as_the_mask_written_out_does() -> None:
    """In bfloat16, where PyTorch may take no kernel but flash attention or cuDNN's."""
    far = replace(sampler(), training_window=256, placement=PlacementConfig(kind="jumps", max_jumps=31, far_weight=1.0))
    drawn = [far.draw(index, 256) for index in range(2)]
    ids = token_ids(2, 256)
    found = {}
    for kind in ("mask", "kernel"):
        model = tiny_model("llama", head_dim=64).to("cuda" if kind == "kernel" else "cpu").train()
        extension = install(model)
        if kind == "kernel":
            attend_far(model)
            model.to(torch.bfloat16)
            extension.place(drawn)
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
                logits = model(ids.to("cuda"), use_cache=False).logits
                logits.float().square().mean().backward()
        else:
            extension.place([Placement(p.scale, p.positions) for p in drawn])
            mask = torch.stack([written_out(p, 4) for p in drawn])[:, None]
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            logits.square().mean().backward()
        gradient = torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])
        found[kind] = logits.detach().float().cpu(), gradient
    for wanted, got in zip(found["mask"], found["kernel"], strict=True):
        assert (got - wanted).norm() / wanted.norm() < 0.05


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
