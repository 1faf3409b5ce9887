"""Triton kernels over paged keys: attention of single tokens, split over their keys; writing keys; turning them.

Imported only where they are used: `triton` is not on every machine. Flows in: pointers, strides, sizes
(`paged_decode.py` and `rerotate.py` launch). A page holds S tokens of G heads, a head's key and value side by side,
and behind them, where keys stand in groups, its far key. Stored keys are rotated already, so no kernel that reads them
knows a scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

# N = single tokens, H = query heads, G = key-value heads, R = H / G, K = keys of a tile, S = tokens of a page


@triton.jit
def turned(x, place, channels, there, table, most, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """`x`, loaded from `place` + `channels` where `there`, in float32, with its first `most` channels (all that turn,
    2 · PAIRS, or none) turned by `table` (cos, then sin)."""
    if INTERLEAVED:
        first = channels % 2 == 0
        pair = channels // 2
        others = tl.where(first, channels + 1, channels - 1)
    else:
        first = channels < PAIRS
        pair = tl.where(first, channels, channels - PAIRS)
        others = tl.where(first, channels + PAIRS, channels - PAIRS)
    rotated = channels < most
    cos = tl.load(table + pair, mask=rotated, other=1.0)
    sin = tl.load(table + PAIRS + pair, mask=rotated, other=0.0)
    y = tl.load(place + others, mask=there & rotated, other=0.0).to(tl.float32)
    return x.to(tl.float32) * cos + y * tl.where(first, -sin, sin)


@triton.jit
def attend_items(
    query,  # (N, H, key dim)
    store,  # (pages, S, G, key dim + value dim + far key dim)
    tables,  # (rows, pages of a row) int32
    row_of,  # (N,) int32
    length_of,  # (N,) int32, keys that the token sees, itself included
    items,  # (items, 3) int32: token, first key, end; token -1 where there is no work
    far_of,  # (N,) int32, so many of the first keys are far ones; an item is of one kind; or nothing
    turns,  # (N, 4, PAIRS) float32: cos and sin of far keys, of far queries; or nothing
    part,  # (items, H, value dim) float32, out: sums of weighted values
    stat,  # (items, H, 2) float32, out: largest score, sum of weights
    query_n,
    query_h,
    page_stride,
    token_stride,
    head_stride,
    table_stride,
    scaling,
    softcap,
    window,
    H: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in float32: the interpreter has no product of bfloat16
    GROUPED: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """One piece of one token's keys, for the R query heads that share a key head: a partial softmax."""
    item = tl.program_id(0)
    group = tl.program_id(1)
    token = tl.load(items + 3 * item)
    if token < 0:
        return
    first = tl.load(items + 3 * item + 1)
    end = tl.load(items + 3 * item + 2)
    row = tl.load(row_of + token).to(tl.int64)
    if WINDOWED:
        first = tl.maximum(first, tl.load(length_of + token) - window)

    heads = tl.arange(0, ROWS)
    key_channels = tl.arange(0, KEY_BLOCK)
    value_channels = tl.arange(0, VALUE_BLOCK)
    some = heads < R
    place = query + token.to(tl.int64) * query_n + (group * R + heads)[:, None] * query_h
    there = some[:, None] & (key_channels < KEY_DIM)[None, :]
    q = tl.load(place + key_channels[None, :], mask=there, other=0.0)
    key_offset = 0
    if GROUPED:
        far = first < tl.load(far_of + token)
        key_offset = far.to(tl.int32) * (KEY_DIM + VALUE_DIM)
        most = far.to(tl.int32) * (2 * PAIRS)
        table = turns + (token.to(tl.int64) * 4 + 2) * PAIRS
        q = turned(q, place, key_channels[None, :], there, table, most, PAIRS, INTERLEAVED).to(query.dtype.element_ty)
    if WIDEN:
        q = q.to(tl.float32)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    for start in range(first, end, KEYS):
        spots = start + tl.arange(0, KEYS)
        seen = spots < end
        page = tl.load(tables + row * table_stride + spots // S, mask=seen, other=0).to(tl.int64)
        base = store + page * page_stride + (spots % S) * token_stride + group * head_stride
        k = tl.load(
            base[None, :] + key_offset + key_channels[:, None],
            mask=(key_channels < KEY_DIM)[:, None] & seen[None, :],
            other=0,
        )
        if WIDEN:
            k = k.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scaling
        if CAPPED:  # softcap · tanh(scores / softcap)
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - now[:, None])
        shrink = tl.exp(largest - now)
        v = tl.load(
            base[:, None] + KEY_DIM + value_channels[None, :],
            mask=seen[:, None] & (value_channels < VALUE_DIM)[None, :],
            other=0,
        )
        if WIDEN:
            v = v.to(tl.float32)
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = now

    out = item.to(tl.int64) * H + group * R + heads
    tl.store(stat + 2 * out, largest, mask=some)
    tl.store(stat + 2 * out + 1, total, mask=some)
    place = part + out[:, None] * VALUE_DIM + value_channels[None, :]
    tl.store(place, summed, mask=some[:, None] & (value_channels < VALUE_DIM)[None, :])


