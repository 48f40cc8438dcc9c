"""The backward kernels: dq by tiles of queries, dk and dv by tiles of keys; both recompute the weights from the lse.

Nothing is added atomically, so gradients are deterministic; dk and dv of a key/value head are summed over its group of
query heads inside the program.

    P = exp(s - lse)      dP = dO · Vᵀ      dS = P ∘ (dP - delta)      delta = rowsum(dO ∘ O) - dlse
    dQ = scale · dS · K   dK = scale · dSᵀ · Q   dV = Pᵀ · dO

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 2, with the softmax scale that it omits); dropout and
its replay from FlashAttention (Dao et al. 2022, arXiv 2205.14135, algorithm 4).

Legend: B batch, T queries, S keys, H query heads, G key/value heads, R = H // G, D head dim, E value dim; M rows of a
tile of queries, N keys of a tile; `_2` in a name: in units of log 2.

Global tokens and sinks are dense in one direction: a global query sees all keys, an always-visible key is seen by all
queries. `dense.py` owns those rows and keys; what it finds replaces what the kernels here left there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mask import (
    FAR,
    LOG2E,
    kept,
    key_range,
    load_rows,
    neighbours,
    permitted,
    query_range,
    residue_class,
    scores,
    store_rows,
    tile_at,
    tile_range,
    unit_of,
)


@triton.jit
def d_scores(
    s, unit, tanh, dp, lse_2, delta, keep, scale_kept,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """(weights after dropout, gradient of the biased scores, gradient of the raw scaled products)."""
    p = tl.exp2(s * unit - lse_2)
    kept_p = p
    if DROPOUT:
        kept_p = tl.where(keep, p * scale_kept, 0.0)
        dp = tl.where(keep, dp * scale_kept, 0.0)
    ds = p * (dp - delta)
    if MASKED:  # a score may be anything where it is invisible, and its weight is 0: keep 0 · inf out
        ds = tl.where(s == float("-inf"), 0.0, ds)
    raw = ds
    if SOFTCAP:
        raw = ds * (1.0 - tanh * tanh)
    return kept_p, ds, raw


@triton.jit
def lse_in_log_2(LSE, offsets, ok):
    """lse in units of log 2; +inf, which makes every weight 0, for rows that see nothing or are not there."""
    lse = tl.load(LSE + offsets, mask=ok, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def dq_kernel(
    Q,
    K,
    V,
    OUT,
    D_OUT,
    LSE,
    D_LSE,
    DELTA,
    DQ,
    D_SLOPE,
    SLOPES,
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
    do_b,
    do_t,
    do_h,
    dq_b,
    dq_t,
    dq_h,
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
    """Also writes DELTA [B, H, T] for the other kernels and, with ALiBi, D_SLOPE [B, H, T], each row's share of the
    slope's gradient. Walks as forward_kernel does."""
    EXPLICIT: tl.constexpr = Q_POS is not None
    DOCUMENTS: tl.constexpr = Q_DOC is not None
    LISTED: tl.constexpr = LISTS is not None

    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    if LISTED:
        LISTS += tl.program_id(0) * list_width
        slot = tl.load(LISTS)
    h, b = tl.program_id(1), tl.program_id(2)
    g = h // R
    n_keys = S
    if LENGTHS is not None:
        n_keys = tl.load(LENGTHS + b)
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

    if LISTED:
        n_partial, n_full = tl.load(LISTS + 1), tl.load(LISTS + 2)
        first, first_full, end_full = 0, n_partial, 0
    else:
        if EXPLICIT:
            lo, full_lo, full_hi, hi = 0, 0, 0, n_k
        else:
            lo, full_lo, full_hi, hi = key_range(slot * M, M, n_q, n_k, shift, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
        if DOCUMENTS:
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

    b64 = b.to(tl.int64)
    rows_64 = rows.to(tl.int64)
    flat = (b * H + h).to(tl.int64) * T + rows
    K += b64 * k_b + g.to(tl.int64) * k_g
    V += b64 * v_b + g.to(tl.int64) * v_g
    slope = 0.0
    unit = unit_of(scale, SOFTCAP, ALIBI)
    if ALIBI:
        slope = tl.load(SLOPES + h).to(tl.float32)
    seed = 0
    scale_kept = 1.0
    if DROPOUT:
        seed = tl.load(SEED)
        scale_kept = 1.0 / (1.0 - dropout)

    q = load_rows(Q + b64 * q_b + h.to(tl.int64) * q_h, rows_64 * q_t, row_ok, D, BLOCK_D, True)
    d_out = load_rows(D_OUT + b64 * do_b + h.to(tl.int64) * do_h, rows_64 * do_t, row_ok, E, BLOCK_E, True)
    out = load_rows(OUT + b64 * o_b + h.to(tl.int64) * o_h, rows_64 * o_t, row_ok, E, BLOCK_E, True)
    delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1) - tl.load(D_LSE + flat, mask=row_ok, other=0.0)
    tl.store(DELTA + flat, delta, mask=row_ok)
    lse_2 = lse_in_log_2(LSE, flat, row_ok)
    dq = tl.zeros([M, BLOCK_D], tl.float32)
    d_slope = tl.zeros([M], tl.float32)

    if ALWAYS is not None:
        n_always = tl.load(N_ALWAYS + b)
        for it in tl.range(0, (n_always + N - 1) // N):
            at = it * N + tl.arange(0, N)
            ok = at < n_always
            keys = tl.load(ALWAYS + b * S + at, mask=ok, other=0)
            k_pos = keys
            if EXPLICIT:
                k_pos = tl.load(K_POS + b * S + keys, mask=ok, other=-1)
            k_doc = keys
            if DOCUMENTS:
                k_doc = tl.load(K_DOC + b * S + keys, mask=ok, other=-1)
            k = load_rows(K, keys.to(tl.int64) * k_s, ok, D, BLOCK_D, True)
            v = load_rows(V, keys.to(tl.int64) * v_s, ok, E, BLOCK_E, True)
            s, tanh = scores(
                tl.dot(q, tl.trans(k), input_precision="ieee"),
                q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, ALIBI,
            )  # fmt: skip
            near = neighbours(
                q_pos[:, None], k_pos[None, :], left, right, dilation, LAYOUT, q_block, kv_block, q_blocks, kv_blocks,
                HAS_LEFT, HAS_RIGHT, MODULO or STRIDED,
            )  # fmt: skip
            seen = permitted(q_pos[:, None], k_pos[None, :], q_doc[:, None], k_doc[None, :], CAUSAL, DOCUMENTS)
            s = tl.where(ok[None, :] & seen & (near == 0), s, float("-inf"))
            dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")
            keep = True
            if DROPOUT:
                keep = kept(seed, dropout, flat[:, None], keys[None, :], S)
            _, ds, raw = d_scores(
                s, unit, tanh, dp, lse_2[:, None], delta[:, None], keep, scale_kept, True, SOFTCAP, DROPOUT
            )
            if ALIBI:
                d_slope -= tl.sum(ds * tl.abs(q_pos[:, None] - k_pos[None, :]).to(tl.float32), 1)
            dq = tl.dot(raw.to(k.dtype), k, dq, input_precision="ieee")

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
        v = load_rows(V + base * v_s, v_offsets, ok, E, BLOCK_E, True)
        s, tanh = scores(
            tl.dot(q, tl.trans(k), input_precision="ieee"),
            q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, ALIBI,
        )  # fmt: skip
        near = neighbours(
            q_pos[:, None], k_pos[None, :], left, right, dilation, LAYOUT, q_block, kv_block, q_blocks, kv_blocks,
            HAS_LEFT, HAS_RIGHT, MODULO,
        )  # fmt: skip
        seen = permitted(q_pos[:, None], k_pos[None, :], q_doc[:, None], k_doc[None, :], CAUSAL, DOCUMENTS)
        s = tl.where(ok[None, :] & near & seen, s, float("-inf"))
        dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")
        keep = True
        if DROPOUT:
            keep = kept(seed, dropout, flat[:, None], keys[None, :], S)
        _, ds, raw = d_scores(
            s, unit, tanh, dp, lse_2[:, None], delta[:, None], keep, scale_kept, True, SOFTCAP, DROPOUT
        )
        if ALIBI:
            d_slope -= tl.sum(ds * tl.abs(q_pos[:, None] - k_pos[None, :]).to(tl.float32), 1)
        dq = tl.dot(raw.to(k.dtype), k, dq, input_precision="ieee")

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
        v = load_rows(V + base * v_s, v_offsets, row_ok, E, BLOCK_E, False)
        s, tanh = scores(
            tl.dot(q, tl.trans(k), input_precision="ieee"),
            q_pos[:, None], keys[None, :], scale, softcap, slope, SOFTCAP, ALIBI,
        )  # fmt: skip
        dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")
        keep = True
        if DROPOUT:
            keep = kept(seed, dropout, flat[:, None], keys[None, :], S)
        _, ds, raw = d_scores(
            s, unit, tanh, dp, lse_2[:, None], delta[:, None], keep, scale_kept, False, SOFTCAP, DROPOUT
        )
        if ALIBI:
            d_slope -= tl.sum(ds * tl.abs(q_pos[:, None] - keys[None, :]).to(tl.float32), 1)
        dq = tl.dot(raw.to(k.dtype), k, dq, input_precision="ieee")

    if IS_GLOBAL is not None:  # these rows belong to dense.global_rows_dq_kernel; their delta, above, is right
        row_ok = row_ok & (tl.load(IS_GLOBAL + b * T + rows, mask=row_ok, other=1) == 0)
    store_rows(DQ + b64 * dq_b + h.to(tl.int64) * dq_h, rows_64 * dq_t, row_ok, dq * scale, D, BLOCK_D)
    if ALIBI:
        tl.store(D_SLOPE + flat, d_slope, mask=row_ok)


@triton.jit
def _head(Q, D_OUT, SLOPES, b, h, q_b, q_h, do_b, do_h, T, H, ALIBI: tl.constexpr):
    """Where a head's numbers [B, H, T] and its rows of q and dO begin, and its slope."""
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + h).to(tl.float32)
    b64 = b.to(tl.int64)
    return (b64 * H + h) * T, Q + b64 * q_b + h.to(tl.int64) * q_h, D_OUT + b64 * do_b + h.to(tl.int64) * do_h, slope


