"""The forward kernels: online softmax over the tiles of keys that a tile of queries can see.

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 1; its line 10 prints an inverse that does not belong).

Legend: B batch, T queries, S keys, H query heads, G key/value heads, R = H // G, D head dim, E value dim; M rows of a
tile of queries, N keys of a tile; `_2` in a name: in units of log 2.

The kernel owns the ordinary rows and walks over keys in three loops: keys that are visible from everywhere but lie
outside the row's neighbourhood (sinks, global tokens; gathered by index), tiles that are partly visible (masked), tiles
that are wholly visible (no mask is computed). The rows of global queries are `dense.py`'s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mask import (
    FAR,
    LN2,
    LOG2E,
    kept,
    key_range,
    load_rows,
    neighbours,
    permitted,
    residue_class,
    scores,
    store_rows,
    tile_at,
    tile_range,
    unit_of,
)


@triton.jit
def take(s, unit, v, acc, total, top, keep, scale_kept, MASKED: tl.constexpr, DROPOUT: tl.constexpr):
    """One step of the online softmax: scores s [M, N] (-inf where invisible) and values v [N, E] join the sums."""
    new_top = tl.maximum(top, tl.max(s, 1) * unit)
    if MASKED:  # a row may have seen nothing yet; 0 keeps -inf - (-inf) from making NaN
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        shift = new_top
    p = tl.exp2(s * unit - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(keep, p * scale_kept, 0.0)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, new_top


@triton.jit
def forward_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    SLOPES,
    SINKS,
    SEED,
    Q_POS,
    K_POS,
    Q_DOC,
    K_DOC,
    Q_SPAN,
    LENGTHS,
    LAYOUT,
    LISTS,
    ALWAYS,
    N_ALWAYS,
    IS_GLOBAL,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_g,
    v_b,
    v_s,
    v_g,
    o_b,
    o_t,
    o_h,
    T,
    S,
    H,
    scale,
    softcap,
    dropout,
    left,
    right,
    dilation,
    q_block,
    kv_block,
    q_blocks,
    kv_blocks,
    list_width,
    R: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    STRIDED: tl.constexpr,
    MODULO: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    EXPLICIT: tl.constexpr = Q_POS is not None
    DOCUMENTS: tl.constexpr = Q_DOC is not None
    LISTED: tl.constexpr = LISTS is not None

    # Longest rows first: under causality the last tiles see most keys.
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    if LISTED:
        LISTS += tl.program_id(0) * list_width
        slot = tl.load(LISTS)
    h, b = tl.program_id(1), tl.program_id(2)
    g = h // R
    n_keys = S
    if LENGTHS is not None:
        n_keys = tl.load(LENGTHS + b)

    # Which rows, and in which units the keys are counted: of a dilated window, one residue class.
    step = 1
    if STRIDED:
        step = dilation
        residue, slot = slot % dilation, slot // dilation
        first_row, n_q, n_k, shift = residue_class(residue, dilation, T, S)
        n_k = (tl.maximum(n_keys - residue, 0) + dilation - 1) // dilation
    else:
        residue, first_row, n_q, n_k, shift = 0, 0, T, n_keys, S - T
    units = slot * M + tl.arange(0, M)
    row_ok = units < n_q
    rows = first_row + units * step
    if EXPLICIT:
        q_pos = tl.load(Q_POS + b * T + rows, mask=row_ok, other=-1)
    else:
        q_pos = rows + (S - T)
    q_doc = rows
    if DOCUMENTS:
        q_doc = tl.load(Q_DOC + b * T + rows, mask=row_ok, other=-2)

    # Which tiles of keys.
    if LISTED:
        n_partial, n_full = tl.load(LISTS + 1), tl.load(LISTS + 2)
        first, first_full, end_full = 0, n_partial, 0
    else:
        if EXPLICIT:
            lo, full_lo, full_hi, hi = 0, 0, 0, n_k
        else:
            lo, full_lo, full_hi, hi = key_range(slot * M, M, n_q, n_k, shift, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
        if DOCUMENTS:  # [first key, first of all-visible, end of all-visible, end] of each row's document
            span = Q_SPAN + (b * T + rows) * 4
            doc_lo = tl.min(tl.load(span, mask=row_ok, other=FAR), 0)
            doc_full_lo = tl.max(tl.load(span + 1, mask=row_ok, other=0), 0)
            doc_full_hi = tl.min(tl.load(span + 2, mask=row_ok, other=FAR), 0)
            doc_hi = tl.max(tl.load(span + 3, mask=row_ok, other=0), 0)
            if STRIDED:
                doc_lo = (tl.maximum(doc_lo - residue, 0) + step - 1) // step
                doc_full_lo = (tl.maximum(doc_full_lo - residue, 0) + step - 1) // step
                doc_full_hi = (tl.maximum(doc_full_hi - residue, 0) + step - 1) // step
                doc_hi = (tl.maximum(doc_hi - residue, 0) + step - 1) // step
            lo, full_lo = tl.maximum(lo, doc_lo), tl.maximum(full_lo, doc_full_lo)
            full_hi, hi = tl.minimum(full_hi, doc_full_hi), tl.minimum(hi, doc_hi)
        first, first_full, end_full, end = tile_range(lo, full_lo, full_hi, hi, N)
        n_partial, n_full = first_full - first + end - end_full, end_full - first_full

    Q += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    K += b.to(tl.int64) * k_b + g.to(tl.int64) * k_g
    V += b.to(tl.int64) * v_b + g.to(tl.int64) * v_g
    slope = 0.0
    unit = unit_of(scale, SOFTCAP, ALIBI)
    if ALIBI:
        slope = tl.load(SLOPES + h).to(tl.float32)
    seed = 0
    head_rows = rows
    scale_kept = 1.0
    if DROPOUT:
        seed = tl.load(SEED)
        head_rows = (b * H + h).to(tl.int64) * T + rows
        scale_kept = 1.0 / (1.0 - dropout)

    q = load_rows(Q, rows.to(tl.int64) * q_t, row_ok, D, BLOCK_D, True)
    acc = tl.zeros([M, BLOCK_E], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)

    if ALWAYS is not None:
        n_always = tl.load(N_ALWAYS + b)
        for it in tl.range(0, (n_always + N - 1) // N):
            at = it * N + tl.arange(0, N)
            ok = at < n_always
            keys = tl.load(ALWAYS + b * S + at, mask=ok, other=0)
            k = load_rows(K, keys.to(tl.int64) * k_s, ok, D, BLOCK_D, True)
            k_pos = keys
            if EXPLICIT:
                k_pos = tl.load(K_POS + b * S + keys, mask=ok, other=-1)
            k_doc = keys
            if DOCUMENTS:
                k_doc = tl.load(K_DOC + b * S + keys, mask=ok, other=-1)
            s, _ = scores(
                tl.dot(q, tl.trans(k), input_precision="ieee"),
                q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, ALIBI,
            )  # fmt: skip
            near = neighbours(
                q_pos[:, None], k_pos[None, :], left, right, dilation, LAYOUT, q_block, kv_block, q_blocks, kv_blocks,
                HAS_LEFT, HAS_RIGHT, MODULO or STRIDED,
            )  # fmt: skip
            seen = permitted(q_pos[:, None], k_pos[None, :], q_doc[:, None], k_doc[None, :], CAUSAL, DOCUMENTS)
            s = tl.where(ok[None, :] & seen & (near == 0), s, float("-inf"))
            keep = True
            if DROPOUT:
                keep = kept(seed, dropout, head_rows[:, None], keys[None, :], S)
            v = load_rows(V, keys.to(tl.int64) * v_s, ok, E, BLOCK_E, True)
            acc, total, top = take(s, unit, v, acc, total, top, keep, scale_kept, True, DROPOUT)

    # Addresses: a 64-bit base for each tile plus the same 32-bit offsets in all of them.
    if STRIDED:
        K += residue.to(tl.int64) * k_s
        V += residue.to(tl.int64) * v_s
    lanes = tl.arange(0, N)
    k_offsets, v_offsets = lanes * (step * k_s), lanes * (step * v_s)

    listed = first
    if LISTED:
        listed = tl.load(LISTS + 3)
    for it in tl.range(0, n_partial):
        tile = tile_at(it, listed, first, first_full, end_full, LISTED)
        if LISTED:  # one ahead, so that the pipeline does not wait for it
            listed = tl.load(LISTS + 3 + it + 1)
        ok = tile * N + lanes < n_k
        keys = residue + (tile * N + lanes) * step
        k_pos = keys
        if EXPLICIT:
            k_pos = tl.load(K_POS + b * S + keys, mask=ok, other=-1)
            ok = ok & (k_pos >= 0)
        k_doc = keys
        if DOCUMENTS:
            k_doc = tl.load(K_DOC + b * S + keys, mask=ok, other=-1)
        base = (tile * N).to(tl.int64) * step
        k = load_rows(K + base * k_s, k_offsets, ok, D, BLOCK_D, True)
        s, _ = scores(
            tl.dot(q, tl.trans(k), input_precision="ieee"),
            q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, ALIBI,
        )  # fmt: skip
        near = neighbours(
            q_pos[:, None], k_pos[None, :], left, right, dilation, LAYOUT, q_block, kv_block, q_blocks, kv_blocks,
            HAS_LEFT, HAS_RIGHT, MODULO,
        )  # fmt: skip
        seen = permitted(q_pos[:, None], k_pos[None, :], q_doc[:, None], k_doc[None, :], CAUSAL, DOCUMENTS)
        s = tl.where(ok[None, :] & near & seen, s, float("-inf"))
        keep = True
        if DROPOUT:
            keep = kept(seed, dropout, head_rows[:, None], keys[None, :], S)
        v = load_rows(V + base * v_s, v_offsets, ok, E, BLOCK_E, True)
        acc, total, top = take(s, unit, v, acc, total, top, keep, scale_kept, True, DROPOUT)

    if LISTED:
        listed = tl.load(LISTS + 3 + n_partial)
    for it in tl.range(0, n_full):
        tile = first_full + it
        if LISTED:
            tile = listed
            listed = tl.load(LISTS + 3 + n_partial + it + 1)
        keys = residue + (tile * N + lanes) * step
        base = (tile * N).to(tl.int64) * step
        k = load_rows(K + base * k_s, k_offsets, row_ok, D, BLOCK_D, False)
        s, _ = scores(
            tl.dot(q, tl.trans(k), input_precision="ieee"),
            q_pos[:, None], keys[None, :], scale, softcap, slope, SOFTCAP, ALIBI,
        )  # fmt: skip
        keep = True
        if DROPOUT:
            keep = kept(seed, dropout, head_rows[:, None], keys[None, :], S)
        v = load_rows(V + base * v_s, v_offsets, row_ok, E, BLOCK_E, False)
        acc, total, top = take(s, unit, v, acc, total, top, keep, scale_kept, False, DROPOUT)

    empty = top == float("-inf")
    if SINKS is not None:  # a logit without a value: it enlarges the denominator of rows that see a key
        sink_2 = tl.load(SINKS + h).to(tl.float32) * LOG2E
        with_sink = tl.where(empty, 0.0, tl.maximum(top, sink_2))
        shrink = tl.exp2(top - with_sink)
        total = total * shrink + tl.exp2(sink_2 - with_sink)
        acc = acc * shrink[:, None]
        top = with_sink
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), top * LN2 + tl.log(total))
    acc = acc / total[:, None]

    if IS_GLOBAL is not None:  # these rows belong to dense.global_rows_kernel
        row_ok = row_ok & (tl.load(IS_GLOBAL + b * T + rows, mask=row_ok, other=1) == 0)
    store_rows(OUT + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h, rows.to(tl.int64) * o_t, row_ok, acc, E, BLOCK_E)
    tl.store(LSE + (b * H + h).to(tl.int64) * T + rows, lse, mask=row_ok)
