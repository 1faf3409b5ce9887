"""Triton kernels of the gradients of `grouped_kernels.attend`: of queries, then of keys and values.

Scores are made again from the sums that `attend` kept (Dao 2023, arXiv 2307.08691, Sect. 3.1), near and far ones as
there. No two programs write to one place, so gradients are the same at every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from e2llm.hf.grouped_kernels import store, tile

# B = batch, H = query heads, G = key-value heads, R = H / G, T = tokens, D = channels


@triton.jit
def _back_to_queries(
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
    """Keys from `first` to `end` into the gradients of a block of queries and of its far selves."""
    gradient, far_gradient = state
    queries, turn, query_segments, query_bias, log_sum, delta = rows
    care_before, care_from, segments, leading = careful
    q, far_q, out_gradient, key, far_key, value, key_t, far_key_t, value_t = tiles
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
                    is_far = keys[None, :] < turn[:, None]
                    scores = tl.where(is_far, far_scores, scores)
                else:
                    scores = far_scores
            if (start < care_before) | (start + KEYS > care_from):
                key_segments = tl.load(segments + keys, mask=keys < tokens, other=0)
                same = (query_segments[:, None] == key_segments[None, :]) | (keys < leading)[None, :]
                scores -= tl.where(same, query_bias[:, None], 0.0)
                scores = tl.where(keys[None, :] <= queries[:, None], scores, float("-inf"))
            weights = tl.exp2(scores * scale - log_sum[:, None])
            v = tile(value, start, value_t, tokens, KEYS, VALUE_DIM, VALUE_BLOCK, WIDEN)
            back = weights * (tl.dot(out_gradient, v.T, input_precision=PRECISION) - delta[:, None])
            if FAR:
                far_back = back
                if NEAR:
                    far_back = tl.where(is_far, back, 0.0)
                    back = tl.where(is_far, 0.0, back)
                far_gradient = tl.dot(far_back.to(far_k.dtype), far_k, far_gradient, input_precision=PRECISION)
            if NEAR:
                gradient = tl.dot(back.to(k.dtype), k, gradient, input_precision=PRECISION)
    return gradient, far_gradient


@triton.jit
def back_to_queries(
    query,  # (B, H, T, D)
    far_query,  # (B, H, T, D)
    key,  # (B, G, T, D)
    far_key,  # (B, G, T, D)
    value,  # (B, G, T, value D)
    out,  # (B, H, T, value D)
    out_gradient,  # (B, H, T, value D)
    query_gradient,  # (B, H, T, D), out
    far_query_gradient,  # (B, H, T, D), out
    log_sums,  # (B, H, T) float32, of `attend`
    deltas,  # (B, H, T) float32, out: products of `out` with its gradient, for `back_to_keys`
    segments,  # (B, T)
    bias,  # (B, T) float32, as in `attend`
    turns,  # (B, T) int32
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
    out_gradient_b,
    out_gradient_h,
    out_gradient_t,
    query_gradient_b,
    query_gradient_h,
    query_gradient_t,
    far_query_gradient_b,
    far_query_gradient_h,
    far_query_gradient_t,
    tokens,
    leading,
    scale,  # of products, in bits
    out_scale,  # the same in nats
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
    """A block of one head's queries, as in `attend`."""
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

    base = out + row * out_b + head * out_h
    o = tile(base, start, out_t, tokens, QUERIES, VALUE_DIM, VALUE_BLOCK, WIDEN)
    base = out_gradient + row * out_gradient_b + head * out_gradient_h
    do = tile(base, start, out_gradient_t, tokens, QUERIES, VALUE_DIM, VALUE_BLOCK, WIDEN)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at_head = (row * H + head) * tokens + queries
    tl.store(deltas + at_head, delta, mask=there)

    q = tile(query + row * query_b + head * query_h, start, query_t, tokens, QUERIES, DIM, BLOCK, WIDEN)
    base = far_query + row * far_query_b + head * far_query_h
    far_q = tile(base, start, far_query_t, tokens, QUERIES, DIM, BLOCK, WIDEN)
    rows = (
        queries,
        tl.load(turns + at, mask=there, other=0),
        tl.load(segments + at, mask=there, other=0),
        tl.load(bias + at, mask=there, other=0.0),
        tl.load(log_sums + at_head, mask=there, other=float("inf")),
        delta,
    )
    careful = (care_before, care_from, segments + row * tokens, leading)
    shared = head // R
    key_base = key + row * key_b + shared * key_h
    far_key_base = far_key + row * far_key_b + shared * far_key_h
    value_base = value + row * value_b + shared * value_h
    tiles = (q, far_q, do, key_base, far_key_base, value_base, key_t, far_key_t, value_t)
    state = (tl.zeros([QUERIES, BLOCK], tl.float32), tl.zeros([QUERIES, BLOCK], tl.float32))
    end = tl.minimum(start + QUERIES, tokens)
    state = _back_to_queries(
        state, rows, careful, tiles, 0, far_end, tokens, scale,
        False, True, KEYS, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, WIDEN, PRECISION,
    )  # fmt: skip
    state = _back_to_queries(
        state, rows, careful, tiles, far_end, near_start, tokens, scale,
        True, True, KEYS, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, WIDEN, PRECISION,
    )  # fmt: skip
    base = far_query_gradient + row * far_query_gradient_b + head * far_query_gradient_h
    store(base, start, far_query_gradient_t, tokens, state[1] * out_scale, QUERIES, DIM, BLOCK)
    state = _back_to_queries(
        state, rows, careful, tiles, near_start, end, tokens, scale,
        True, False, KEYS, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, WIDEN, PRECISION,
    )  # fmt: skip
    base = query_gradient + row * query_gradient_b + head * query_gradient_h
    store(base, start, query_gradient_t, tokens, state[0] * out_scale, QUERIES, DIM, BLOCK)


