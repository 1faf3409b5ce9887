"""Triton kernels of attention in training windows whose far keys are told apart by groups, forward and backward.

Imported only where they are used: `triton` is not on every machine. Flows in: pointers, strides, sizes
(`grouped_training.py` launches). A query sees the keys of its row up to itself. It meets a key that is far from it by
its second query and that key's second key, any other by the first ones (Jin et al. 2024, arXiv 2401.01325, Sect. 3);
one softmax goes over all. The blocking is Dao's (2023, arXiv 2307.08691): scores are never stored.

Positions grow along a row, so of a block of queries the first keys are far from all, the last near to all, and only in
between are both scores needed. Likewise only the keys of a query's own segment, at the end, and the leading ones have
the bias, so most pairs of blocks are one plain product.
"""

from __future__ import annotations

import triton
import triton.language as tl

# B = batch, H = query heads, G = key-value heads, R = H / G, T = tokens, D = channels


@triton.jit
def find_bounds(
    positions,  # (B, T) int32 or int64, growing along a row
    groups,  # (B,)
    segments,  # (B, T) of integers
    bias,  # (B, T) float32
    turns,  # (B, T) int32, out: KEYS: queries near to the key, by row order; else: keys that are far from the query
    bounds,  # (B, blocks, 4) int32, out: least and most of the block's turns, then where its bias begins or ends
    tokens,
    leading,
    neighbours,
    steps,  # bits of `tokens`
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of BLOCK keys (KEYS) or queries. Third and fourth number of `bounds`: of queries, the first key that may
    be of the segment of one of them, and how many leading keys to weigh; of keys, the query after the last that weighs
    one of them. Queries without a bias weigh nothing."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    there = at < tokens
    own = tl.load(positions + row * tokens + at, mask=there, other=0).to(tl.int64)
    found = tl.zeros([BLOCK], tl.int32)
    for step in range(steps):  # a binary search, every token its own
        tried = found + (1 << (steps - 1 - step))
        inside = tried <= tokens
        position = tl.load(positions + row * tokens + tried - 1, mask=inside, other=0).to(tl.int64)
        if KEYS:
            before = position < own + neighbours
        else:
            before = position <= own - neighbours
        found = tl.where(inside & before, tried, found)
    grouped = tl.load(groups + row) > 1
    found = tl.where(grouped, found, tokens if KEYS else 0)
    tl.store(turns + row * tokens + at, found, mask=there)

    segment = tl.load(segments + row * tokens + at, mask=there, other=0).to(tl.int64)
    lowest = tl.min(tl.where(there, segment, 0x7FFFFFFFFFFFFFFF), 0)
    highest = tl.max(tl.where(there, segment, -0x7FFFFFFFFFFFFFFF), 0)
    own_bias = tl.load(bias + row * tokens + at, mask=there, other=0.0)
    first = tokens
    last = 0
    for start in range(0, tokens, CHUNK):
        others = start + tl.arange(0, CHUNK)
        inside = others < tokens
        theirs = tl.load(segments + row * tokens + others, mask=inside, other=0).to(tl.int64)
        alike = (theirs >= lowest) & (theirs <= highest)
        if KEYS:
            alike = alike | (block * BLOCK < leading)
            weighed = tl.load(bias + row * tokens + others, mask=inside, other=0.0) != 0.0
            last = tl.maximum(last, tl.max(tl.where(inside & alike & weighed, others + 1, 0), 0))
        else:
            first = tl.minimum(first, tl.min(tl.where(inside & alike, others, tokens), 0))
    place = bounds + (row * tl.num_programs(0) + block) * 4
    tl.store(place, tl.min(tl.where(there, found, tokens), 0))
    tl.store(place + 1, tl.max(tl.where(there, found, 0), 0))
    if KEYS:
        tl.store(place + 2, last)
        tl.store(place + 3, 0)
    else:
        weighs = tl.max((own_bias != 0.0).to(tl.int32), 0)
        tl.store(place + 2, tl.where(weighs > 0, first, tokens))
        tl.store(place + 3, tl.where(weighs > 0, leading, 0))


@triton.jit
def tile(base, start, stride, tokens, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr):
    """(ROWS, BLOCK) from row `start` on. Past the last token it is that token again: no mask, which would cost time."""
    rows = tl.minimum(tl.arange(0, ROWS), tokens - 1 - start)
    channels = tl.arange(0, BLOCK)
    place = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + channels[None, :]
    if DIM == BLOCK:
        found = tl.load(place)
    else:
        found = tl.load(place, mask=(channels < DIM)[None, :], other=0.0)
    if WIDEN:  # the interpreter has no product of bfloat16
        found = found.to(tl.float32)
    return found


@triton.jit
def store(base, start, stride, tokens, found, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK)
    place = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + channels[None, :]
    there = (start + rows < tokens)[:, None] & (channels < DIM)[None, :]
    tl.store(place, found.to(base.dtype.element_ty), mask=there)


@triton.jit
def _attend(
    state,
    rows,
    careful,
    tiles,
    first,
    end,
    tokens,
    scale,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys from `first` to `end`, all near, all far or (NEAR and FAR) both, into the running softmax of a block."""
    summed, top, total = state
    queries, turn, query_segments, query_bias = rows
    care_before, care_from, segments, leading = careful
    q, far_q, key, far_key, value, key_t, far_key_t, value_t = tiles
    if first < end:  # else the compiler waits for every product, as a loop without turns leaves none to wait for
        for start in tl.range(first, end, KEYS):
            keys = start + tl.arange(0, KEYS)
            if NEAR:
                k = tile(key, start, key_t, tokens, KEYS, DIM, BLOCK, WIDEN)
                scores = tl.dot(q, k.T, input_precision=PRECISION)
            if FAR:
                far_k = tile(far_key, start, far_key_t, tokens, KEYS, DIM, BLOCK, WIDEN)
                far_scores = tl.dot(far_q, far_k.T, input_precision=PRECISION)
                if NEAR:
                    scores = tl.where(keys[None, :] < turn[:, None], far_scores, scores)
                else:
                    scores = far_scores
            if (start < care_before) | (start + KEYS > care_from):
                key_segments = tl.load(segments + keys, mask=keys < tokens, other=0)
                same = (query_segments[:, None] == key_segments[None, :]) | (keys < leading)[None, :]
                scores -= tl.where(same, query_bias[:, None], 0.0)
                scores = tl.where(keys[None, :] <= queries[:, None], scores, float("-inf"))
            now = tl.maximum(top, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - now[:, None])
            shrink = tl.exp2(top - now)
            total = total * shrink + tl.sum(weights, 1)
            summed = summed * shrink[:, None]
            v = tile(value, start, value_t, tokens, KEYS, VALUE_DIM, VALUE_BLOCK, WIDEN)
            summed = tl.dot(weights.to(v.dtype), v, summed, input_precision=PRECISION)
            top = now
    return summed, top, total


@triton.jit
def attend(
    query,  # (B, H, T, D)
    far_query,  # (B, H, T, D)
    key,  # (B, G, T, D)
    far_key,  # (B, G, T, D)
    value,  # (B, G, T, value D)
    out,  # (B, H, T, value D), out
    log_sums,  # (B, H, T) float32, out: of the scores, in bits
    segments,  # (B, T)
    bias,  # (B, T) float32, as a part of the scores before they are scaled
    turns,  # (B, T) int32, of `find_bounds`
    bounds,  # (B, blocks, 4) int32
    query_b,
    query_h,
    query_t,
    far_query_b,
    far_query_h,
    far_query_t,
    key_b,
    key_h,
    key_t,
    far_key_b,
    far_key_h,
    far_key_t,
    value_b,
    value_h,
    value_t,
    out_b,
    out_h,
    out_t,
    tokens,
    leading,
    scale,  # of products, in bits
    H: tl.constexpr,
    R: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of one head's queries over the keys up to itself. The longest blocks start first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (tl.program_id(1) // H).to(tl.int64)
    head = (tl.program_id(1) % H).to(tl.int64)
    start = block * QUERIES
    queries = start + tl.arange(0, QUERIES)
    there = queries < tokens
    at = row * tokens + queries
    place = bounds + (row * tl.num_programs(0) + block) * 4
    far_end = tl.load(place) // KEYS * KEYS
    near_start = tl.cdiv(tl.load(place + 1), KEYS) * KEYS
    care_from = tl.minimum(tl.load(place + 2), start + 1)
    care_before = tl.load(place + 3)

    q = tile(query + row * query_b + head * query_h, start, query_t, tokens, QUERIES, DIM, BLOCK, WIDEN)
    base = far_query + row * far_query_b + head * far_query_h
    far_q = tile(base, start, far_query_t, tokens, QUERIES, DIM, BLOCK, WIDEN)
    rows = (
        queries,
        tl.load(turns + at, mask=there, other=0),
        tl.load(segments + at, mask=there, other=0),
        tl.load(bias + at, mask=there, other=0.0),
    )
    careful = (care_before, care_from, segments + row * tokens, leading)
    shared = head // R
    key_base = key + row * key_b + shared * key_h
    far_key_base = far_key + row * far_key_b + shared * far_key_h
    value_base = value + row * value_b + shared * value_h
    tiles = (q, far_q, key_base, far_key_base, value_base, key_t, far_key_t, value_t)
    summed = tl.zeros([QUERIES, VALUE_BLOCK], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    state = (summed, top, total)
    end = tl.minimum(start + QUERIES, tokens)
    state = _attend(
        state, rows, careful, tiles, 0, far_end, tokens, scale,
        False, True, KEYS, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, WIDEN, PRECISION,
    )  # fmt: skip
    state = _attend(
        state, rows, careful, tiles, far_end, near_start, tokens, scale,
        True, True, KEYS, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, WIDEN, PRECISION,
    )  # fmt: skip
    state = _attend(
        state, rows, careful, tiles, near_start, end, tokens, scale,
        True, False, KEYS, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, WIDEN, PRECISION,
    )  # fmt: skip
    summed, top, total = state
    base = out + row * out_b + head * out_h
    store(base, start, out_t, tokens, summed / total[:, None], QUERIES, VALUE_DIM, VALUE_BLOCK)
    tl.store(log_sums + (row * H + head) * tokens + queries, top + tl.log2(total), mask=there)
