"""Frequency methods: (Rope, scale) -> frequencies a token turns by, and the ratio its cos and sin are multiplied by.

State: half as many frequencies as rotated channels; angle = position * inv_freq; the attention scale multiplies cos
and sin, so scores carry its square. Every method returns the model's own values at scale 1; a base that switches its
values by length (dynamic, longrope) has those of its native window there.

Order of operations and dtype (float32) are those of transformers' `modeling_rope_utils`, so that a table equals
transformers' static scaling to the last bit; `oracle.py` holds the same formulas in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from e2llm.positions.attention import YARN_SLOPE, attention_scale
from e2llm.positions.rope import Rope

# D = rotary_dim


@dataclass(frozen=True)
class Frequencies:
    """What one scale does to the rotary tables."""

    inv_freq: torch.Tensor
    """(D/2,) float32, CPU, radians a token."""
    attention_scale: float
    """Ratio cos and sin are multiplied by."""


def _own(rope: Rope) -> torch.Tensor:
    return torch.tensor(rope.inv_freq, dtype=torch.float32)


def _powers(rope: Rope) -> torch.Tensor:
    """Base ** (2j/D), checked to be what the model's own frequencies came from."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rope.rotary_dim
    return rope.base**exponents


def _require_unscaled(rope: Rope, method: str) -> None:
    """NTK and YaRN are defined on plain frequencies; on frequencies that already scale they would scale twice."""
    plain = {"default", "dynamic"}  # a dynamic model is unscaled inside its native window
    if rope.rope_type not in plain:
        raise ValueError(
            f"method = {method!r} on a base whose rope_type is {rope.rope_type!r}: the base already scales, and "
            f"{method} is defined on unscaled frequencies. Use method 'linear', which divides the base's own "
            "frequencies and so composes with its scaling" + (", or 'longrope'." if rope.long_factors else ".")
        )
    if not torch.allclose(1.0 / _powers(rope), _own(rope), rtol=1e-5, atol=0.0):
        raise ValueError(
            f"method = {method!r}: the model's frequencies are not base ** (-2j/D) with base {rope.base}; "
            "use method 'linear', which starts from the model's own frequencies."
        )


def none(rope: Rope, scale: float) -> Frequencies:
    """The model's own frequencies whatever the scale: plain extrapolation.

    Those of the native window where the base switches them by length: what training places. A scale set for inference
    leaves such a base its switching (`hf.Extension.set_scale`).
    """
    return Frequencies(_own(rope), rope.attention_scale)


def linear(rope: Rope, scale: float) -> Frequencies:
    """Position interpolation, Chen et al. 2023 (arXiv 2306.15595) Eq. 4; E2-LLM (arXiv 2401.06951) Eq. 5 with t = 0.

    m * (inv_freq / g), not (m / g) * inv_freq: the order transformers uses; they differ in the last bit unless g is a
    power of two. Composes with a base that already scales: its own frequencies are divided, its attention scale kept.
    """
    if rope.rope_type == "longrope":
        raise ValueError(
            "method = 'linear' on a LongRoPE base: it switches its own frequencies by length, so there is no one set "
            "to divide. Use method 'longrope'."
        )
    return Frequencies(_own(rope) / scale, rope.attention_scale)


def ntk(rope: Rope, scale: float) -> Frequencies:
    """NTK-aware base change, base * g^(D/(D-2)): Peng et al. 2023 (YaRN, arXiv 2309.00071) Eq. 16 (Sect. 3.1).

    Equal to transformers' `dynamic` with factor 1 at length g * L.
    """
    _require_unscaled(rope, "ntk")
    dim = rope.rotary_dim
    if dim <= 2:
        raise ValueError(f"method = 'ntk' with rotary_dim = {dim}: the exponent D/(D-2) needs D > 2; use 'linear'")
    base = rope.base * scale ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    return Frequencies(1.0 / (base**exponents), rope.attention_scale)


def dynamic_ntk(rope: Rope, scale: float) -> Frequencies:
    """`ntk` at a scale that follows the length read so far: Peng et al. 2023 (arXiv 2309.00071) Sect. 3.3, with
    s = max(1, length / L).

    At one length it is `ntk`; `hf.extension` asks for it anew in each forward pass, as transformers' `dynamic` does, so
    keys that are cached keep the rotation of an earlier length. For inference only.
    """
    return ntk(rope, scale)


