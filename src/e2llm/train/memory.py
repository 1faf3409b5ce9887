"""Whether a run fits the GPU that it is to use, told before its weights are read.

Flows in: a recipe, the processes of its run. Flows out: nothing, a warning, or a ValueError with the settings that
would fit. Goes by the model's config alone and the count of `plan.memory`.
"""

from __future__ import annotations

import logging

import torch

from e2llm.config import Recipe
from e2llm.hf.load import load_config
from e2llm.plan.fitting import ERROR, alternatives, cannot_fit, fits, offers
from e2llm.plan.memory import training_memory
from e2llm.plan.shape import shape_of
from e2llm.train.distributed import Processes

_log = logging.getLogger(__name__)


def check_memory(recipe: Recipe, processes: Processes) -> None:
    """Raise ValueError for a run whose predicted peak is above all memory of this process's GPU, by more than the
    prediction may be wrong (`plan.fitting.ERROR`); warn of one that may not fit.

    `train.check_memory` = false makes a warning of the error. Without a GPU nothing is checked. Runs under tensor
    parallelism, a base that comes quantized and one whose code cannot be run without weights are not counted, which is
    logged.
    """
    model = recipe.model
    if not (torch.cuda.is_available() and model.name):
        return None
    if (share := recipe.distributed.tensor_parallel) > 1:
        return _tell(processes, f"distributed.tensor_parallel = {share}: memory is not predicted")
    config = load_config(model.name, trust_remote_code=model.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        return _tell(processes, f"model.name = {model.name!r}: memory is not predicted, its weights are quantized")
    try:
        shape = shape_of(config, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # a model's own code; where it is no model, loading says so
        return _tell(processes, f"model.name = {model.name!r}: memory is not predicted: {error}")
    memory = float(torch.cuda.mem_get_info()[1])
    size = sum(training_memory(shape, recipe, processes.world).values())
    if fits(size, memory):
        return None
    where = "the GPU" if processes.world == 1 else f"each of {processes.world} GPUs"
    told = (
        f"a step of {recipe.train.batch_size} x {recipe.data.window} tokens needs {size / 1e9:.1f} GB on {where}, as "
        f"`e2llm plan` counts it (to {ERROR:.0%}), and {torch.cuda.get_device_name()} has {memory / 1e9:.1f} GB"
    )
    ways = "\n".join(offers(alternatives(shape, recipe, memory, processes.world)))
    if recipe.train.check_memory and cannot_fit(size, memory):
        raise ValueError(f"model.name = {model.name!r}: {told}; to try it: --set train.check_memory=false\n{ways}")
    return _tell(processes, f"model.name = {model.name!r}: may not fit: {told}\n{ways}")


def _tell(processes: Processes, text: str) -> None:
    if processes.rank == 0:
        _log.warning("%s", text)
