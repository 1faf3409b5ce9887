"""AdamW over bfloat16 weights with exact float32 masters, against torch's own AdamW on float32 weights."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from interpreted import INTERPRETED, needs_interpreter, run_interpreted, starts_interpreter

from e2llm.train import split_adamw
from e2llm.train.split_adamw import SplitAdamW, join, split

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 12


def parameters(device: str = "cpu", seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(37, 64), (5000,), (1,), (3, 7, 11), (4096,), (33, 160)]
    made = [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]
    return [torch.nn.Parameter(value.to(device)) for value in made]


def gradients(step: int, like: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [
        (torch.randn(p.shape, generator=generator) * 10.0 ** ((i + step) % 4 - 3)).to(torch.bfloat16).to(p.device)
        for i, p in enumerate(like)
    ]


def take(optimizer: torch.optim.Optimizer, weights: list[Any], step: int, max_norm: float = 0.0) -> None:
    for weight, gradient in zip(weights, gradients(step, weights), strict=True):
        weight.grad = gradient.to(weight.dtype)
    if isinstance(optimizer, SplitAdamW):
        optimizer.clip(max_norm)
    elif max_norm:
        torch.nn.utils.clip_grad_norm_(weights, max_norm)
    optimizer.step()


def masters(optimizer: SplitAdamW, weights: list[Any]) -> list[torch.Tensor]:
    return [join(w.detach(), optimizer.state[w]["low"]) for w in weights]


def trained(steps: int, max_norm: float = 0.0, device: str = "cpu") -> tuple[SplitAdamW, list[torch.nn.Parameter]]:
    weights = parameters(device)
    optimizer = SplitAdamW(weights, **SETTINGS)
    for step in range(steps):
        take(optimizer, weights, step, max_norm)
    return optimizer, weights


def test_the_two_halves_are_the_float32_number() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    exact = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, 3.3e38])
    # halves between two neighbouring bfloat16 numbers, of either sign and after an even and an odd one
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x40008000], dtype=torch.int32).view(torch.float32)
    values = torch.cat([bits.view(torch.float32), exact, ties, -ties])
    values = values[values.isfinite() & (values.abs() < 3.38e38)]
    high, low = split(values)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(join(high, low).view(torch.int32), values.view(torch.int32))
    nearest = values.to(torch.bfloat16)
    assert torch.equal((high.float() - values).abs(), (nearest.float() - values).abs())


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_masters_and_moments_are_those_of_float32_training(max_norm: float) -> None:
    optimizer, weights = trained(STEPS, max_norm)
    reference = [torch.nn.Parameter(p.detach().float()) for p in parameters()]
    theirs = torch.optim.AdamW(reference, **SETTINGS, foreach=False)
    for step in range(STEPS):
        take(theirs, reference, step, max_norm)
    for mine, expected, weight in zip(masters(optimizer, weights), reference, weights, strict=True):
        if max_norm:
            torch.testing.assert_close(mine, expected.detach(), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(mine, expected.detach()), "bit for bit"
            assert torch.equal(optimizer.state[weight]["exp_avg_sq"], theirs.state[expected]["exp_avg_sq"])
        assert torch.equal(weight.detach(), split(mine)[0])


def test_updates_below_a_weights_last_place_add_up() -> None:
    """What bfloat16 weights alone lose (pitfall: bf16 weights with a small learning rate)."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = SplitAdamW([weight], lr=1e-5)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.testing.assert_close(masters(optimizer, [weight])[0], torch.full((8,), 0.99), rtol=1e-4, atol=0)
    assert (weight < 1).all()


def test_the_norm_is_float32_and_clips_one_step_only() -> None:
    weights = parameters()
    optimizer = SplitAdamW(weights, **SETTINGS)
    for weight, gradient in zip(weights, gradients(0, weights), strict=True):
        weight.grad = gradient
    before = [w.grad.clone() for w in weights if w.grad is not None]
    norm = optimizer.clip(0.5)
    expected = torch.cat([g.double().flatten() for g in before]).norm()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    assert all(torch.equal(w.grad, b) for w, b in zip(weights, before, strict=True) if w.grad is not None)
    optimizer.step()
    clipped = optimizer.state[weights[0]]["exp_avg"].clone()
    torch.testing.assert_close(clipped, 0.1 * before[0].float() * (0.5 / norm), rtol=1e-5, atol=1e-9)
    optimizer.step()  # no clip before: the gradient counts as it is
    expected_next = clipped.lerp(before[0].float(), 0.1)
    torch.testing.assert_close(optimizer.state[weights[0]]["exp_avg"], expected_next, rtol=1e-5, atol=1e-9)


def test_saved_state_goes_on_bit_for_bit() -> None:
    straight, expected = trained(STEPS)
    optimizer, weights = trained(5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    resumed = SplitAdamW(again, **SETTINGS)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(5, STEPS):
        take(resumed, again, step)
    for mine, theirs in zip(masters(resumed, again), masters(straight, expected), strict=True):
        assert torch.equal(mine, theirs)
    for weight in again:
        assert resumed.state[weight]["exp_avg"].dtype == torch.float32
        assert resumed.state[weight]["low"].dtype == torch.int16


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.float32 and shape \(3,\).*model.dtype = bfloat16"):
        SplitAdamW([torch.nn.Parameter(torch.zeros(3))])
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="closure"):
        SplitAdamW([weight]).step(lambda: 0.0)


def check_kernel(device: str) -> None:
    """The kernel's masters and moments, against the plain path's."""
    optimizer, weights = trained(STEPS, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_adamw, "_has_kernel", lambda parameter: True)
        kernel, found = trained(STEPS, 0.5, device)
    for mine, theirs, weight, other in zip(
        masters(kernel, found), masters(optimizer, weights), found, weights, strict=True
    ):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2e-5, atol=2e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            moment = kernel.state[weight][name].cpu()
            torch.testing.assert_close(moment, optimizer.state[other][name], rtol=2e-5, atol=1e-9)
        assert torch.equal(weight.detach().cpu(), split(mine.cpu())[0])


@needs_interpreter
def test_the_kernel_is_the_plain_update() -> None:
    check_kernel("cpu")


@starts_interpreter
def test_the_kernel_interpreted() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_the_kernel_compiles_for_a_hopper_gpu() -> None:
    pytest.importorskip("triton")
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from e2llm.train.split_adamw_kernel import BLOCK, split_adamw

    types = dict.fromkeys(("addresses", "gradients", "sizes"), "*i64") | {"blocks": "*i32", "coefficient": "*fp32"}
    signature = {name: types.get(name, "fp32") for name in split_adamw.arg_names}
    signature |= {"BLOCK": "constexpr", "EVEN": "constexpr"}
    place = split_adamw.arg_names.index
    values = {(place("BLOCK"),): BLOCK, (place("EVEN"),): True}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name].startswith("*")}
    source = ASTSource(split_adamw, signature, values, aligned)
    code = triton_compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True}).asm["ptx"]
    assert "ld.global.v4" in code or "ld.global.v2" in code, "loads are wide"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_on_a_gpu() -> None:
    check_kernel("cuda")
