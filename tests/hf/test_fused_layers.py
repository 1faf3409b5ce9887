"""Layers as `train.compile = "layers"` fuses them (norms, the MLP's activation, rotations by each row's tables) against
the same layers as they are written, forward and backward, in each type: on a GPU where there is one, else by the
compiler's C++."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from architectures import tiny_model, token_ids
from drawn_rows import ROWS, TOKENS
from torch import nn
from torch._inductor import metrics

from e2llm.hf import get_extension, install
from e2llm.hf.compiled import compile_layers
from e2llm.positions.placement import Placement

pytestmark = [
    pytest.mark.skipif(not (torch.cuda.is_available() or shutil.which("g++")), reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # dynamo's own
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.008}
"""Of a gradient's or of the hidden states' norm: fused code rounds to 16 bits less often than plain code does."""
IDS = token_ids(len(ROWS), TOKENS)
# Twenty seconds of C++ each on a CPU: one of them in every run of the tests, all on a GPU.
FAST = ("llama", torch.bfloat16)
SLOW = () if DEVICE == "cuda" else pytest.mark.slow
CASES = [
    pytest.param(family, dtype, id=f"{family}-{dtype}", marks=() if (family, dtype) == FAST else SLOW)
    for family in ("llama", "glm4")
    for dtype in ALLOWED
]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def hidden_and_gradients(model: nn.Module, rows: list[Placement]) -> dict[str, torch.Tensor]:
    """Hidden states (B, T, D), and the gradient of every weight, as float32. The loss is multiplied so that float16
    holds small gradients too."""
    model.zero_grad()
    get_extension(model).place(rows)
    ids = IDS.to(DEVICE)
    given = model(input_ids=ids, labels=ids, use_cache=False, output_hidden_states=True)
    given.loss.mul(256).backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"hidden states": given.hidden_states[-1].detach().float()}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_fused_layers_turn_each_row_as_plain_ones_do(family: str, dtype: torch.dtype) -> None:
    """Channels of glm4 are neighbours, and a part of them is turned."""
    plain, fused = (tiny_model(family).train() for _ in range(2))
    for model in (plain, fused):
        install(model, method="yarn")
        model.to(DEVICE, dtype)
    compile_layers(fused)
    metrics.reset()
    found = hidden_and_gradients(fused, ROWS)
    assert metrics.generated_kernel_count > 0, "nothing was compiled"
    expected, swapped = (hidden_and_gradients(plain, rows) for rows in (ROWS, ROWS[1:] + ROWS[:1]))
    assert found.keys() == expected.keys()
    seen = 0.0
    for name, value in expected.items():
        error, of_swapped = ((other[name] - value).norm() / value.norm() for other in (found, swapped))
        assert error < ALLOWED[dtype], (name, error)
        seen = max(seen, of_swapped.item())
    assert seen > 0.5, "rows that change places would be seen"