@triton.jit
def dkdv_kernel(
    Q,
    K,
    V,
    D_OUT,
    LSE,
    DELTA,
    DK,
    DV,
    SLOPES,
    SEED,
    Q_POS,
    K_POS,
    Q_DOC,
    K_DOC,
    K_SPAN,
    LENGTHS,
    LAYOUT,
    LISTS,
    ROWS,
    N_ROWS,
    ROW_LSE,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_g,
    v_b,
    v_s,
    v_g,
    do_b,
    do_t,
    do_h,
    dk_b,
    dk_s,
    dk_g,
    dv_b,
    dv_s,
    dv_g,
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
    """LSE is +inf at global rows, which join through ROWS with ROW_LSE. Tiles are transposed: keys × queries."""
    EXPLICIT: tl.constexpr = Q_POS is not None
    DOCUMENTS: tl.constexpr = Q_DOC is not None
    LISTED: tl.constexpr = LISTS is not None

    slot = tl.program_id(0)  # under causality the first tiles are seen by most queries
    if LISTED:
        LISTS += tl.program_id(0) * list_width
        slot = tl.load(LISTS)
    g, b = tl.program_id(1), tl.program_id(2)
    n_keys = S
    if LENGTHS is not None:
        n_keys = tl.load(LENGTHS + b)
    step = 1
    if STRIDED:
        step = dilation
        residue, slot = slot % dilation, slot // dilation
        first_row, n_q, n_slots, shift = residue_class(residue, dilation, T, S)
        n_k = (tl.maximum(n_keys - residue, 0) + dilation - 1) // dilation
    else:
        residue, first_row, n_q, n_slots, n_k, shift = 0, 0, T, S, n_keys, S - T
    units = slot * N + tl.arange(0, N)
    key_ok = units < n_k
    keys = residue + units * step
    k_pos = keys
    if EXPLICIT:
        k_pos = tl.load(K_POS + b * S + keys, mask=key_ok, other=-1)
        key_ok = key_ok & (k_pos >= 0)
    k_doc = keys
    if DOCUMENTS:
        k_doc = tl.load(K_DOC + b * S + keys, mask=key_ok, other=-1)

    if LISTED:
        n_partial, n_full = tl.load(LISTS + 1), tl.load(LISTS + 2)
        first, first_full, end_full = 0, n_partial, 0
    else:
        if EXPLICIT:
            lo, full_lo, full_hi, hi = 0, 0, 0, n_q
        else:
            lo, full_lo, full_hi, hi = query_range(
                slot * N, N, n_q, n_k, shift, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT
            )
        if DOCUMENTS:
            span = K_SPAN + (b * S + keys) * 4
            doc_lo = tl.min(tl.load(span, mask=key_ok, other=FAR), 0)
            doc_full_lo = tl.max(tl.load(span + 1, mask=key_ok, other=0), 0)
            doc_full_hi = tl.min(tl.load(span + 2, mask=key_ok, other=FAR), 0)
            doc_hi = tl.max(tl.load(span + 3, mask=key_ok, other=0), 0)
            if STRIDED:
                doc_lo = (tl.maximum(doc_lo - first_row, 0) + step - 1) // step
                doc_full_lo = (tl.maximum(doc_full_lo - first_row, 0) + step - 1) // step
                doc_full_hi = (tl.maximum(doc_full_hi - first_row, 0) + step - 1) // step
                doc_hi = (tl.maximum(doc_hi - first_row, 0) + step - 1) // step
            lo, full_lo = tl.maximum(lo, doc_lo), tl.maximum(full_lo, doc_full_lo)
            full_hi, hi = tl.minimum(full_hi, doc_full_hi), tl.minimum(hi, doc_hi)
        first, first_full, end_full, end = tile_range(lo, full_lo, full_hi, hi, M)
        n_partial, n_full = first_full - first + end - end_full, end_full - first_full

    b64 = b.to(tl.int64)
    keys_64 = keys.to(tl.int64)
    k = load_rows(K + b64 * k_b + g.to(tl.int64) * k_g, keys_64 * k_s, key_ok, D, BLOCK_D, True)
    v = load_rows(V + b64 * v_b + g.to(tl.int64) * v_g, keys_64 * v_s, key_ok, E, BLOCK_E, True)
    dk = tl.zeros([N, BLOCK_D], tl.float32)
    dv = tl.zeros([N, BLOCK_E], tl.float32)
    seed = 0
    scale_kept = 1.0
    if DROPOUT:
        seed = tl.load(SEED)
        scale_kept = 1.0 / (1.0 - dropout)
    unit = unit_of(scale, SOFTCAP, ALIBI)
    lanes = tl.arange(0, M)
    q_offsets, do_offsets = lanes * (step * q_t), lanes * (step * do_t)

    # One loop over heads and tiles together: a short window would drain the pipeline at every head. Its prologue
    # divides by the count before it is known that there is a first visit. From a division by what may be zero LLVM
    # concludes that it never is, and copies a first tile without asking, from behind the end of q and dO where there is
    # none. So the divisors are at least 1.

    if ROWS is not None:  # global queries see every key that causality and documents permit
        n_rows = tl.load(N_ROWS + b)
        n_steps = (n_rows + M - 1) // M
        some_steps = tl.maximum(n_steps, 1)
        for visit in tl.range(0, R * n_steps):
            h, it = g * R + visit // some_steps, visit % some_steps
            head, q_head, do_head, slope = _head(Q, D_OUT, SLOPES, b, h, q_b, q_h, do_b, do_h, T, H, ALIBI)
            at = it * M + lanes
            row_ok = at < n_rows
            rows = tl.load(ROWS + b * T + at, mask=row_ok, other=0)
            q_pos = rows + (S - T)
            if EXPLICIT:
                q_pos = tl.load(Q_POS + b * T + rows, mask=row_ok, other=-1)
            q_doc = rows
            if DOCUMENTS:
                q_doc = tl.load(Q_DOC + b * T + rows, mask=row_ok, other=-2)
            q = load_rows(q_head, rows.to(tl.int64) * q_t, row_ok, D, BLOCK_D, True)
            d_out = load_rows(do_head, rows.to(tl.int64) * do_t, row_ok, E, BLOCK_E, True)
            lse_2 = lse_in_log_2(ROW_LSE, head + rows, row_ok)
            delta = tl.load(DELTA + head + rows, mask=row_ok, other=0.0)
            s, tanh = scores(
                tl.dot(k, tl.trans(q), input_precision="ieee"),
                q_pos[None, :], k_pos[:, None], scale, softcap, slope, SOFTCAP, ALIBI,
            )  # fmt: skip
            seen = permitted(q_pos[None, :], k_pos[:, None], q_doc[None, :], k_doc[:, None], CAUSAL, DOCUMENTS)
            s = tl.where(key_ok[:, None] & seen, s, float("-inf"))
            dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")
            keep = True
            if DROPOUT:
                keep = kept(seed, dropout, (head + rows)[None, :], keys[:, None], S)
            p, _, raw = d_scores(
                s, unit, tanh, dp, lse_2[None, :], delta[None, :], keep, scale_kept, True, SOFTCAP, DROPOUT
            )
            dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
            dk = tl.dot(raw.to(q.dtype), q, dk, input_precision="ieee")

    listed = first
    if LISTED:
        listed = tl.load(LISTS + 3)
    some_partial = tl.maximum(n_partial, 1)
    for visit in tl.range(0, R * n_partial):
        h, it = g * R + visit // some_partial, visit % some_partial
        head, q_head, do_head, slope = _head(Q, D_OUT, SLOPES, b, h, q_b, q_h, do_b, do_h, T, H, ALIBI)
        tile = tile_at(it, listed, first, first_full, end_full, LISTED)
        if LISTED:  # one ahead, so that the pipeline does not wait for it
            listed = tl.load(LISTS + 3 + (visit + 1) % some_partial)
        row_ok = tile * M + lanes < n_q
        rows = first_row + (tile * M + lanes) * step
        if EXPLICIT:
            q_pos = tl.load(Q_POS + b * T + rows, mask=row_ok, other=-1)
        else:
            q_pos = rows + (S - T)
        q_doc = rows
        if DOCUMENTS:
            q_doc = tl.load(Q_DOC + b * T + rows, mask=row_ok, other=-2)
        base = first_row + (tile * M).to(tl.int64) * step
        q = load_rows(q_head + base * q_t, q_offsets, row_ok, D, BLOCK_D, True)
        d_out = load_rows(do_head + base * do_t, do_offsets, row_ok, E, BLOCK_E, True)
        lse_2 = lse_in_log_2(LSE, head + rows, row_ok)
        delta = tl.load(DELTA + head + rows, mask=row_ok, other=0.0)
        s, tanh = scores(
            tl.dot(k, tl.trans(q), input_precision="ieee"),
            q_pos[None, :], k_pos[:, None], scale, softcap, slope, SOFTCAP, ALIBI,
        )  # fmt: skip
        near = neighbours(
            q_pos[None, :], k_pos[:, None], left, right, dilation, LAYOUT, q_block, kv_block, q_blocks, kv_blocks,
            HAS_LEFT, HAS_RIGHT, MODULO,
        )  # fmt: skip
        seen = permitted(q_pos[None, :], k_pos[:, None], q_doc[None, :], k_doc[:, None], CAUSAL, DOCUMENTS)
        s = tl.where(key_ok[:, None] & near & seen, s, float("-inf"))
        dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")
        keep = True
        if DROPOUT:
            keep = kept(seed, dropout, (head + rows)[None, :], keys[:, None], S)
        p, _, raw = d_scores(
            s, unit, tanh, dp, lse_2[None, :], delta[None, :], keep, scale_kept, True, SOFTCAP, DROPOUT
        )
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
        dk = tl.dot(raw.to(q.dtype), q, dk, input_precision="ieee")

    if LISTED:
        listed = tl.load(LISTS + 3 + n_partial)
    some_full = tl.maximum(n_full, 1)
    for visit in tl.range(0, R * n_full):
        h, it = g * R + visit // some_full, visit % some_full
        head, q_head, do_head, slope = _head(Q, D_OUT, SLOPES, b, h, q_b, q_h, do_b, do_h, T, H, ALIBI)
        tile = first_full + it
        if LISTED:
            tile = listed
            listed = tl.load(LISTS + 3 + n_partial + (visit + 1) % some_full)
        rows = first_row + (tile * M + lanes) * step
        q_pos = rows + (S - T)
        base = first_row + (tile * M).to(tl.int64) * step
        q = load_rows(q_head + base * q_t, q_offsets, key_ok, D, BLOCK_D, False)
        d_out = load_rows(do_head + base * do_t, do_offsets, key_ok, E, BLOCK_E, False)
        lse = tl.load(LSE + head + rows)
        lse_2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
        delta = tl.load(DELTA + head + rows)
        s, tanh = scores(
            tl.dot(k, tl.trans(q), input_precision="ieee"),
            q_pos[None, :], k_pos[:, None], scale, softcap, slope, SOFTCAP, ALIBI,
        )  # fmt: skip
        dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")
        keep = True
        if DROPOUT:
            keep = kept(seed, dropout, (head + rows)[None, :], keys[:, None], S)
        p, _, raw = d_scores(
            s, unit, tanh, dp, lse_2[None, :], delta[None, :], keep, scale_kept, False, SOFTCAP, DROPOUT
        )
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
        dk = tl.dot(raw.to(q.dtype), q, dk, input_precision="ieee")

    slot_ok = units < n_slots  # slots without a key get zeros
    dk = tl.where(key_ok[:, None], dk, 0.0)
    dv = tl.where(key_ok[:, None], dv, 0.0)
    store_rows(DK + b64 * dk_b + g.to(tl.int64) * dk_g, keys_64 * dk_s, slot_ok, dk * scale, D, BLOCK_D)
    store_rows(DV + b64 * dv_b + g.to(tl.int64) * dv_g, keys_64 * dv_s, slot_ok, dv, E, BLOCK_E)