YARN_BETA_FAST = 32.0
YARN_BETA_SLOW = 1.0


def yarn(
    rope: Rope, scale: float, *, beta_fast: float = YARN_BETA_FAST, beta_slow: float = YARN_BETA_SLOW
) -> Frequencies:
    """NTK-by-parts with attention temperature: Peng et al. 2023 (arXiv 2309.00071) Eqs. 17-22.

    Channels that turn more than `beta_fast` times in the native window keep their frequency, those that turn less than
    `beta_slow` times are divided by g, a ramp over the channel index joins them. Deviation from the paper: the ramp is
    linear in the channel index between rounded bounds, as in the authors' code and transformers, not in the number of
    rotations. Attention scale 0.1 ln(g) + 1 on cos and sin (Eq. 22's sqrt(1/t)).
    """
    _require_unscaled(rope, "yarn")
    dim = rope.rotary_dim
    powers = _powers(rope)
    extrapolated = 1.0 / powers
    interpolated = 1.0 / (scale * powers)

    def channel_of(rotations: float) -> float:
        return (dim * math.log(rope.native_window / (rotations * 2 * math.pi))) / (2 * math.log(rope.base))

    low: float = max(math.floor(channel_of(beta_fast)), 0)
    high: float = min(math.ceil(channel_of(beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    inv_freq = interpolated * (1 - keep) + extrapolated * keep
    return Frequencies(inv_freq, attention_scale(scale, YARN_SLOPE))


def longrope(rope: Rope, scale: float) -> Frequencies:
    """LongRoPE with the factors that the model's config carries: Ding et al. 2024 (arXiv 2402.13753) Eq. 3.

    The factors were searched for one target window, so every scale above 1 uses them whole and a scale above that
    target is refused.
    """
    if rope.long_factors is None:
        raise ValueError("method = 'longrope': the model's config carries no long_factor; use 'linear' or 'yarn'")
    if rope.max_scale is not None and scale > rope.max_scale:
        raise ValueError(
            f"scale = {scale}: the model's LongRoPE factors reach scale {rope.max_scale:g}; ask for at most that"
        )
    factors = torch.tensor(rope.long_factors, dtype=torch.float32)
    return Frequencies(1.0 / (factors * _powers(rope)), rope.attention_scale)


def self_extend(rope: Rope, scale: float) -> Frequencies:
    """The model's own frequencies whatever the scale, which says the group of far keys instead: Jin et al. 2024 (arXiv
    2401.01325); see `positions.groups`. Composes with a base that already scales, unless it does so by length."""
    if rope.rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"method = 'self_extend' on a base whose rope_type is {rope.rope_type!r}: it switches its frequencies by "
            "length, and keys are turned on from one place to another by one set; use method = 'yarn' or 'longrope'"
        )
    return Frequencies(_own(rope), rope.attention_scale)


METHODS: dict[str, Callable[[Rope, float], Frequencies]] = {
    "none": none,
    "linear": linear,
    "ntk": ntk,
    "dynamic_ntk": dynamic_ntk,
    "yarn": yarn,
    "longrope": longrope,
    "self_extend": self_extend,
}


def frequencies(rope: Rope, method: str, scale: float, slope: float | None = None) -> Frequencies:
    """Frequencies of `method` at `scale` >= 1 (ratio; real). At scale 1 every method gives the model's own, of its
    native window.

    `slope`: the attention scale is the base's own times 1 + slope * ln(scale); None: the method's own. Raises
    ValueError for an unknown method, a scale below 1, or a base that the method cannot compose with.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: choose one of {', '.join(METHODS)}")
    if not math.isfinite(scale) or scale < 1:
        raise ValueError(f"scale = {scale!r}: a scale is a finite ratio of at least 1")
    # Asked even at scale 1, so that a combination that cannot work fails at once and not at the first long request.
    result = METHODS[method](rope, max(scale, 1.0))
    if scale == 1:
        return Frequencies(_own(rope), rope.attention_scale)
    if slope is not None:
        return Frequencies(result.inv_freq, rope.attention_scale * attention_scale(scale, slope))
    return result
