"""Stand-ins for the plain values that the plugin reads off vLLM's configs, and prompts for the embedded base."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from e2llm.vllm_plugin.scaling import Scaling, make_scaling

PROMPTS = (
    "The import statement combines two operations; it searches for",
    "class Reader:\n    def __init__(self, name):\n        self.name = name\n",
    "for key, value in sorted(self.items()):\n",
    "Return a new list that holds the elements of the first one, in the order in which they",
)


class TextConfig(SimpleNamespace):
    """A transformers config of a text model."""

    def get_text_config(self) -> TextConfig:
        return self


def model_config(folder: Path | str, overrides: Any = None, **hf: Any) -> Any:
    """As vLLM's ModelConfig when config.json has been read."""
    values = {
        "model_type": "llama",
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = TextConfig(**values | hf)
    return SimpleNamespace(model=str(folder), hf_config=config, hf_text_config=config, hf_overrides=overrides or {})


def engine_config(**changes: Any) -> Any:
    """As vLLM's VllmConfig of a plain engine on a CPU; `changes`: section__field=value."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            use_mla=False,
            is_encoder_decoder=False,
            enable_prompt_embeds=False,
            runner_type="generate",
            enforce_eager=False,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            enable_dbo=False,
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False, cache_dtype="auto"),
        attention_config=SimpleNamespace(backend=None),
        speculative_config=None,
        kv_transfer_config=None,
        use_v2_model_runner=False,
    )
    for path, value in changes.items():
        *sections, field = path.split("__")
        target: Any = config
        for section in sections:
            target = getattr(target, section)
        assert hasattr(target, field), path
        setattr(target, field, value)
    return config


def scaling(method: str = "linear", **fields: Any) -> Scaling:
    """Native window 64, trained to scale 8."""
    from e2llm.hf.checkpoint import CheckpointInfo

    settings = fields.pop("settings", {})
    values = {"method": method, "native_window": 64, "training_window": 32, "max_scale": 8.0}
    return make_scaling(CheckpointInfo(**values | fields), 64, settings)
