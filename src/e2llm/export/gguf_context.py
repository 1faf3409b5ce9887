"""What llama.cpp is told so that a GGUF of unscaled frequencies is read at a scale: parameters of a context.

Flows in: a `Rope`, a frequency method, a scale and a slope. Flows out: a `ContextRope`, whose frequencies have been
compared with ours. Knows no file and no llama.cpp.

llama.cpp reads a file whose scaling type is none at scale 1, whatever factor a context names, so the type is always
named as well. With type yarn its context computes the multiplier of cos and sin itself (1 + 0.1 ln g) and drops what
the caller gave; then only the model's own `rope.scaling.attn_factor` is multiplied in, which loading the file can
override. With the other types the context's `yarn_attn_factor` is that multiplier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from e2llm.export.gguf_layout import llamacpp_frequencies
from e2llm.positions.attention import YARN_SLOPE, attention_scale
from e2llm.positions.frequencies import Frequencies, frequencies
from e2llm.positions.rope import Rope

SCALING_TYPES = {"none": 0, "linear": 1, "yarn": 2}
"""enum llama_rope_scaling_type."""
ATTN_FACTOR_KEY = "{}.rope.scaling.attn_factor"
"""Metadata key of the model's own multiplier, by architecture."""
METHODS = ("none", "linear", "ntk", "yarn", "self_extend")
"""Frequency methods that a context can be told. With self_extend every scale has the file's own frequencies: far keys
are moved to the places of their groups instead (`positions.frames`)."""
_RELATIVE = 1e-5
"""Largest difference of a frequency and of the attention scale: float32's roundings in two orders of operations."""


@dataclass(frozen=True, kw_only=True)
class ContextRope:
    """Rope parameters of one llama.cpp context; those of `ContextRope()` leave the file's own as they are."""

    scaling: str | None = None
    """none, linear or yarn; None: the file's own."""
    freq_base: float = 0.0
    """0: the file's own."""
    freq_scale: float = 0.0
    """1 / g; 0: the file's own."""
    attn_factor: float = 1.0
    """Multiplier of cos and sin, of the context; no effect with yarn."""
    model_attn_factor: float | None = None
    """`rope.scaling.attn_factor` that the file has to be loaded with; None: its own."""
    original_window: int = 0
    """Native window of YaRN's ramp, tokens; 0: the file's own."""


def context_rope(rope: Rope, method: str, scale: float, slope: float | None) -> ContextRope:
    """Parameters for `scale`. Raises ValueError for frequencies that no context can be told."""
    if scale == 1 or method == "none":
        return ContextRope()
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: llama.cpp is told {', '.join(METHODS)}; serve with --engine e2llm")
    expected = frequencies(rope, method, scale, slope)
    share = expected.attention_scale / rope.attention_scale
    if method == "self_extend":
        found = ContextRope()
        if abs(expected.attention_scale - 1) > _RELATIVE:  # of a base that is scaled, or of a slope
            raise ValueError(
                f"method = 'self_extend' with an attention scale of {expected.attention_scale:g}: llama.cpp multiplies "
                "keys by it each time that they are moved; serve with --engine e2llm"
            )
    elif method == "yarn":
        factor = share / attention_scale(scale, YARN_SLOPE)
        own = abs(factor - 1) < 1e-9
        found = ContextRope(
            scaling="yarn",
            freq_scale=1 / scale,
            model_attn_factor=None if own else factor,
            original_window=rope.native_window,
        )
    elif method == "ntk":
        dim = rope.rotary_dim
        found = ContextRope(scaling="none", freq_base=rope.base * scale ** (dim / (dim - 2)), attn_factor=share)
    else:
        found = ContextRope(scaling="linear", freq_scale=1 / scale, attn_factor=share)
    _check(context_frequencies(rope, found), expected, method, scale)
    return found


def context_frequencies(rope: Rope, found: ContextRope) -> Frequencies:
    """What ggml makes of a file with `rope` under these parameters, in float64."""
    pair = np.arange(rope.rotary_dim // 2, dtype=np.float64)
    divisors = rope.base ** (-2 * pair / rope.rotary_dim) / np.array(rope.inv_freq, dtype=np.float64)
    keys: dict[str, Any] = {
        "dimension_count": rope.rotary_dim,
        "freq_base": found.freq_base or rope.base,
        "scaling.type": found.scaling or "none",
        "scaling.factor": 1 / (found.freq_scale or 1.0),
        "scaling.attn_factor": rope.attention_scale,
        "scaling.original_context_length": found.original_window or rope.native_window,
    }
    if found.scaling == "yarn":
        keys["scaling.attn_factor"] = 1.0 if found.model_attn_factor is None else found.model_attn_factor
    else:
        keys["scaling.attn_factor"] *= found.attn_factor
    return llamacpp_frequencies(keys, divisors)


def _check(found: Frequencies, expected: Frequencies, method: str, scale: float) -> None:
    apart = (found.inv_freq / expected.inv_freq.double() - 1).abs().max().item()
    scale_apart = abs(found.attention_scale / expected.attention_scale - 1)
    if max(apart, scale_apart) > _RELATIVE:
        raise ValueError(
            f"method = {method!r} at scale {scale:g}: llama.cpp would differ by {apart:.1e} in a frequency and "
            f"{scale_apart:.1e} in the attention scale; serve with --engine e2llm"
        )
