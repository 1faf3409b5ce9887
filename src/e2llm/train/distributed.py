"""Processes of one run: a recipe's `[distributed]` section and the launcher's environment become Trainer arguments.

Flows in: a recipe, what torchrun or `accelerate launch` has set. Flows out: `Processes`, arguments, or a ValueError
before any weight is loaded. The sharding itself is Accelerate's (DDP, FSDP2) and DeepSpeed's. Which samples
a process sees is the Trainer's affair: batch k of all goes to process k mod world, and sample i is drawn from (seed, i)
wherever it lands.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import compare_versions
from torch import nn

from e2llm.config import Recipe
from e2llm.hf.read_once import buffers_apart
from e2llm.train.tensor_parallel import Groups, cut_first

LAUNCH = "torchrun --nproc-per-node GPUS -m e2llm train recipe.toml"
_PATIENCE = datetime.timedelta(hours=2)
"""How long a process waits for the others: one of them may be tokenizing the corpus."""


_CLIPS_OVER_MESHES = "1.15"
"""Version of accelerate that learned to."""
_FOREIGN = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""Variable by which accelerate's own configuration asks for an engine."""


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of the run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_world: int = 1
    launched: bool = False
    """Whether a launcher started it: then there is a process group, be it of one."""

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Processes:
        """What torchrun and `accelerate launch` say in the environment."""
        if "LOCAL_RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        world = int(environment["WORLD_SIZE"])
        return cls(
            rank=int(environment.get("RANK", 0)),
            world=world,
            local_rank=int(environment["LOCAL_RANK"]),
            local_world=int(environment.get("LOCAL_WORLD_SIZE", world)),
            launched=True,
        )

    def wait(self) -> None:
        """Until all are here."""
        if self.launched:
            any_process(False)

    def end(self) -> None:
        """The end of a run, for all at once: the first one still writes the model. Another run may follow."""
        if not self.launched:
            return
        from accelerate.state import AcceleratorState

        self.wait()
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in (*_FOREIGN, "FSDP_CPU_RAM_EFFICIENT_LOADING"):  # Accelerate sets them for itself
            os.environ.pop(name, None)


def windows_per_step(recipe: Recipe, world: int) -> int:
    """Windows in an optimizer step over all processes."""
    return recipe.train.batch_size * recipe.accumulation(world) * _groups(recipe, world)


def _groups(recipe: Recipe, world: int) -> int:
    """Groups of processes that see other samples than each other."""
    return world // recipe.distributed.tensor_parallel


def start(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> Processes:
    """Check the section against what is here, and join the other processes. Raises ValueError."""
    processes = Processes.of_environment(environment)
    gpus = torch.cuda.device_count()
    check(recipe, processes, gpus, environment)
    if processes.launched and not dist.is_initialized():
        if gpus:
            torch.cuda.set_device(processes.local_rank)
        # gloo beside NCCL: flags and offloaded weights live in host memory.
        dist.init_process_group("cuda:nccl,cpu:gloo" if gpus else "gloo", timeout=_PATIENCE)
    return processes


def devices_left_out(processes: Processes, gpus: int) -> str | None:
    """A sentence where this machine, with `gpus` GPUs, could train faster than these processes will; else None."""
    if processes.rank:
        return None
    if not gpus:
        return "PyTorch sees no CUDA GPU here: training on the CPU"
    if gpus > processes.local_world:
        return (
            f"{gpus} GPUs are here, {processes.local_world} of them in use; for all: torchrun --nproc-per-node "
            f"{gpus} -m e2llm train … --set distributed.strategy=ddp (fsdp2 where a model does not fit on one)"
        )
    return None


def check(recipe: Recipe, processes: Processes, gpus: int, environment: Mapping[str, str]) -> None:
    """Raise ValueError for a section that cannot run as these processes on a machine with `gpus` GPUs."""
    config, world = recipe.distributed, processes.world
    if config.strategy != "none" and not processes.launched:
        raise ValueError(f"distributed.strategy = {config.strategy!r}: one process was started; start with {LAUNCH}")
    if config.strategy == "none" and world > 1:
        raise ValueError(
            f"distributed.strategy = 'none': {world} processes were started; choose --set distributed.strategy=ddp, "
            "fsdp2 or deepspeed"
        )
    if gpus and processes.local_world > gpus:
        raise ValueError(
            f"{processes.local_world} processes were started on a machine with {gpus} GPUs: each needs one of its own; "
            f"use --nproc-per-node {gpus}"
        )
    if config.shard and world % config.shard:
        raise ValueError(
            f"distributed.shard = {config.shard}: does not divide the {world} processes; use one of "
            f"{', '.join(str(n) for n in range(2, world + 1) if world % n == 0) or 'strategy ddp'}"
        )
    share, here = config.tensor_parallel, processes.local_world
    if here % share:
        raise ValueError(
            f"distributed.tensor_parallel = {share}: does not divide the {here} processes of a machine, whose GPUs "
            f"exchange every layer; use one of {', '.join(str(n) for n in range(1, here + 1) if here % n == 0)}"
        )
    if share > 1 and compare_versions("accelerate", "<", _CLIPS_OVER_MESHES):
        raise ValueError(
            f"distributed.tensor_parallel = {share}: this version of accelerate cannot clip gradients of weights that "
            f"are cut and of others together: pip install 'accelerate>={_CLIPS_OVER_MESHES}'"
        )
    for name, engine in _FOREIGN.items():
        if environment.get(name, "false").lower() == "true":
            raise ValueError(
                f"accelerate's own configuration asks for {engine}: here the recipe says so, by distributed.strategy = "
                f"{config.strategy!r}; start with {LAUNCH}, or `accelerate launch` without {engine}"
            )
    if recipe.accumulation(world) > 1 and recipe.train.optimizer == "adamw_split":
        raise ValueError(
            f"train.optimizer = 'adamw_split': distributed.global_batch = {config.global_batch} takes "
            f"{recipe.accumulation(world)} batches a process, whose gradients would be added up in bfloat16; use a "
            "larger train.batch_size, or adamw"
        )
    if config.strategy == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "distributed.strategy = 'deepspeed': DeepSpeed is not installed: pip install 'e2llm[deepspeed]'"
        )


