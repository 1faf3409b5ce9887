"""What llama.cpp wants of a model: names, metadata keys, order of rows. No file is touched here.

Flows in: a transformers config, an `ExportPlan`. Flows out: metadata as {key: value}, tensor names, permuted weights,
and, for the proof, the frequencies that llama.cpp makes of the metadata.

The rotary part in ggml: `rope_yarn` (ggml-cpu/ops.cpp) turns channel pair j by freq_base^(-2j/d) / freq_factors[j]
times freq_scale, mixed by a ramp where the type is yarn, and multiplies cos and sin by attn_factor, for yarn also by
1 + 0.1 ln(1 / freq_scale). llama.cpp (llama_context's constructor) cancelled and put back that product over the years
so that for a file it stays (1 + 0.1 ln g) * rope.scaling.attn_factor. So attn_factor is what our attention scale is
over YaRN's own, and the attention scale itself where the type is not yarn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from e2llm.export.plan import ExportPlan
from e2llm.positions.attention import YARN_SLOPE, attention_scale
from e2llm.positions.frequencies import YARN_BETA_FAST, YARN_BETA_SLOW, Frequencies

# D = head_dim, d = rotary_dim

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Architecture:
    """One family that is exported."""

    name: str
    """llama.cpp's name, prefix of its keys."""
    permuted: bool
    """Whether llama.cpp rotates neighbouring channels (its llama family), where transformers pairs j with j + D/2."""
    takes_rope_factors: bool
    """Whether llama.cpp reads a rope_freqs tensor, one divisor a frequency, for this family."""


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True, takes_rope_factors=True),
    "mistral": Architecture("llama", permuted=True, takes_rope_factors=True),
    "qwen2": Architecture("qwen2", permuted=False, takes_rope_factors=False),
    "qwen3": Architecture("qwen3", permuted=False, takes_rope_factors=False),
}
"""transformers' model_type -> its family in llama.cpp."""

ROPE_FACTORS = "rope_freqs.weight"


def find_architecture(config: Any, window: int) -> Architecture:
    """Raises ValueError for a model that we cannot write, or that llama.cpp would run otherwise than transformers."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model type {kind!r}: GGUF is written for {', '.join(ARCHITECTURES)}; use --to hf and llama.cpp's own "
            "convert_hf_to_gguf.py on the folder"
        )
    layer_types = set(getattr(config, "layer_types", None) or ())
    local = getattr(config, "sliding_window", None)
    if (local is not None and local < window and kind == "mistral") or layer_types - {"full_attention"}:
        raise ValueError(
            f"sliding_window = {local}: llama.cpp's {ARCHITECTURES[kind].name} attends to everything; export a window "
            f"of at most {local} tokens, or use --to hf"
        )
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act = {activation!r}: llama.cpp's {ARCHITECTURES[kind].name} has silu; use --to hf")
    if len({*map(str, getattr(config, "rope_parameters", {}))} & {"full_attention", "sliding_attention"}):
        raise ValueError("rope_parameters by layer type: llama.cpp's family has one set; use --to hf")
    return ARCHITECTURES[kind]


def head_dim(config: Any) -> int:
    """D."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_keys(plan: ExportPlan, architecture: Architecture) -> tuple[dict[str, Any], Array | None]:
    """(metadata below `<arch>.rope.`, divisors of the frequencies (d/2,) float32 or None) for the plan's scale."""
    rope, found = plan.ropes[None], plan.frequencies()[None]
    keys: dict[str, Any] = {"dimension_count": rope.rotary_dim, "freq_base": rope.base}
    if plan.method == "yarn" and plan.scale > 1:
        keys |= {
            "scaling.type": "yarn",
            "scaling.factor": plan.scale,
            "scaling.original_context_length": rope.native_window,
        }
        share = found.attention_scale / attention_scale(plan.scale, YARN_SLOPE)
    else:
        if plan.method == "ntk":
            keys["freq_base"] = rope.base * plan.scale ** (rope.rotary_dim / (rope.rotary_dim - 2))
        keys["scaling.type"] = "none"
        if plan.method == "linear" and plan.scale > 1:
            keys |= {"scaling.type": "linear", "scaling.factor": plan.scale}
        share = found.attention_scale
    if abs(share - 1) > 1e-9:
        keys["scaling.attn_factor"] = share
    said = llamacpp_frequencies(keys, None)
    divisors = said.inv_freq.numpy() / found.inv_freq.double().numpy()
    if np.allclose(divisors, 1, rtol=1e-5):
        return keys, None
    if not architecture.takes_rope_factors:
        raise ValueError(
            f"method = {plan.method!r} on a base whose rope_type is {rope.rope_type!r}: llama.cpp's "
            f"{architecture.name} has no place for such frequencies; use --to hf, or serve with `e2llm serve`"
        )
    return keys, divisors.astype(np.float32)


def llamacpp_frequencies(keys: Mapping[str, Any], divisors: Array | None) -> Frequencies:
    """What ggml makes of rope metadata, in float64: the formulas of `rope_yarn` and `ggml_rope_yarn_corr_dims`."""
    import torch

    dim, base = int(keys["dimension_count"]), float(keys["freq_base"])
    pair = np.arange(dim // 2, dtype=np.float64)
    extrapolated = base ** (-2 * pair / dim) / (1.0 if divisors is None else divisors.astype(np.float64))
    kind, factor = keys.get("scaling.type", "linear"), float(keys.get("scaling.factor", 1.0))
    interpolated = extrapolated / (1.0 if kind == "none" else factor)
    multiplier = float(keys.get("scaling.attn_factor", 1.0))
    if kind != "yarn":
        return Frequencies(torch.from_numpy(interpolated), multiplier)
    window = int(keys["scaling.original_context_length"])

    def channel_of(rotations: float) -> float:
        return dim * math.log(window / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(channel_of(YARN_BETA_FAST)))
    high = min(dim - 1, math.ceil(channel_of(YARN_BETA_SLOW)))
    keep = 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)
    mixed = interpolated * (1 - keep) + extrapolated * keep
    return Frequencies(torch.from_numpy(mixed), multiplier * attention_scale(factor, YARN_SLOPE))


def permute(weight: Array, heads: int) -> Array:
    """Rows of a query or key projection (heads * D, ...) or its bias, for a kernel that rotates neighbours.

    transformers pairs channel j of a head with j + D/2, llama.cpp's llama family 2j with 2j + 1.
    """
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)


def permuted_row(row: int, head_size: int) -> int:
    """Row of the transformers weight that stands at `row` of the permuted one; not how `permute` does it."""
    head, channel = divmod(row, head_size)
    return head * head_size + channel // 2 + (channel % 2) * (head_size // 2)


def tensor_names(architecture: Architecture, blocks: int) -> Callable[[str], str | None]:
    """transformers' tensor name -> llama.cpp's, None for one that it does not know."""
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    mapping = gguf.get_tensor_name_map(kind, blocks)

    def name_of(name: str) -> str | None:
        found: str | None = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    return name_of


def heads_of(name: str, config: Any) -> int | None:
    """Heads of a query or key projection's rows by its llama.cpp name; None for tensors that are not permuted."""
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    if ".attn_k." in name:
        return int(config.num_key_value_heads)
    return None


def model_keys(config: Any, plan: ExportPlan, vocabulary: int) -> dict[str, Any]:
    """Metadata below `<arch>.` other than rope's."""
    size = head_dim(config)
    return {
        "block_count": int(config.num_hidden_layers),
        "context_length": plan.window,
        "embedding_length": int(config.hidden_size),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": int(config.num_attention_heads),
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": vocabulary,
    }
