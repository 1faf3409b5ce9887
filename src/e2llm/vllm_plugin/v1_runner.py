"""The V1 model runner, eager, compiled or with CUDA graphs: before each forward pass it writes which table each token
reads, and tells the attention the groups of the batch's requests where there are groups. Needs vLLM; imported by the
worker that builds a marked model.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from e2llm.vllm_plugin.grouped_step import NEXT_BATCH
from e2llm.vllm_plugin.loaded import find_grouping, find_rotaries, scale_of
from e2llm.vllm_plugin.marking import scaling_of
from e2llm.vllm_plugin.refusals import Hook
from e2llm.vllm_plugin.tables import write_row_starts

BEFORE = Hook("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._preprocess", ("scheduler_output", "num_input_tokens"))
LOADED = Hook("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.initialize_kv_cache", ("kv_cache_config",))

_installed: dict[str, bool] = {}


def install() -> None:
    """Hook into the runner's class, once a process. Raises ValueError where vLLM is not what we know."""
    if _installed:
        return
    before, loaded = BEFORE.find(), LOADED.find()
    setattr(before[0], before[1], _wrap_before(before[2]))
    setattr(loaded[0], loaded[1], _wrap_loaded(loaded[2]))
    _installed["v1"] = True


def _wrap_loaded(original: Any) -> Any:
    @functools.wraps(original)
    def initialize_kv_cache(self: Any, *arguments: Any, **named: Any) -> Any:
        scaling = scaling_of(self.model_config)
        self.e2llm = None
        if scaling is not None:
            targets = find_rotaries(self.model, self.model_config)
            self.e2llm = scaling, targets, find_grouping(self.model, self.vllm_config, scaling)
        return original(self, *arguments, **named)

    return initialize_kv_cache


def _wrap_before(original: Any) -> Any:
    @functools.wraps(original)
    def _preprocess(self: Any, scheduler_output: Any, num_input_tokens: int, *arguments: Any, **named: Any) -> Any:
        if self.e2llm is not None:
            scaling, targets, grouping = self.e2llm
            ids = self.input_batch.req_ids  # in batch order
            scales = [scale_of(scaling, self.requests[name].sampling_params) for name in ids]
            starts = [scaling.row_starts[scale] for scale in scales]
            counts = [scheduler_output.num_scheduled_tokens[name] for name in ids]
            write_row_starts(targets, np.array(starts, dtype=np.int64), np.array(counts), num_input_tokens)
            if grouping is not None:
                NEXT_BATCH.tell(np.array([scaling.group(scale) for scale in scales], dtype=np.int64), grouping)
        return original(self, scheduler_output, num_input_tokens, *arguments, **named)

    return _preprocess
