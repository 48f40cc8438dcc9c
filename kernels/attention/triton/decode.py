"""The decode kernels: a few queries over many keys, the keys cut into splits that run side by side, then joined.

Source: split-KV decoding ("Flash-Decoding", Dao, Haziza, Massa, Sizov 2023), with the query heads of a group as the
rows of one tile, so that a key is read once for all of them.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, R = H // G, D head dim, E value dim; M rows of a
tile, which are T × R pairs of query and head; N keys of a tile; `_2` in a name: in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mask import LN2, LOG2E, load_rows, scores, unit_of


@triton.jit
def key_tiles(first, last, n_keys, left, right, sinks, N: tl.constexpr, CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr,
              HAS_RIGHT: tl.constexpr, HAS_SINKS: tl.constexpr):  # fmt: skip
    """(tiles of sinks that lie before the others, first tile of the others, how many in all, and of these, counted from
    0, the range that every row sees whole) for queries at positions first … last over keys 0 … n_keys - 1."""
    end = n_keys
    lo, full_lo, full_hi = end * 0, end * 0, end
    if CAUSAL:
        end = tl.minimum(end, last + 1)
        full_hi = tl.minimum(full_hi, first + 1)
    hi = end
    if HAS_RIGHT:
        hi = tl.minimum(hi, last + right + 1)
        full_hi = tl.minimum(full_hi, first + right + 1)
    if HAS_LEFT:
        lo = tl.minimum(tl.maximum(first - left, 0), n_keys)
        full_lo = tl.minimum(tl.maximum(last - left, 0), n_keys)
    first_tile, end_tile, n_sinks = lo // N, (tl.maximum(hi, 0) + N - 1) // N, lo * 0
    if HAS_SINKS:
        sink_tiles = (tl.maximum(tl.minimum(end, sinks), 0) + N - 1) // N
        n_sinks = tl.minimum(sink_tiles, first_tile)
        end_tile = tl.maximum(end_tile, sink_tiles)
    n_tiles = n_sinks + tl.maximum(end_tile - first_tile, 0)
    shift = n_sinks - first_tile
    full = (full_lo + N - 1) // N + shift
    end_full = tl.maximum(full_hi, 0) // N + shift
    return (
        n_sinks.to(tl.int32),
        first_tile.to(tl.int32),
        n_tiles.to(tl.int32),
        full.to(tl.int32),
        end_full.to(tl.int32),
    )


@triton.jit
def pages_of(TABLE, tile, lanes, n_keys, N: tl.constexpr, PAGE: tl.constexpr):
    """The pages of a tile's keys: one number where the tile lies in one page, else one for each key. Of pages that hold
    no key nothing is read."""
    if PAGE % N == 0:
        pages = tl.load(TABLE + tile // (PAGE // N), mask=tile * N < n_keys, other=0)
    else:
        keys = tile * N + lanes
        pages = tl.load(TABLE + keys // PAGE, mask=keys < n_keys, other=0)
    return pages


@triton.jit
def places(tile, lanes, pages, x_b, x_s, N: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr):
    """(64-bit offset of the tile, offsets [N] within) of a tensor with strides x_b (of a page) and x_s (of a key)."""
    if PAGED:
        if PAGE % N == 0:
            base = pages.to(tl.int64) * x_b + (tile % (PAGE // N) * N).to(tl.int64) * x_s
            offsets = lanes * x_s
        else:
            base = tile.to(tl.int64) * 0
            offsets = pages.to(tl.int64) * x_b + ((tile * N + lanes) % PAGE) * x_s
    else:
        base = (tile * N).to(tl.int64) * x_s
        offsets = lanes * x_s
    return base, offsets


@triton.jit
def join(s, unit, v, v_scale, acc, total, top, MASKED: tl.constexpr, SCALED: tl.constexpr):
    """One step of the online softmax: scores s [M, N] (-inf where invisible) and values v [N, E] join the sums. `total`
    [M, N] is summed over its columns at the end: here that would make warps wait for each other."""
    new_top = tl.maximum(top, tl.max(s, 1) * unit)
    shift = new_top
    if MASKED:  # a row may have seen nothing yet; 0 keeps -inf - (-inf) from making NaN
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s * unit - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink[:, None] + p
    acc = acc * shrink[:, None]
    if SCALED:
        if v.dtype == tl.float16:  # a weight times a small scale may be too small for fp16: to the tile's largest scale
            most = tl.max(v_scale, 0)
            most = tl.where(most > 0, most, 1.0)
            p = p * (v_scale / most)[None, :]
            acc += tl.dot(p.to(v.dtype), v) * most
        else:
            acc = tl.dot((p * v_scale[None, :]).to(v.dtype), v, acc, input_precision="ieee")
    else:
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, new_top


@triton.jit
def finish(acc, total, top, sink_2, HAS_SINK: tl.constexpr):
    """(out, lse) of the sums; `sink_2`: a logit without a value, which rows that see a key count in."""
    empty = top == float("-inf")
    if HAS_SINK:
        with_sink = tl.where(empty, 0.0, tl.maximum(top, sink_2))
        shrink = tl.exp2(top - with_sink)
        total = total * shrink + tl.exp2(sink_2 - with_sink)
        acc = acc * shrink[:, None]
        top = with_sink
    total = tl.where(empty, 1.0, total)
    return acc / total[:, None], tl.where(empty, float("-inf"), top * LN2 + tl.log(total))


@triton.jit(do_not_specialize=["T", "S", "n_splits", "left", "right", "sinks"])
def decode_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    PART,
    K_SCALE,
    V_SCALE,
    SLOPES,
    SINKS,
    Q_POS,
    K_POS,
    LENGTHS,
    TABLE,
    MASK,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_g,
    v_b,
    v_s,
    v_g,
    ks_b,
    ks_s,
    ks_g,
    vs_b,
    vs_s,
    vs_g,
    q_pos_b,
    k_pos_b,
    table_b,
    mask_b,
    T,
    S,
    n_splits,
    left,
    right,
    sinks,
    scale,
    softcap,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    ONE_QUERY: tl.constexpr,
):
    """Grid: (splits × tiles of rows, G, B). PART: None where one split holds all keys; else the splits' sums
    [B, T, H, splits, E] and behind them their lse in units of log 2 [B, T, H, splits]."""
    PAGED: tl.constexpr = TABLE is not None
    SCALED: tl.constexpr = K_SCALE is not None
    MASKED: tl.constexpr = MASK is not None
    EXPLICIT: tl.constexpr = K_POS is not None
    FAR: tl.constexpr = 2**30 if Q_POS is None else 2**62

    split, g, b = tl.program_id(0) % n_splits, tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) // n_splits * M + tl.arange(0, M)
    row_ok = rows < T * R
    t, h = rows // R, g * R + rows % R
    lanes = tl.arange(0, N)

    # Where queries stand, and which tiles of keys they see.
    if Q_POS is not None:
        q_pos = tl.load(Q_POS + b * q_pos_b + t, mask=row_ok, other=0).to(tl.int64)
    else:
        q_pos = t + (S - T)
    n_keys = S
    if LENGTHS is not None:
        n_keys = tl.minimum(tl.maximum(tl.load(LENGTHS + b).to(tl.int64), 0), S).to(tl.int32)
    if EXPLICIT:
        n_sinks, first_tile, n_tiles, full, end_full = 0, 0, (n_keys + N - 1) // N, 0, 0
    else:
        earliest = tl.min(tl.where(row_ok, q_pos, FAR), 0)
        latest = tl.max(tl.where(row_ok, q_pos, -FAR), 0)
        if MASKED:
            n_sinks, first_tile, n_tiles, full, end_full = key_tiles(
                earliest, latest, n_keys, left, right, sinks, N, CAUSAL, False, False, False
            )
        else:
            n_sinks, first_tile, n_tiles, full, end_full = key_tiles(
                earliest, latest, n_keys, left, right, sinks, N, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_SINKS
            )
    # This split's share of them, and the wholly visible ones in it.
    at = (n_tiles.to(tl.int64) * split // n_splits).to(tl.int32)
    end = (n_tiles.to(tl.int64) * (split + 1) // n_splits).to(tl.int32)
    if EXPLICIT or MASKED:
        full, n_full = end, 0
    else:
        full = tl.minimum(tl.maximum(full, at), end)
        n_full = tl.maximum(tl.minimum(end_full, end) - full, 0)

    Q += b * q_b
    if PAGED:
        TABLE += b * table_b
    else:
        K += b * k_b
        V += b * v_b
    K += g.to(tl.int64) * k_g
    V += g.to(tl.int64) * v_g
    if SCALED:
        if not PAGED:
            K_SCALE += b * ks_b
            V_SCALE += b * vs_b
        K_SCALE += g.to(tl.int64) * ks_g
        V_SCALE += g.to(tl.int64) * vs_g
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + h, mask=row_ok, other=0).to(tl.float32)[:, None]
    unit = unit_of(scale, SOFTCAP, ALIBI)

    q = load_rows(Q, t.to(tl.int64) * q_t + h.to(tl.int64) * q_h, row_ok, D, BLOCK_D, True)
    acc = tl.zeros([M, BLOCK_E], tl.float32)
    total = tl.zeros([M, N], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)

    if not (EXPLICIT or MASKED):
        tile = first_tile + full - n_sinks
        pages = tile
        if PAGED:
            pages = pages_of(TABLE, tile, lanes, n_keys, N, PAGE)
        for _it in tl.range(0, n_full):
            base, offsets = places(tile, lanes, pages, k_b, k_s, N, PAGE, PAGED)
            k = load_rows(K + base, offsets, row_ok, D, BLOCK_D, False)
            base, offsets = places(tile, lanes, pages, v_b, v_s, N, PAGE, PAGED)
            v = load_rows(V + base, offsets, row_ok, E, BLOCK_E, False).to(q.dtype)
            qk = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
            v_scale = scale
            if SCALED:
                base, offsets = places(tile, lanes, pages, ks_b, ks_s, N, PAGE, PAGED)
                qk = qk * tl.load(K_SCALE + base + offsets).to(tl.float32)[None, :]
                base, offsets = places(tile, lanes, pages, vs_b, vs_s, N, PAGE, PAGED)
                v_scale = tl.load(V_SCALE + base + offsets).to(tl.float32)
            s, _tanh = scores(qk, q_pos[:, None], (tile * N + lanes)[None, :], scale, softcap, slope, SOFTCAP, ALIBI)
            acc, total, top = join(s, unit, v, v_scale, acc, total, top, False, SCALED)
            tile += 1
            if PAGED:  # one ahead, so that the pipeline does not wait for it
                pages = pages_of(TABLE, tile, lanes, n_keys, N, PAGE)

    turn = at + tl.where(at >= full, n_full, 0)
    tile = tl.where(turn < n_sinks, turn, first_tile + turn - n_sinks)
    pages = tile
    if PAGED:
        pages = pages_of(TABLE, tile, lanes, n_keys, N, PAGE)
    for it in tl.range(0, end - at - n_full):
        keys = tile * N + lanes
        ok = keys < n_keys
        base, offsets = places(tile, lanes, pages, k_b, k_s, N, PAGE, PAGED)
        k = load_rows(K + base, offsets, ok, D, BLOCK_D, True)
        base, offsets = places(tile, lanes, pages, v_b, v_s, N, PAGE, PAGED)
        v = load_rows(V + base, offsets, ok, E, BLOCK_E, True).to(q.dtype)
        k_pos = keys
        exists = ok
        if EXPLICIT:  # what lies in an empty slot may be NaN, which a weight of 0 does not keep out
            k_pos = tl.load(K_POS + b * k_pos_b + keys, mask=ok, other=-1).to(tl.int64)
            exists = k_pos >= 0
            v = tl.where(exists[:, None], v, 0.0)
        qk = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        v_scale = scale
        if SCALED:
            base, offsets = places(tile, lanes, pages, ks_b, ks_s, N, PAGE, PAGED)
            qk = qk * tl.load(K_SCALE + base + offsets, mask=ok, other=0).to(tl.float32)[None, :]
            base, offsets = places(tile, lanes, pages, vs_b, vs_s, N, PAGE, PAGED)
            v_scale = tl.load(V_SCALE + base + offsets, mask=ok, other=0).to(tl.float32)
            v_scale = tl.where(exists, v_scale, 0.0)
        s, _tanh = scores(qk, q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, ALIBI)
        if MASKED:
            if ONE_QUERY:
                seen = tl.load(MASK + b * mask_b + keys, mask=exists, other=0)[None, :] != 0
            else:
                cells = MASK + b * mask_b + t.to(tl.int64)[:, None] * S + keys[None, :]
                seen = tl.load(cells, mask=row_ok[:, None] & exists[None, :], other=0) != 0
        else:
            seen = exists[None, :]
            back = q_pos[:, None] - k_pos[None, :]
            near = seen
            if HAS_LEFT:
                near = near & (back <= left)
            if HAS_RIGHT:
                near = near & (back >= -right)
            if HAS_SINKS:
                near = near | (seen & (k_pos < sinks)[None, :])
            if CAUSAL:
                near = near & (back >= 0)
            seen = near
        s = tl.where(seen, s, float("-inf"))
        acc, total, top = join(s, unit, v, v_scale, acc, total, top, True, SCALED)
        turn = at + it + 1
        turn += tl.where(turn >= full, n_full, 0)
        tile = tl.where(turn < n_sinks, turn, first_tile + turn - n_sinks)
        if PAGED:
            pages = pages_of(TABLE, tile, lanes, n_keys, N, PAGE)

    columns = tl.arange(0, BLOCK_E)
    total = tl.sum(total, 1)
    if PART is None:
        sink_2 = total
        if SINKS is not None:
            sink_2 = tl.load(SINKS + h, mask=row_ok, other=0).to(tl.float32) * LOG2E
        out, lse = finish(acc, total, top, sink_2, SINKS is not None)
        place = (b * T + t) * H + h
        out_at = OUT + place[:, None] * E + columns[None, :]
        tl.store(out_at, out.to(OUT.dtype.element_ty), mask=row_ok[:, None] & (columns[None, :] < E))
        tl.store(LSE + (b * H + h) * T + t, lse, mask=row_ok)
    else:
        empty = top == float("-inf")
        total = tl.where(empty, 1.0, total)
        place = ((b * T + t) * H + h) * n_splits + split
        kept = (row_ok & (top != float("-inf")))[:, None] & (columns[None, :] < E)  # nobody reads what is empty
        tl.store(PART + place[:, None] * E + columns[None, :], acc / total[:, None], mask=kept)
        n_rows = tl.num_programs(2).to(tl.int64) * T * H * n_splits
        lse_2 = tl.where(empty, float("-inf"), top + tl.log2(total))
        tl.store(PART + n_rows * E + place, lse_2, mask=row_ok)


@triton.jit(do_not_specialize=["T", "n_splits"])
def join_splits_kernel(
    PART,
    OUT,
    LSE,
    SINKS,
    T,
    n_splits,
    H: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: (T × H, B). The splits of one row, in order, by their lse; SPLITS ≥ n_splits."""
    row, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, h = row // H, row % H
    place = b * T * H + row
    lse_at = PART + (tl.num_programs(1).to(tl.int64) * T * H * E + place) * n_splits
    each = tl.arange(0, SPLITS)
    lse_2 = tl.load(lse_at + each, mask=each < n_splits, other=float("-inf"))
    top = tl.max(lse_2, 0)
    empty = top == float("-inf")
    if SINKS is not None:  # a logit without a value, counted once
        sink_2 = tl.load(SINKS + h).to(tl.float32) * LOG2E
        top = tl.where(empty, top, tl.maximum(top, sink_2))
    shift = tl.where(empty, 0.0, top)
    total = tl.sum(tl.exp2(lse_2 - shift), 0)
    if SINKS is not None:
        total += tl.exp2(sink_2 - shift)
    total = tl.where(empty, 1.0, total)

    columns = tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_E], tl.float32)
    for first in tl.range(0, n_splits, CHUNK):
        some = first + tl.arange(0, CHUNK)
        weight = tl.exp2(tl.load(lse_at + some, mask=some < n_splits, other=float("-inf")) - shift)
        part_at = PART + (place * n_splits + some)[:, None] * E + columns[None, :]
        part = tl.load(part_at, mask=(weight > 0)[:, None] & (columns[None, :] < E), other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
    tl.store(OUT + place * E + columns, (acc / total).to(OUT.dtype.element_ty), mask=columns < E)
    lse = tl.where(empty, float("-inf"), shift * LN2 + tl.log(total))
    tl.store(LSE + (b * H + h) * T + t, lse)
