"""Seconds that a token takes in training, from floating point operations and bytes moved.

Flows in: a `Shape`, a recipe, a GPU's data sheet. Flows out: `Work` and seconds for one GPU. A token takes the time of
its matrix products and of attention, each at a share of the peak, and of moving what its layers keep a number of times.
What a step takes beside, once for all its tokens, is in `plan.step`. Not modelled: models so small that the host cannot
keep a GPU busy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from e2llm.config import Recipe
from e2llm.plan.masks import masks_of
from e2llm.plan.memory import compiled_layer_bytes, trained_parameters, wider_attention
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


@dataclass(frozen=True)
class Shares:
    """What measured runs say of a GPU; `plan.calibration` finds them."""

    products: float
    """Share of the peak that matrix products reach."""
    attention: float
    """Share of the peak that attention reaches, forward and backward, its half of the square counted."""
    moves: float
    """Times that the bytes a compiled layer keeps go through memory in a step."""


SHARES = Shares(products=0.678, attention=0.431, moves=8.72)
"""Least squares over the Records of one H100 or H200: all shapes and windows, and the kernels of profiled steps."""
PLAIN = 38.5
"""`moves` of layers that are not compiled, in bytes that a compiled one keeps: least squares over one run of the 135M
shape and one of the 1B shape, which alone say 41 and 33."""
RECOMPUTED = 4 / 3
"""Memory traffic of a step with gradient checkpointing, relative to one without: a second forward pass, which is a
third of a step."""
GROUPED = SHARES.attention / 0.211
"""Time of attention in groups (`hf.grouped_training`) relative to a model's own: its kernels reach 0.211 of the peak,
4.44 ms forward and backward for 16 windows of 4096 and nine heads of 64 channels on one H200."""
RECOMPUTED_ATTENTION = 1 + 1 / 3.5
"""Attention's backward pass is two and a half times its forward pass."""


@dataclass(frozen=True)
class Work:
    """Of one token, recomputation included."""

    products: float
    """Floating point operations in matrix products."""
    attention: float
    """In attention, added channels of far keys included."""
    moved: float
    """Bytes that its layers keep when compiled."""

    def seconds(self, gpu: Gpu, shares: Shares) -> float:
        """On one GPU, one after another."""
        products = self.products / (gpu.bfloat16_flops * shares.products)
        attention = self.attention / (gpu.bfloat16_flops * shares.attention)
        return products + attention + shares.moves * self.moved / gpu.bytes_per_second


def flops_per_token(shape: Shape, recipe: Recipe) -> float:
    """6 for each trained weight, 4 for each frozen one, 6 x layers x width x window for attention; recomputation is
    left out."""
    trained = trained_parameters(shape, recipe)
    frozen = shape.num_parameters - trained if recipe.lora.rank else 0
    return 6.0 * trained + 4.0 * frozen + attention_flops_per_token(shape, recipe)


def attention_flops_per_token(shape: Shape, recipe: Recipe) -> float:
    """6 x layers x width x window: scores and their use, forward and backward, over half of the square."""
    return 6.0 * shape.num_layers * shape.num_query_channels * recipe.data.window


def is_known(recipe: Recipe, shape: Shape) -> bool:
    """Whether the constants cover it: not float32 arithmetic, mixtures of experts, bases on a disk, weights in host
    memory while they train, a teacher, documents kept apart by whole masks, which take slower kernels, and those that
    are read in groups, which was not timed."""
    train = recipe.train
    away = recipe.model.offload == "disk" or recipe.distributed.cpu_offload
    masked = recipe.data.document_mask and (recipe.method == "self_extend" or masks_of(shape, recipe).shared)
    other = away or train.distill or masked
    return train.precision == "bfloat16" and not shape.num_experts and not other


def work_of(shape: Shape, recipe: Recipe) -> Work:
    """Of one token."""
    attention = attention_flops_per_token(shape, recipe)
    products = flops_per_token(shape, recipe) - attention
    attention *= wider_attention(shape, recipe) * (GROUPED if recipe.method == "self_extend" else 1.0)
    moved = shape.num_layers * compiled_layer_bytes(shape, recipe)
    if recipe.train.gradient_checkpointing:  # a forward pass more: 2 operations a weight, frozen or not
        adapters = trained_parameters(shape, recipe) if recipe.lora.rank else 0
        products += 2.0 * (shape.num_parameters + adapters)
        attention *= RECOMPUTED_ATTENTION
        moved *= RECOMPUTED
    return Work(products, attention, moved)


def seconds_per_token(shape: Shape, recipe: Recipe, gpu: Gpu, shares: Shares = SHARES) -> float:
    """Forward and backward pass of one token on one GPU, for what `is_known`: all weights there in 16 bits."""
    if recipe.train.compile != "layers":
        shares = replace(shares, moves=PLAIN)
    return work_of(shape, recipe).seconds(gpu, shares)
