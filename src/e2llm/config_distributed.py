"""The `[distributed]` section of a recipe: how one run is spread over processes, a GPU each.

Flows in: plain values. Flows out: `DistributedConfig`, or a ValueError that names the key. Knows no torch and no
machine: whether the processes are there is checked by `train.distributed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["none", "ddp", "fsdp2", "deepspeed"]


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Many GPUs and machines: what each process holds."""

    strategy: Strategy = "none"
    """none: one process. ddp: each holds all weights. fsdp2: weights, gradients and optimizer are sharded, a decoder
    layer at a time. deepspeed: ZeRO. All but none are started by torchrun or `accelerate launch`."""
    global_batch: int = 0
    """Windows in an optimizer step over all processes; gradient accumulation follows from it, so the same recipe gives
    the same run on any number of processes. 0: batch_size x gradient_accumulation x processes."""
    shard: int = 0
    """fsdp2: processes that share one copy of the weights. 0: all. Fewer, such as the GPUs of a node: HSDP, each group
    of `shard` holds a whole copy and groups exchange gradients only."""
    reshard: bool = True
    """fsdp2: drop a layer's gathered weights after its forward and gather them again for its backward. false: keep
    them, faster where memory allows."""
    tensor_parallel: int = 1
    """fsdp2: neighbouring processes that compute each layer together, each with its share of the heads and of the MLP's
    channels; fsdp2 then shards over the groups. They see the same windows. Trains all weights; divides the model's
    heads, key-value heads and MLP."""
    cpu_offload: bool = False
    """fsdp2 and deepspeed: keep weights and optimizer in host memory. Slow; for models that do not fit otherwise."""
    zero_stage: Literal[2, 3] = 2
    """deepspeed: 2 shards gradients and optimizer, 3 the weights too."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "shard"):
            if getattr(self, name) < 0:
                raise ValueError(f"distributed.{name} = {getattr(self, name)}: use 0 or more")
        if self.tensor_parallel < 1:
            raise ValueError(f"distributed.tensor_parallel = {self.tensor_parallel}: use 1 (each layer whole) or more")
        for name, default, users in (
            ("shard", 0, ("fsdp2",)),
            ("tensor_parallel", 1, ("fsdp2",)),
            ("reshard", True, ("fsdp2",)),
            ("cpu_offload", False, ("fsdp2", "deepspeed")),
            ("zero_stage", 2, ("deepspeed",)),
        ):
            value = getattr(self, name)
            if value != default and self.strategy not in users:
                raise ValueError(
                    f"distributed.{name} = {value!r}: says nothing to strategy {self.strategy!r}; leave it out, or use "
                    f"strategy {' or '.join(map(repr, users))}"
                )
        if self.shard == 1:
            raise ValueError("distributed.shard = 1: a copy of the weights in each process is strategy 'ddp'")
        if self.tensor_parallel > 1 and (self.shard or self.cpu_offload):
            with_it = f"shard = {self.shard}" if self.shard else "cpu_offload = true"
            raise ValueError(
                f"distributed.tensor_parallel = {self.tensor_parallel}: not offered with distributed.{with_it}; leave "
                "one of them out"
            )
