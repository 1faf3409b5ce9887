"""The V2 model runner, vLLM's default on CUDA: the same through its `ModelState`. Untested there: it has been run on
batches made by hand alone. Needs vLLM; imported by the worker that builds a marked model.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from e2llm.vllm_plugin.grouped_step import NEXT_BATCH
from e2llm.vllm_plugin.loaded import find_grouping, find_rotaries, scale_of
from e2llm.vllm_plugin.marking import scaling_of
from e2llm.vllm_plugin.refusals import Hook
from e2llm.vllm_plugin.tables import spread_row_starts

RESOLVE = Hook("vllm.v1.worker.gpu.model_states", "resolve_model_state_cls", ("vllm_config", "model"))
STATE = "vllm.v1.worker.gpu.model_states.default"
STATE_HOOKS = (
    Hook(STATE, "DefaultModelState.__init__", ("vllm_config", "model", "encoder_cache", "device")),
    Hook(STATE, "DefaultModelState.add_request", ("req_index", "new_req_data")),
    Hook(STATE, "DefaultModelState.prepare_inputs", ("input_batch", "req_states")),
)
WARM_UP = ("_warmup_", "_v2_mixed_warmup")
"""How names of requests begin that this runner makes up when it starts (vllm/v1/worker/gpu/warmup.py). Nobody has
admitted them and nobody reads their answers."""

_installed: dict[str, bool] = {}


def install() -> None:
    """Hook into the choice of the model state, once a process. Raises ValueError where vLLM is not what we know."""
    if _installed:
        return
    owner, name, original = RESOLVE.find()
    for hook in STATE_HOOKS:
        hook.find()
    setattr(owner, name, _wrap_resolve(original))
    _installed["v2"] = True


def _wrap_resolve(original: Any) -> Any:
    @functools.wraps(original)
    def resolve_model_state_cls(vllm_config: Any, model: Any) -> Any:
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        chosen = original(vllm_config, model)
        if scaling_of(vllm_config.model_config) is None:
            return chosen
        if chosen is not DefaultModelState:
            raise ValueError(f"vLLM serves this model with {chosen.__name__}, which e2llm's plugin does not know")
        return _state_class(DefaultModelState)

    return resolve_model_state_cls


def _state_class(base: Any) -> Any:
    class ManyScalesState(base):  # type: ignore[misc]
        """Keeps the first table row of each request, and spreads them over the tokens of each batch. Where there are
        groups it keeps each request's on the host, and tells the attention those of each batch."""

        def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            scaling = scaling_of(vllm_config.model_config)
            assert scaling is not None
            self.scaling, self.targets = scaling, find_rotaries(model, vllm_config.model_config)
            self.grouping = find_grouping(model, vllm_config, scaling)
            self.request_row_starts = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
            self.request_groups = np.ones(self.max_num_reqs, dtype=np.int64)

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            if new_req_data.req_id.startswith(WARM_UP):
                scale = 1.0
            else:
                scale = scale_of(self.scaling, new_req_data.sampling_params)
            self.request_row_starts[req_index] = self.scaling.row_starts[scale]
            self.request_groups[req_index] = self.scaling.group(scale)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            found = super().prepare_inputs(input_batch, req_states)
            spread_row_starts(self.targets, self.request_row_starts, input_batch)
            if self.grouping is not None:
                places = input_batch.idx_mapping_np[: input_batch.num_reqs]
                NEXT_BATCH.tell(self.request_groups[places], self.grouping)
            return found

    return ManyScalesState
