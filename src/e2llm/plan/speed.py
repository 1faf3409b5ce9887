"""Tokens a second in training, from floating point operations and bytes moved.

Flows in: a `Shape`, a recipe, a GPU's data sheet. Flows out: tokens a second for one GPU. A token takes the time of its
matrix products and of attention, each at a share of the peak, and of moving what its layers keep a number of times.
The constants come from measured runs at 4096 tokens; windows of 8k to 32k, which they were not fitted to, come out
within an eighth. Not modelled: communication, and models so small that the host cannot keep a GPU busy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from e2llm.config import Recipe
from e2llm.plan.memory import layer_bytes, trained_parameters, wider_attention
from e2llm.plan.shape import Shape


@dataclass(frozen=True)
class Gpu:
    """What its data sheet says."""

    name: str
    bfloat16_flops: float
    """Dense, operations a second."""
    bytes_per_second: float
    memory_bytes: float


GPUS = {
    "h100": Gpu("NVIDIA H100 SXM", 989e12, 3.35e12, 80e9),
    "h200": Gpu("NVIDIA H200 SXM", 989e12, 4.8e12, 141e9),
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 312e12, 2.04e12, 80e9),
    "l40s": Gpu("NVIDIA L40S", 362e12, 0.864e12, 48e9),
    "rtx4090": Gpu("NVIDIA RTX 4090", 165e12, 1.008e12, 24e9),
}
ATTENTION = 0.35
"""Share of the peak that attention reaches, forward and backward, its half of the square counted: 0.31 at 64 and 0.38
at 128 channels a head in the profiles of the 135M and 7B shapes on one H100."""
# Least squares over the 135M, 1B and 7B-LoRA shapes at 4096 tokens with that, layers compiled, one H100.
PRODUCTS = 0.676
"""Share of the peak that matrix products reach."""
MOVES = 9.55
"""Times that the bytes a layer keeps go through memory in a step; not compiled (one run of the 135M shape): `PLAIN`."""
PLAIN = 39.0
RECOMPUTED = 4 / 3
"""Work of a step with gradient checkpointing, relative to one without; attention's: `RECOMPUTED_ATTENTION`, because its
backward pass is two and a half times its forward pass."""
RECOMPUTED_ATTENTION = 1 + 1 / 3.5


def flops_per_token(shape: Shape, recipe: Recipe) -> float:
    """6 for each trained weight, 4 for each frozen one, 6 x layers x width x window for attention; recomputation is
    left out."""
    trained = trained_parameters(shape, recipe)
    frozen = shape.num_parameters - trained if recipe.lora.rank else 0
    return 6.0 * trained + 4.0 * frozen + attention_flops_per_token(shape, recipe)


def attention_flops_per_token(shape: Shape, recipe: Recipe) -> float:
    """6 x layers x width x window: scores and their use, forward and backward, over half of the square."""
    return 6.0 * shape.num_layers * shape.num_query_channels * recipe.data.window


def tokens_per_second(shape: Shape, recipe: Recipe, gpu: Gpu) -> float | None:
    """On one GPU; None for what the constants do not cover: float32 arithmetic, mixtures of experts, 4-bit or offloaded
    bases and a teacher."""
    train, model = recipe.train, recipe.model
    base = model.quantization != "none" or model.offload != "none"
    if train.precision != "bfloat16" or shape.num_experts or base or train.distill:
        return None
    compiled = replace(recipe, train=replace(train, compile="layers"))
    attention = attention_flops_per_token(shape, recipe)
    products = flops_per_token(shape, recipe) - attention
    moved = shape.num_layers * layer_bytes(shape, compiled) * (MOVES if train.compile == "layers" else PLAIN)
    again, attention_again = (RECOMPUTED, RECOMPUTED_ATTENTION) if train.gradient_checkpointing else (1.0, 1.0)
    attention *= wider_attention(shape, recipe)
    seconds = again * (products / (gpu.bfloat16_flops * PRODUCTS) + moved / gpu.bytes_per_second)
    return 1 / (seconds + attention_again * attention / (gpu.bfloat16_flops * ATTENTION))
