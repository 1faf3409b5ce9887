"""What a model's rotary embedding is, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary embedding of one model (or of one of its layer types), as pretrained.

    `inv_freq` and `attention_scale` are the model's own values, so they already hold whatever scaling the model was
    published with (`rope_type`); `base` is its rope_theta.
    """

    rotary_dim: int
    """Channels of a head that are rotated; `inv_freq` has half as many entries."""
    base: float
    """rope_theta."""
    native_window: int
    """L: tokens the model was pretrained for."""
    inv_freq: tuple[float, ...]
    """The model's float32 frequencies, radians a token, each exactly representable in float32."""
    attention_scale: float = 1.0
    """Ratio that the model multiplies cos and sin by."""
    rope_type: str = "default"
    """Scaling the model was published with: default, linear, dynamic, yarn, llama3, longrope, ..."""
    long_factors: tuple[float, ...] | None = None
    """LongRoPE's divisors of the frequencies beyond the native window, where the config carries them."""
    max_scale: float | None = None
    """Largest scale the long factors were searched for (config maximum window / native window)."""

    def __post_init__(self) -> None:
        if self.native_window < 1:
            raise ValueError(f"native_window = {self.native_window}: the model's window in tokens must be at least 1")
        if len(self.inv_freq) * 2 != self.rotary_dim:
            raise ValueError(
                f"rotary_dim = {self.rotary_dim}: expected twice the number of frequencies, {len(self.inv_freq)}"
            )
