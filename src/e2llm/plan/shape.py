"""A model's size as plain numbers, from its config: the model is built on the meta device, without weights.

Flows in: a folder, a config.json or a hub name. Flows out: `Shape`. Knows no GPU and no recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from e2llm.hf.extended import UnknownScaling, empty_model, unscaled
from e2llm.hf.load import config_source, is_adapter


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model."""

    model_type: str
    num_parameters: int
    """Tied weights counted once."""
    num_embedding_parameters: int
    num_layers: int
    hidden_size: int
    num_heads: int
    """Query heads."""
    num_query_channels: int
    """Heads times head size."""
    num_key_channels: int
    """Key-value heads times head size."""
    intermediate_size: int
    """Width of the MLP; of all experts that one token visits."""
    vocabulary_size: int
    native_window: int
    """L in tokens."""
    linear_sizes: tuple[tuple[str, int, int], ...]
    """(last part of its name, inputs, outputs) of every linear layer but the output layer."""
    num_experts: int = 0
    sliding_windows: tuple[int | None, ...] = ()
    """For each layer the tokens that it looks back at most; None: all."""


def read_config(name: str) -> tuple[Any, dict[str, Any]]:
    """(config, the file's own keys) of a folder (of an adapter, its base's), a config.json, a GGUF file or a hub name.
    Raises ValueError."""
    from transformers import AutoConfig, PreTrainedConfig

    path = Path(name).expanduser()
    local = path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.endswith((".json", ".gguf"))
    if local and not (path.is_file() or is_adapter(path) or (path / "config.json").is_file()):
        found = "a config.json, a .gguf file or a hub name"
        raise ValueError(f"model = {name!r}: no config.json there; give a model or adapter folder, {found}")
    source, extra = config_source(name)
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source, **extra)
        return AutoConfig.from_pretrained(source, **extra), raw
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model = {name!r}: its config cannot be read: {error}") from error


def shape_of(config: Any, *, trust_remote_code: bool = False) -> Shape:
    """`Shape` of a causal LM's config. Raises ValueError for a config of something else."""
    try:
        model = empty_model(config, trust_remote_code=trust_remote_code)
    except UnknownScaling:  # no size depends on it; `runtimes` and the warnings say it
        model = empty_model(unscaled(config), trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    visited = getattr(text, "num_experts_per_tok", None) or 1
    width = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 0
    output = model.get_output_embeddings()
    linear = [
        (name.rsplit(".", 1)[-1], module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    ]
    kinds = getattr(text, "layer_types", None) or []
    return Shape(
        model_type=text.model_type,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_embedding_parameters=model.get_input_embeddings().weight.numel(),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_heads=text.num_attention_heads,
        num_query_channels=text.num_attention_heads * head,
        num_key_channels=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head,
        intermediate_size=(width or 4 * text.hidden_size) * visited,
        vocabulary_size=text.vocab_size,
        native_window=int(getattr(text, "max_position_embeddings", 0) or 0),
        linear_sizes=tuple(linear),
        num_experts=int(experts),
        sliding_windows=tuple(text.sliding_window if "sliding" in kind else None for kind in kinds),
    )


def cache_bytes(shape: Shape, window: int, *, method: str = "", bytes_per_number: int = 2) -> int:
    """Keys and values of one request that fills `window` tokens; for method self_extend keys twice, at their own
    places and at those of their groups, where a layer sees them all."""
    limits = shape.sliding_windows or (None,) * shape.num_layers
    twice = method == "self_extend"
    kept = sum(min(window, limit or window) * (3 if twice and not limit else 2) for limit in limits)
    return kept * shape.num_key_channels * bytes_per_number
