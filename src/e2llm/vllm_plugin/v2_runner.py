"""The V2 model runner, vLLM's default on CUDA: the same through its `ModelState`. Untested there: it has been run on
batches made by hand alone. Needs vLLM; imported by the worker that builds a marked model.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from e2llm.vllm_plugin.loaded import find_rotaries, row_start
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
        """Keeps the first table row of each request, and spreads them over the tokens of each batch."""

        def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            scaling = scaling_of(vllm_config.model_config)
            assert scaling is not None
            self.scaling, self.targets = scaling, find_rotaries(model, vllm_config.model_config)
            self.request_row_starts = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.request_row_starts[req_index] = row_start(self.scaling, new_req_data.sampling_params)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            found = super().prepare_inputs(input_batch, req_states)
            spread_row_starts(self.targets, self.request_row_starts, input_batch)
            return found

    return ManyScalesState