@triton.jit
def _back_to_keys(
    state,
    columns,
    careful,
    tiles,
    first,
    end,
    tokens,
    scale,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    OF_FAR: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head's queries from `first` to `end` into the gradients of a block of keys (of their far selves, OF_FAR) and
    values. Scores are transposed: (keys, queries). Where there are both kinds, the values get all in the first pass."""
    gradient, value_gradient = state
    keys, turn, key_segments = columns
    care_until, segments, bias, leading = careful
    k, far_k, v, query, far_query, out_gradient, log_sums, deltas, query_t, far_query_t, out_gradient_t = tiles
    if first < end:  # else the compiler waits for every product, as a loop without turns leaves none to wait for
        for start in tl.range(first, end, QUERIES):
            queries = start + tl.arange(0, QUERIES)
            there = queries < tokens
            if NEAR:
                q = tile(query, start, query_t, tokens, QUERIES, DIM, BLOCK, WIDEN)
                scores = tl.dot(k, q.T, input_precision=PRECISION)
            if FAR:
                far_q = tile(far_query, start, far_query_t, tokens, QUERIES, DIM, BLOCK, WIDEN)
                far_scores = tl.dot(far_k, far_q.T, input_precision=PRECISION)
                if NEAR:
                    is_far = queries[None, :] >= turn[:, None]
                    scores = tl.where(is_far, far_scores, scores)
                else:
                    scores = far_scores
            if start < care_until:
                query_segments = tl.load(segments + queries, mask=there, other=0)
                query_bias = tl.load(bias + queries, mask=there, other=0.0)
                same = (query_segments[None, :] == key_segments[:, None]) | (keys < leading)[:, None]
                scores -= tl.where(same, query_bias[None, :], 0.0)
                scores = tl.where(keys[:, None] <= queries[None, :], scores, float("-inf"))
            # no weight where there is no query
            log_sum = tl.load(log_sums + queries, mask=there, other=float("inf"))
            weights = tl.exp2(scores * scale - log_sum[None, :])
            do = tile(out_gradient, start, out_gradient_t, tokens, QUERIES, VALUE_DIM, VALUE_BLOCK, WIDEN)
            if not (NEAR and OF_FAR):
                value_gradient = tl.dot(weights.to(do.dtype), do, value_gradient, input_precision=PRECISION)
            delta = tl.load(deltas + queries, mask=there, other=0.0)
            back = weights * (tl.dot(v, do.T, input_precision=PRECISION) - delta[None, :])
            if NEAR and FAR:
                back = tl.where(is_far == OF_FAR, back, 0.0)
            if OF_FAR:
                gradient = tl.dot(back.to(far_q.dtype), far_q, gradient, input_precision=PRECISION)
            else:
                gradient = tl.dot(back.to(q.dtype), q, gradient, input_precision=PRECISION)
    return gradient, value_gradient


@triton.jit
def back_to_keys(
    query,  # (B, H, T, D)
    far_query,  # (B, H, T, D)
    key,  # (B, G, T, D)
    far_key,  # (B, G, T, D)
    value,  # (B, G, T, value D)
    out_gradient,  # (B, H, T, value D)
    key_gradient,  # (B, G, T, D), out
    far_key_gradient,  # (B, G, T, D), out
    value_gradient,  # (B, G, T, value D), out
    log_sums,  # (B, H, T) float32, of `attend`
    deltas,  # (B, H, T) float32, of `back_to_queries`
    segments,  # (B, T)
    bias,  # (B, T) float32, as in `attend`
    turns,  # (B, T) int32
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
    out_gradient_b,
    out_gradient_h,
    out_gradient_t,
    key_gradient_b,
    key_gradient_h,
    key_gradient_t,
    far_key_gradient_b,
    far_key_gradient_h,
    far_key_gradient_t,
    value_gradient_b,
    value_gradient_h,
    value_gradient_t,
    tokens,
    leading,
    scale,  # of products, in bits
    out_scale,  # the same in nats
    G: tl.constexpr,
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
    """A block of one key head over the queries from itself on, of all heads that share it."""
    block = tl.program_id(0)
    row = (tl.program_id(1) // G).to(tl.int64)
    shared = (tl.program_id(1) % G).to(tl.int64)
    start = block * KEYS
    keys = start + tl.arange(0, KEYS)
    there = keys < tokens
    place = bounds + (row * tl.num_programs(0) + block) * 4
    begin = start // QUERIES * QUERIES
    least = tl.load(place)
    near_end = tl.where(least < tokens, least // QUERIES, tl.cdiv(tokens, QUERIES)) * QUERIES
    far_start = tl.cdiv(tl.load(place + 1), QUERIES) * QUERIES
    care_until = tl.maximum(tl.load(place + 2), start + KEYS - 1)

    k = tile(key + row * key_b + shared * key_h, start, key_t, tokens, KEYS, DIM, BLOCK, WIDEN)
    base = far_key + row * far_key_b + shared * far_key_h
    far_k = tile(base, start, far_key_t, tokens, KEYS, DIM, BLOCK, WIDEN)
    v = tile(value + row * value_b + shared * value_h, start, value_t, tokens, KEYS, VALUE_DIM, VALUE_BLOCK, WIDEN)
    columns = (
        keys,
        tl.load(turns + row * tokens + keys, mask=there, other=0),
        tl.load(segments + row * tokens + keys, mask=there, other=0),
    )
    careful = (care_until, segments + row * tokens, bias + row * tokens, leading)
    gradient = tl.zeros([KEYS, BLOCK], tl.float32)
    summed = tl.zeros([KEYS, VALUE_BLOCK], tl.float32)
    # Two passes, since three gradients at a time do not fit in the registers.
    for head in range(shared * R, shared * R + R):
        query_base = query + row * query_b + head * query_h
        far_query_base = far_query + row * far_query_b + head * far_query_h
        back_base = out_gradient + row * out_gradient_b + head * out_gradient_h
        at_head = (row * (G * R) + head) * tokens
        tiles = (k, far_k, v, query_base, far_query_base, back_base, log_sums + at_head, deltas + at_head,
                 query_t, far_query_t, out_gradient_t)  # fmt: skip
        gradient, summed = _back_to_keys(
            (gradient, summed), columns, careful, tiles, begin, near_end, tokens, scale,
            True, False, False, QUERIES, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, WIDEN, PRECISION,
        )  # fmt: skip
        gradient, summed = _back_to_keys(
            (gradient, summed), columns, careful, tiles, near_end, far_start, tokens, scale,
            True, True, False, QUERIES, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, WIDEN, PRECISION,
        )  # fmt: skip
    base = key_gradient + row * key_gradient_b + shared * key_gradient_h
    store(base, start, key_gradient_t, tokens, gradient * out_scale, KEYS, DIM, BLOCK)
    gradient = tl.zeros([KEYS, BLOCK], tl.float32)
    for head in range(shared * R, shared * R + R):
        query_base = query + row * query_b + head * query_h
        far_query_base = far_query + row * far_query_b + head * far_query_h
        back_base = out_gradient + row * out_gradient_b + head * out_gradient_h
        at_head = (row * (G * R) + head) * tokens
        tiles = (k, far_k, v, query_base, far_query_base, back_base, log_sums + at_head, deltas + at_head,
                 query_t, far_query_t, out_gradient_t)  # fmt: skip
        gradient, summed = _back_to_keys(
            (gradient, summed), columns, careful, tiles, near_end, far_start, tokens, scale,
            True, True, True, QUERIES, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, WIDEN, PRECISION,
        )  # fmt: skip
        gradient, summed = _back_to_keys(
            (gradient, summed), columns, careful, tiles, far_start, tokens, tokens, scale,
            False, True, True, QUERIES, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, WIDEN, PRECISION,
        )  # fmt: skip
    base = far_key_gradient + row * far_key_gradient_b + shared * far_key_gradient_h
    store(base, start, far_key_gradient_t, tokens, gradient * out_scale, KEYS, DIM, BLOCK)
    base = value_gradient + row * value_gradient_b + shared * value_gradient_h
    store(base, start, value_gradient_t, tokens, summed, KEYS, VALUE_DIM, VALUE_BLOCK)
