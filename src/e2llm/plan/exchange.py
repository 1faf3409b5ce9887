"""What GPUs exchange in an optimizer step, and how long the links take for it.

Flows in: a `Shape`, a recipe, how many GPUs. Flows out: bytes over the links inside a node and between nodes, seconds.
A gather or scatter of B bytes among n GPUs moves B (n - 1) / n through each GPU's link; between N nodes it moves
B (N - 1) / N into each node, shared by its GPUs' network cards. An all-reduce is both. Not modelled: latency, which
counts for small messages, and switches that are shared with others.
"""

from __future__ import annotations

from dataclasses import dataclass

from e2llm.config import Recipe
from e2llm.plan.memory import trained_parameters
from e2llm.plan.shape import Shape

NODE = 8
"""GPUs of a node."""
INSIDE = 268e9
"""Bytes a second of one GPU's links inside a node: the slowest collective of 4 GiB between two H200 over NVLink
(`benchmarks/links.py`, the Record `links_2`). Records of training cannot tell it from another, because no measured step
waits for its exchange."""
BETWEEN = 40e9
"""Bytes a second of one GPU's network card: 400 Gbit/s, of which four fifths; not measured."""


@dataclass(frozen=True)
class Exchange:
    """Of one GPU, in one optimizer step."""

    inside: float
    """Bytes over the links of its node."""
    between: float
    """Bytes over its network card."""

    def __add__(self, other: Exchange) -> Exchange:
        return Exchange(self.inside + other.inside, self.between + other.between)

    def times(self, count: float) -> Exchange:
        """Done `count` times."""
        return Exchange(self.inside * count, self.between * count)

    @property
    def seconds(self) -> float:
        """If nothing else is on the links."""
        return self.inside / INSIDE + self.between / BETWEEN


def gather(size: float, gpus: int) -> Exchange:
    """`size` bytes that `gpus` GPUs hold together, brought to each; a scatter of sums is the same the other way."""
    nodes = -(-gpus // NODE)
    return Exchange(size * (gpus - 1) / gpus, size * (nodes - 1) / nodes / min(gpus, NODE))


def exchanged(shape: Shape, recipe: Recipe, gpus: int, batches: int = 1) -> Exchange:
    """Of one GPU in a step of `batches` batches. Raises ValueError for a strategy of one process on several GPUs."""
    config = recipe.distributed
    gradients = 4.0 * trained_parameters(shape, recipe)
    if gpus == 1:
        return Exchange(0.0, 0.0)
    if config.strategy == "none":
        raise ValueError(f"distributed.strategy = 'none' with {gpus} GPUs: use ddp, fsdp2 or deepspeed")
    if config.strategy == "ddp":  # in the type of the weights; adapters are float32 whatever the base is
        own = 2.0 if recipe.model.dtype in ("bfloat16", "float16") and not recipe.lora.rank else 4.0
        return gather(own * trained_parameters(shape, recipe), gpus).times(2)
    if config.strategy == "deepspeed" and config.zero_stage == 2:
        return gather(gradients, gpus) + gather(gradients, gpus)  # sums scattered, new weights gathered
    shard = config.shard or gpus
    low = 2.0 if recipe.train.precision == "bfloat16" or recipe.model.dtype != "float32" else 4.0
    weights = gather(low * shape.num_parameters, shard).times(2 if config.reshard else 1)
    found = (weights + gather(gradients, shard)).times(batches)
    if shard < gpus:  # a shard's gradients between the groups: each over its own card, where a group fills a node
        copies = gpus // shard
        moved = 2 * gradients / shard * (copies - 1) / copies
        found += Exchange(0.0, moved) if shard >= NODE else Exchange(moved, moved / NODE)
    return found