@triton.jit
def combine_items(
    part,  # (items, H, value dim) float32
    stat,  # (items, H, 2) float32
    item_of,  # (N,) int32, first item of a token; the others follow
    count_of,  # (N,) int32, its items; 0 where the place in the batch is empty
    sinks,  # (H,) or nothing
    out,  # (N, H, value dim)
    H: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ITEMS: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One query head of one token: its pieces become one softmax."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(item_of + token).to(tl.int64)
    count = tl.load(count_of + token)
    channels = tl.arange(0, VALUE_BLOCK)
    one = tl.arange(0, 1)
    if HAS_SINKS:  # a key that holds nothing: weight without value
        largest = tl.load(sinks + head + one).to(tl.float32)
        total = tl.full([1], 1.0, tl.float32)
    else:
        largest = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
    summed = tl.zeros([VALUE_BLOCK], tl.float32)
    for start in range(0, count, ITEMS):
        which = start + tl.arange(0, ITEMS)
        there = which < count
        place = (first + which) * H + head
        top = tl.load(stat + 2 * place, mask=there, other=float("-inf"))
        mass = tl.load(stat + 2 * place + 1, mask=there, other=0.0)
        now = tl.maximum(largest, tl.max(top, 0))
        # A piece outside a sliding window has no keys: nothing, and no NaN.
        finite = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp(top - finite)
        shrink = tl.exp(largest - finite)
        values = tl.load(
            part + place[:, None] * VALUE_DIM + channels[None, :],
            mask=there[:, None] & (channels < VALUE_DIM)[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(weights * mass, 0)
        summed = summed * shrink + tl.sum(weights[:, None] * values, 0)
        largest = now
    found = summed / tl.where(total == 0.0, 1.0, total)
    place = out + (token * H + head) * VALUE_DIM + channels
    tl.store(place, found.to(out.dtype.element_ty), mask=channels < VALUE_DIM)


@triton.jit
def write_keys(
    key,  # (N, G, key dim)
    value,  # (N, G, value dim)
    store,  # (pages · S, G, key dim + value dim + far key dim)
    slots,  # (N,) int64
    turns,  # (N, 4, PAIRS) float32, as of `attend_items`; or nothing
    key_n,
    key_g,
    value_n,
    value_g,
    slot_stride,
    head_stride,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    GROUPED: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """One head of one token's key and value, and of its far key, to its place in a page."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    target = store + tl.load(slots + token) * slot_stride + group * head_stride
    channels = tl.arange(0, KEY_BLOCK)
    place = key + token * key_n + group * key_g
    k = tl.load(place + channels, mask=channels < KEY_DIM, other=0)
    tl.store(target + channels, k, mask=channels < KEY_DIM)
    if GROUPED:
        there = channels < KEY_DIM
        far = turned(k, place, channels, there, turns + token * 4 * PAIRS, 2 * PAIRS, PAIRS, INTERLEAVED)
        tl.store(target + KEY_DIM + VALUE_DIM + channels, far.to(store.dtype.element_ty), mask=there)
    channels = tl.arange(0, VALUE_BLOCK)
    v = tl.load(value + token * value_n + group * value_g + channels, mask=channels < VALUE_DIM, other=0)
    tl.store(target + KEY_DIM + channels, v, mask=channels < VALUE_DIM)


@triton.jit
def turn_pages(
    store,  # (pages, S, G, key dim + value dim)
    sources,  # (pages to turn,) int64
    targets,  # (pages to turn,) int64
    old,  # (pairs,) float32, radians a position of the stored keys
    new,  # (pairs,) float32, of the keys that are wanted
    ratio,
    first_position,
    page_stride,
    token_stride,
    head_stride,
    G: tl.constexpr,
    S: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    FIRST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """One token of one page: its keys turned by what the new angle exceeds the old one by, all else copied."""
    page = tl.program_id(0)
    token = tl.program_id(1)
    position = (first_position + page * S + token).to(tl.float32)
    source = store + tl.load(sources + page) * page_stride + token * token_stride
    target = store + tl.load(targets + page) * page_stride + token * token_stride
    heads = tl.arange(0, HEADS_BLOCK)[:, None]

    pairs = tl.arange(0, PAIRS_BLOCK)[None, :]
    there = (heads < G) & (pairs < PAIRS)
    a = FIRST + (2 * pairs if INTERLEAVED else pairs)
    b = a + (1 if INTERLEAVED else PAIRS)
    turned_new = position * tl.load(new + pairs, mask=pairs < PAIRS, other=0.0)
    turned_old = position * tl.load(old + pairs, mask=pairs < PAIRS, other=0.0)
    angle = turned_new - turned_old
    cos = tl.cos(angle) * ratio
    sin = tl.sin(angle) * ratio
    x = tl.load(source + heads * head_stride + a, mask=there, other=0.0).to(tl.float32)
    y = tl.load(source + heads * head_stride + b, mask=there, other=0.0).to(tl.float32)
    tl.store(target + heads * head_stride + a, (x * cos - y * sin).to(store.dtype.element_ty), mask=there)
    tl.store(target + heads * head_stride + b, (y * cos + x * sin).to(store.dtype.element_ty), mask=there)

    channels = tl.arange(0, WIDTH_BLOCK)[None, :]
    rest = (heads < G) & (channels < WIDTH) & ((channels < FIRST) | (channels >= FIRST + 2 * PAIRS))
    tl.store(
        target + heads * head_stride + channels,
        tl.load(source + heads * head_stride + channels, mask=rest, other=0.0),
        mask=rest,
    )
