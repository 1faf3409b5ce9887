"""Training with draws: checkpointed, compiled, with adapters and under DDP, the loss is the plain forward's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import WINDOW, tiny_model, token_ids
from torch import nn

from e2llm.hf import get_extension, install
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

TOKENS = 32
IDS = token_ids(2, TOKENS)
SAMPLER = PositionSampler(
    native_window=WINDOW,
    training_window=TOKENS,
    scales=ScalesConfig(distribution="log_uniform", max_scale=16),
    placement=PlacementConfig(kind="jumps"),
    seed=9,
)


def extended(name: str = "llama", **overrides: Any) -> nn.Module:
    model = tiny_model(name, **overrides).train()
    install(model, method="yarn").sampler = SAMPLER
    return model


def loss_of(model: nn.Module, indices: tuple[int, ...] = (20, 21)) -> torch.Tensor:
    get_extension(model).expect(indices)
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def plain() -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of samples 20 and 21 by the plain forward."""
    model = extended()
    return loss_of(model).item(), gradients(model)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_other_samples_give_another_loss(plain: tuple[float, dict]) -> None:
    assert abs(loss_of(extended(), (30, 31)).item() - plain[0]) > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(plain: tuple[float, dict], reentrant: bool) -> None:
    model = extended()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert loss_of(model).item() == plain[0]
    found = gradients(model)
    assert found.keys() == plain[1].keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, plain[1][name]), name


def test_gradients_reach_every_weight(plain: tuple[float, dict]) -> None:
    assert len(plain[1]) == len(list(tiny_model("llama").parameters()))
    assert all(bool(g.abs().sum() > 0) for g in plain[1].values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_layers(plain: tuple[float, dict]) -> None:
    model = extended()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    assert loss_of(model).item() == pytest.approx(plain[0], rel=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[1][name.replace("_orig_mod.", "")], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_model_draws_without_compiling_again(plain: tuple[float, dict]) -> None:
    """Scales change every step: one graph must serve them all, in training and for any scale at inference."""
    compilations = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        nonlocal compilations
        compilations += 1
        return graph.forward

    model = extended()
    reference = extended()
    compiled = torch.compile(model, backend=counting)
    assert loss_of(compiled).item() == pytest.approx(plain[0], rel=1e-6)
    first = compilations
    for step in range(12):
        indices = (100 + step, 200 + step)
        assert loss_of(compiled, indices).item() == pytest.approx(loss_of(reference, indices).item(), rel=1e-6)
    assert compilations == first
    model.eval()
    reference.eval()
    with torch.no_grad():
        for scale in (2.0, 3.0, 4.0, 7.5):
            get_extension(model).set_scale(scale)
            get_extension(reference).set_scale(scale)
            torch.testing.assert_close(compiled(IDS).logits, reference(IDS).logits, rtol=0, atol=1e-5)
            first = compilations if scale == 2.0 else first
    assert compilations == first


def test_lora_trains_and_draws(plain: tuple[float, dict]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(extended(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True))
    model.train()
    assert loss_of(model).item() == pytest.approx(plain[0], rel=1e-6), "adapters begin at zero"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model).item() < plain[0] - 1e-3
    extension = get_extension(model)
    merged = model.merge_and_unload()
    assert get_extension(merged) is extension and not any("rotary" in key for key in merged.state_dict())
    extension.remove()
    assert get_extension(merged) is None


def test_installed_after_lora(plain: tuple[float, dict]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"])).train()
    install(model, method="yarn").sampler = SAMPLER
    assert loss_of(model).item() == pytest.approx(plain[0], rel=1e-6)


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp_draws(plain: tuple[float, dict]) -> None:
    model = nn.parallel.DistributedDataParallel(extended())
    assert loss_of(model).item() == plain[0]
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[1][name.removeprefix("module.")], rtol=1e-6, atol=0)
    rows = model.module.model.rotary_emb.rows
    assert rows.positions.tolist() == [SAMPLER.draw(i).positions.tolist() for i in (20, 21)]


def test_copies_of_one_process_are_refused() -> None:
    """A Trainer that is started on several GPUs without torchrun makes them, by DataParallel."""
    model = extended()
    copy = model.model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"DataParallel .* .torchrun .*CUDA_VISIBLE_DEVICES=0"):
        copy(input_ids=IDS, use_cache=False)


def test_ranks_draw_different_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without named indices, rank r of n takes the r-th batch of each step."""
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr("e2llm.hf.extension._rank", lambda rank=rank: (rank, 2))
        model = extended()
        for _ in range(2):
            with torch.no_grad():
                model(IDS, use_cache=False)
            seen.append(model.model.rotary_emb.rows.positions.tolist())
    expected = [[SAMPLER.draw(i).positions.tolist() for i in pair] for pair in ((0, 1), (4, 5), (2, 3), (6, 7))]
    assert seen == expected


@pytest.mark.parametrize("name", ["gemma3_text", "phi3", "qwen3_moe", "gpt_neox", "llama4_text"])
def test_one_step_lowers_the_loss(name: str) -> None:
    model = extended(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1 and all(map(torch.isfinite, map(torch.tensor, losses)))
