"""Shapes of models whose speed is measured, with random weights: speed does not depend on what the weights are.

Flows in: a name. Flows out: sizes, a model made on its device, FLOPs a token. Knows no trainer. Importing it loads no
torch.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

DENSE_BF16_FLOPS = 989e12
"""Dense bfloat16 peak of one H100 SXM, FLOP/s (NVIDIA's data sheet, without sparsity): utilization is a share of it."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama, and how it is trained."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    native_window: int = 8192
    """L in tokens."""
    rope_theta: float = 500_000.0
    lora_rank: int = 0
    """Above 0: adapters of this rank over frozen bfloat16 weights. 0: all weights are trained."""
    quantization: str = "none"
    """The recipe's model.quantization: nf4 makes the frozen weights 4-bit ones."""
    batch_size: int = 1
    """Windows of 4096 tokens in a step, where nothing else is asked for."""

    def config(self, **changes: Any) -> Any:
        """A transformers LlamaConfig of these sizes."""
        from transformers import LlamaConfig

        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        sizes = {name: getattr(self, name) for name in (*names, "vocab_size", "tie_word_embeddings")}
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return LlamaConfig(
            **{**sizes, "max_position_embeddings": self.native_window, "rope_parameters": rope, **changes}
        )


_LLAMA_2_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
    "native_window": 4096,
    "rope_theta": 10_000.0,
}
_TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "native_window": 128,
    "batch_size": 2,
}
SHAPES = {
    "tiny": Shape(**_TINY),
    "tiny-lora": Shape(**_TINY, lora_rank=4),
    "tiny-qlora": Shape(**_TINY, lora_rank=4, quantization="nf4"),
    "smollm2-135m": Shape(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
        tie_word_embeddings=True,
        rope_theta=100_000.0,
        batch_size=8,
    ),
    "llama-1b": Shape(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=True,
        batch_size=4,
    ),
    "llama-2-7b-lora": Shape(**_LLAMA_2_7B, lora_rank=16),
    "llama-2-7b-qlora": Shape(**_LLAMA_2_7B, lora_rank=16, quantization="nf4"),
    "llama-2-7b": Shape(**_LLAMA_2_7B),
}
"""Name -> sizes: SmolLM2-135M, Llama 3.2 1B (plain frequencies, 8k), Llama 2 7B, and three for a CPU."""


def shape_of(name: str) -> Shape:
    """The shape called `name`. Raises ValueError with a suggestion."""
    if name not in SHAPES:
        close = difflib.get_close_matches(name, SHAPES, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"shape = {name!r}: no such shape; {hint}shapes: {', '.join(SHAPES)}")
    return SHAPES[name]


def random_model(shape: Shape, *, dtype: str, device: str, seed: int = 0) -> Any:
    """A LlamaForCausalLM of this shape with random weights of `dtype`, made on `device` itself."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(shape.config())
    finally:
        torch.set_default_dtype(before)


def quick_model(shape: Shape, *, dtype: str, seed: int = 0) -> Any:
    """`random_model` in host memory, in seconds for billions of weights: matrices repeat one block of 2²⁰ normal draws
    (standard deviation 0.02), norms are one. The same in every process."""
    import torch
    from transformers import LlamaForCausalLM

    config = shape.config()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu")
    model.tie_weights()  # leaving the meta device separates them
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is computed, not learned
    block = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            for piece in parameter.view(-1).split(len(block)):
                piece.copy_(block[: len(piece)])
    return model


def flops_per_token(*, trained: int, frozen: int, layers: int, width: int, window: int) -> float:
    """Training FLOPs a token, forward and backward, recomputation left out.

    A weight costs 2 forward, 2 for the gradient of its input and, where it is trained, 2 for its own: 6 or 4. Causal
    attention over half of the window costs 6 · layers · width · window. `trained` and `frozen` count weights, tied
    embeddings once; `width` is heads × head size; `window` in tokens.
    """
    return 6.0 * trained + 4.0 * frozen + 6.0 * layers * width * window
