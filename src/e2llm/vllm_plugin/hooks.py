"""The hooks into vLLM that every process needs: the model config, the rotary embedding, the taking of requests.

The hooks of the model runner are put in by the worker that builds a marked model (`rotary.py`). Where vLLM's version or
a hook is not what we know, only a guard goes in: it refuses e2llm checkpoints and leaves every other model alone.
Without any hook vLLM serves a checkpoint at scale 1, its config being the base's own. Needs vLLM.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from typing import Any

from e2llm.vllm_plugin.admission import SCALE_KEY, admit, cache_salt, read_wish
from e2llm.vllm_plugin.marking import default_max_tokens, extended_checkpoint, mark, scaling_of, settings_of
from e2llm.vllm_plugin.refusals import Hook, check_version
from e2llm.vllm_plugin.scaling import Scaling

_log = logging.getLogger(__name__)

CONFIG = Hook("vllm.config.model", "ModelConfig.get_model_arch_config", ("self",))
DEFAULTS = Hook("vllm.config.model", "ModelConfig.get_diff_sampling_param", ("self",))
GET_ROPE = Hook(
    "vllm.model_executor.layers.rotary_embedding",
    "get_rope",
    ("head_size", "max_position", "is_neox_style", "rope_parameters", "dtype"),
)
APPLY = Hook(
    "vllm.model_executor.layers.rotary_embedding.base",
    "RotaryEmbedding.forward_static",
    ("positions", "query", "key", "head_size", "rotary_dim", "cos_sin_cache", "is_neox_style"),
)
BACKEND = Hook("vllm.v1.attention.selector", "get_attn_backend", ("head_size", "dtype", "kv_cache_dtype"))
ADMIT = Hook("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", ("request_id", "prompt", "params"))
REFUSE = Hook("vllm.exceptions", "VLLMValidationError", ("message",))
EVERYWHERE = (CONFIG, DEFAULTS, GET_ROPE, APPLY, BACKEND, ADMIT, REFUSE)

_installed: dict[str, bool] = {}


def install() -> None:
    """Put the hooks in, or the guard. Once a process."""
    if _installed:
        return
    import vllm

    try:
        check_version(vllm.__version__)
        found = {hook: hook.find() for hook in EVERYWHERE}
    except ValueError as problem:
        _installed["guard"] = True
        _install_guard(str(problem))
        return
    _installed["hooks"] = True
    from e2llm.vllm_plugin.rotary import wrap_get_rope

    _replace(found[CONFIG], _wrap_config)
    _replace(found[DEFAULTS], _wrap_defaults)
    _replace(found[ADMIT], _wrap_admission)
    _replace_function(found[GET_ROPE], wrap_get_rope)
    _replace_function(found[BACKEND], _wrap_backend)


def _replace(found: tuple[Any, str, Any], wrap: Any) -> None:
    owner, name, original = found
    setattr(owner, name, wrap(original))


def _replace_function(found: tuple[Any, str, Any], wrap: Any) -> None:
    """Also in the modules of vLLM that have imported the function by its name already."""
    _, name, original = found
    wrapped = functools.wraps(original)(wrap(original))
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("vllm.") and vars(module).get(name) is original:
            setattr(module, name, wrapped)


def _wrap_config(original: Any) -> Any:
    @functools.wraps(original)
    def get_model_arch_config(self: Any) -> Any:
        mark(self)
        return original(self)

    return get_model_arch_config


def _wrap_defaults(original: Any) -> Any:
    @functools.wraps(original)
    def get_diff_sampling_param(self: Any) -> Any:
        return default_max_tokens(self, original(self))

    return get_diff_sampling_param


def _wrap_admission(original: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    signature = inspect.signature(original)

    @functools.wraps(original)
    def process_inputs(self: Any, *arguments: Any, **named: Any) -> Any:
        scaling = scaling_of(self.model_config)
        request = original(self, *arguments, **named)
        if scaling is not None:
            # vLLM fills a missing limit with its longest request; the caller's own params still lack it.
            limit = signature.bind(self, *arguments, **named).arguments["params"].max_tokens
            try:
                _fix(request, limit, scaling, self.model_config.max_model_len)
            except ValueError as error:  # what vLLM's server answers with status 400; a ValueError would be 500
                raise VLLMValidationError(str(error)) from error
        return request

    return process_inputs


def _wrap_backend(original: Any) -> Any:
    from vllm.config.vllm import get_current_vllm_config_or_none

    @functools.wraps(original)
    def get_attn_backend(*arguments: Any, **named: Any) -> Any:
        config = get_current_vllm_config_or_none()
        scaling = None if config is None or config.model_config is None else scaling_of(config.model_config)
        if scaling is None or not scaling.neighbours:
            return original(*arguments, **named)
        from e2llm.vllm_plugin.grouped_backend import registered_backend

        return registered_backend()  # its layers refuse what they do not know

    return get_attn_backend


def _fix(request: Any, max_tokens: int | None, scaling: Scaling, max_model_len: int) -> None:
    """Write scale, length and salt into vLLM's request. Raises ValueError for one that is refused."""
    sampling = request.sampling_params
    if request.resumable or request.prompt_token_ids is None:
        raise ValueError("e2llm's vLLM plugin takes requests whose whole prompt is there, as token ids")
    wish = read_wish(sampling.extra_args)
    plan = admit(scaling, len(request.prompt_token_ids), max_tokens, wish, max_model_len)
    if sampling.min_tokens > plan.max_new_tokens:
        raise ValueError(f"min_tokens = {sampling.min_tokens}: this request gets {plan.max_new_tokens} tokens")
    sampling.max_tokens = plan.max_new_tokens
    sampling.extra_args = {**(sampling.extra_args or {}), SCALE_KEY: plan.scale}
    request.cache_salt = cache_salt(plan.scale, request.cache_salt)


def _install_guard(problem: str) -> None:
    """Refuse e2llm checkpoints with `problem`; nothing else changes."""
    try:
        owner, name, original = CONFIG.find()
    except ValueError:
        _log.warning("%s. Nothing was hooked in: e2llm checkpoints are served at scale 1.", problem)
        return

    @functools.wraps(original)
    def get_model_arch_config(self: Any) -> Any:
        if extended_checkpoint(self) is not None or settings_of(self) is not None:
            raise ValueError(f"model = {self.model!r}: {problem}")
        return original(self)

    setattr(owner, name, get_model_arch_config)
