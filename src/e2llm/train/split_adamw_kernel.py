"""The Triton kernel of `split_adamw.py`. Imported only where it is used: `triton` is not on every machine."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 2048


@triton.jit
def split_adamw(
    parameter,  # (n,) bfloat16: upper halves of the masters
    gradient,  # (n,) bfloat16
    low,  # (n,) int16: the rest of the masters
    exp_avg,  # (n,) float32
    exp_avg_sq,  # (n,) float32
    coefficient,  # () float32: what gradients are multiplied by
    count,
    keep,  # 1 - learning rate * weight decay
    beta1,
    beta2,
    size,  # learning rate / (1 - beta1 ** step)
    root,  # sqrt(1 - beta2 ** step)
    eps,
    BLOCK: tl.constexpr,
):
    """AdamW of BLOCK weights, in float32."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    found = tl.load(gradient + place, inside, 0.0).to(tl.float32) * tl.load(coefficient)
    upper = tl.load(parameter + place, inside, 0.0).to(tl.int16, bitcast=True).to(tl.int32) << 16
    master = (upper + tl.load(low + place, inside, 0).to(tl.int32)).to(tl.float32, bitcast=True) * keep
    first = tl.load(exp_avg + place, inside, 0.0)
    first += (found - first) * (1 - beta1)
    second = tl.load(exp_avg_sq + place, inside, 0.0) * beta2 + found * found * (1 - beta2)
    master -= size * first / (tl.sqrt(second) / root + eps)
    bits = master.to(tl.int32, bitcast=True)
    rounded = (bits + 0x8000) >> 16
    tl.store(parameter + place, rounded.to(tl.int16).to(tl.bfloat16, bitcast=True), inside)
    tl.store(low + place, (bits - (rounded << 16)).to(tl.int16), inside)
    tl.store(exp_avg + place, first, inside)
    tl.store(exp_avg_sq + place, second, inside)
