"""Projections of one input as one product: the same function and gradients, in every family, and where it pays."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import tiny_model, token_ids
from torch import fx, nn

from e2llm.hf import joined
from e2llm.hf.compiled import compile_layers

FAMILIES = {"llama": 3, "qwen2": 3, "qwen3": 3, "gemma3_text": 3, "phi": 3, "gpt_neox": 0}
"""Products gone of a layer: two of q, k, v and one of gate and up. Phi's MLP reads the attention's input and joins it;
GPT-NeoX has nothing left to join."""


def traced(module: nn.Module, *inputs: torch.Tensor) -> list[fx.GraphModule]:
    """The graphs that Dynamo makes of `module`, joined, each run as it stands."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, examples: Any) -> Any:
        joined.join_projections(graph)
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(module, backend=keep)(*inputs)
    torch._dynamo.reset()
    return graphs


def products(graph: fx.GraphModule) -> int:
    return sum(node.target in joined._LINEAR for node in graph.graph.nodes)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own tracing
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[int] = []
    own = joined.join_projections
    monkeypatch.setattr(joined, "ROWS", 0)
    monkeypatch.setattr(joined, "join_projections", lambda graph: gone.append(own(graph)))
    torch._dynamo.reset()
    plain = tiny_model(family).train()
    fast = copy.deepcopy(plain)
    compile_layers(fast, joined=True)
    ids = token_ids(2, 32)
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for model in (plain, fast)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for mine, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    assert set(gone) == {FAMILIES[family]}
    torch._dynamo.reset()


class Pair(nn.Module):
    """Two projections of one input, and one of something else."""

    def __init__(self, *, bias: bool = False, frozen: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4, bias=True), nn.Linear(8, 12, bias=bias, dtype=dtype)
        self.c = nn.Linear(8, 4)
        self.b.requires_grad_(not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = x if self.b.weight.dtype == x.dtype else x.to(self.b.weight.dtype)
        return torch.cat((self.a(x), self.b(own).float(), self.c(x * 2)), dim=-1)


def test_what_is_not_alike_stays_apart() -> None:
    x = torch.randn(2, 100, 8)
    assert [products(g) for g in traced(Pair(bias=True), x)] == [2], "a and b joined; c reads another tensor"
    assert [products(g) for g in traced(Pair(bias=False), x)] == [3], "one has a bias"
    assert [products(g) for g in traced(Pair(bias=True, frozen=True), x)] == [3], "one is frozen"
    assert [products(g) for g in traced(Pair(bias=True, dtype=torch.bfloat16), x)] == [3], "another type, another input"


@pytest.mark.parametrize(("rows", "left"), [(127, 3), (128, 2)])
def test_few_rows_are_left_alone(rows: int, left: int) -> None:
    assert [products(g) for g in traced(Pair(bias=True), torch.randn(rows, 8))] == [left], "16 output features"


def test_a_computed_weight_is_left_alone() -> None:
    weights = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]

    class Computed(nn.Module):
        def forward(self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return F.linear(x, first) + F.linear(x, second * 2)

    assert [products(g) for g in traced(Computed(), torch.randn(100, 8), *weights)] == [2]


@pytest.mark.gpu
def test_cuda_layers_joined_in_bfloat16() -> None:
    torch._dynamo.reset()
    plain = tiny_model("llama").to("cuda", torch.bfloat16).train()
    fast = copy.deepcopy(plain)
    compile_layers(fast, joined=True)
    ids = token_ids(8, 512).cuda()
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for model in (plain, fast)]
    torch.testing.assert_close(losses[1], losses[0], atol=5e-3, rtol=5e-3)
    for loss in losses:
        loss.backward()
    for mine, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        assert F.cosine_similarity(mine.grad.float().flatten(), theirs.grad.float().flatten(), dim=0) > 0.99
    torch._dynamo.reset()
