"""The Triton kernel of `split_adamw.py`. Imported only where it is used: `triton` is not on every machine."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 2048


@triton.jit
def split_adamw(
    addresses,  # (P, 4) int64: bfloat16 weights, int16 low halves, float32 first and second moments of each parameter
    gradients,  # (P,) int64: addresses of bfloat16 gradients
    sizes,  # (P,) int64
    blocks,  # (programs, 2) int32: parameter, which BLOCK elements of it
    coefficient,  # () float32: what gradients are multiplied by
    keep,  # 1 - learning rate * weight decay
    beta1,
    beta2,
    size,  # learning rate / (1 - beta1 ** step)
    root,  # sqrt(1 - beta2 ** step)
    eps,
    EVEN: tl.constexpr,  # all sizes are multiples of 16
    BLOCK: tl.constexpr,
):
    """AdamW of BLOCK weights of one parameter, in float32."""
    program = tl.program_id(0).to(tl.int64)
    owner = tl.load(blocks + 2 * program).to(tl.int64)
    place = tl.load(blocks + 2 * program + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(sizes + owner)
    if EVEN:
        count = tl.multiple_of(count, 16)
    inside = place < count
    gradient = tl.multiple_of(tl.load(gradients + owner).to(tl.pointer_type(tl.bfloat16)), 16)
    parameter = tl.multiple_of(tl.load(addresses + 4 * owner).to(tl.pointer_type(tl.bfloat16)), 16)
    low = tl.multiple_of(tl.load(addresses + 4 * owner + 1).to(tl.pointer_type(tl.int16)), 16)
    exp_avg = tl.multiple_of(tl.load(addresses + 4 * owner + 2).to(tl.pointer_type(tl.float32)), 16)
    exp_avg_sq = tl.multiple_of(tl.load(addresses + 4 * owner + 3).to(tl.pointer_type(tl.float32)), 16)

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