def arguments(recipe: Recipe, processes: Processes, once: bool = False) -> dict[str, Any]:
    """What the section adds to transformers' TrainingArguments. once: the first process alone holds weights."""
    config, world = recipe.distributed, processes.world
    added: dict[str, Any] = {"gradient_accumulation_steps": recipe.accumulation(world)}
    if config.strategy == "ddp":
        added["ddp_find_unused_parameters"] = False  # every weight is used in every step
        added["ddp_broadcast_buffers"] = False  # nothing changes them; a message at every forward otherwise
    if config.strategy == "fsdp2":
        added |= {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "reshard_after_forward": config.reshard,
                "cpu_offload": config.cpu_offload,
                # shards come from the first process; those of tensor parallelism are there before
                "cpu_ram_efficient_loading": once and config.tensor_parallel == 1,
                "state_dict_type": "SHARDED_STATE_DICT",
            },
        }
        if config.shard and config.shard < world:
            from accelerate import ParallelismConfig

            replicas = world // config.shard
            added["parallelism_config"] = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=config.shard)
        if config.tensor_parallel > 1:
            sizes = {"dp_shard_size": _groups(recipe, world), "tp_size": config.tensor_parallel}
            added["parallelism_config"] = Groups(**sizes)
    if config.strategy == "deepspeed":
        added["deepspeed"] = deepspeed_config(recipe)
    return added


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's own configuration; "auto" is filled in by transformers from its arguments."""
    config = recipe.distributed
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "round_robin_gradients": config.zero_stage == 2,
    }
    if config.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
        zero["stage3_gather_16bit_weights_on_model_save"] = False  # the model is made from the float32 weights
    if config.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if config.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": recipe.train.precision == "bfloat16"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    }


def finish(arguments: Any, recipe: Recipe) -> None:
    """What TrainingArguments have no field for, on the ones that were made."""
    if recipe.distributed.strategy != "fsdp2":
        return
    if recipe.train.precision == "bfloat16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Accelerate's own policy would also add up gradients and return the loss in bfloat16.
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    if arguments.device.type == "cpu":
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        # Accelerate shards over GPUs and their like only and would quietly run DDP on CPUs, where FSDP2 itself works.
        PartialState().distributed_type = DistributedType.MULTI_GPU


def leave() -> None:
    """Leave the group, before Python ends. It cannot be joined again: the launcher's store keeps old addresses."""
    if dist.is_initialized():
        dist.destroy_process_group()


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; a meeting of all. Goes by the host, not the GPU."""
    if not dist.is_initialized():
        return flag
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor; others as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator,no-any-return]


def device_to_load_on(recipe: Recipe) -> str | None:
    """Where weights are read to: the host where each GPU is to get its part of them, or some stay; None: the process's
    device."""
    parts = recipe.distributed.strategy in ("fsdp2", "deepspeed") or recipe.model.offload != "none"
    return "cpu" if parts else None


def reads_once(recipe: Recipe, processes: Processes) -> bool:
    """Whether the first process alone reads weights, to send each its shards."""
    return recipe.distributed.strategy == "fsdp2" and processes.world > 1


def spread_weights(recipe: Recipe, accelerator: Any, once: bool) -> None:
    """Let `accelerator` give each process what it is to hold, when it prepares the model. once: the first process alone
    holds weights."""
    if recipe.distributed.tensor_parallel > 1:
        cut_first(accelerator)
    elif once:
        _send_parameters_alone(accelerator)


def _send_parameters_alone(accelerator: Any) -> None:
    """Let `accelerator` send the parameters of the first process alone; each process has its buffers already."""
    own = accelerator.prepare

    @functools.wraps(own)
    def prepare(*given: Any, **options: Any) -> Any:
        with ExitStack() as stack:
            for model in given:
                if isinstance(model, nn.Module):
                    stack.enter_context(buffers_apart(model, accelerator.device))
            return own(*given, **options)

    accelerator.prepare = prepare
