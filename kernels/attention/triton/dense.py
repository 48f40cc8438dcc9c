"""Rows that are dense in one direction: global queries, which see every key, and always-visible keys (global tokens,
sinks), which every query sees; both only as causality and documents permit.

They are gathered by index and walk over slices ("splits") of the other side, so that one global token in a long
sequence occupies more than one processor. Splits leave fp32 partial results in PART, which the last two kernels merge
(by lse) or sum, and put where the rows belong.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, R = H // G, D head dim, E value dim; M queries and
N keys of a tile; `limit` the most rows that any sequence gathers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import d_scores, lse_in_log_2
from .forward import take
from .mask import LN2, LOG2E, kept, load_rows, permitted, scores, store_rows, unit_of


@triton.jit
def global_rows_kernel(
    Q,
    K,
    V,
    PART,
    PART_LSE,
    SLOPES,
    SEED,
    Q_POS,
    K_POS,
    Q_DOC,
    K_DOC,
    LENGTHS,
    ROWS,
    N_ROWS,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_g,
    v_b,
    v_s,
    v_g,
    T,
    S,
    H,
    limit,
    per_split,
    scale,
    softcap,
    dropout,
    R: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """PART [splits, B, limit, H, E] fp32 and PART_LSE [splits, B, limit, H]: rows ROWS[b, 0 … N_ROWS[b]) over the keys
    [split * per_split, (split + 1) * per_split). Merging adds the learned sink."""
    EXPLICIT: tl.constexpr = Q_POS is not None
    DOCUMENTS: tl.constexpr = Q_DOC is not None
    split = tl.program_id(1)
    b, h = tl.program_id(2) // H, tl.program_id(2) % H
    g = h // R
    n_rows = tl.load(N_ROWS + b)
    slot = tl.program_id(0)
    if slot * M >= n_rows:
        return
    n_keys = S
    if LENGTHS is not None:
        n_keys = tl.load(LENGTHS + b)
    at = slot * M + tl.arange(0, M)
    row_ok = at < n_rows
    rows = tl.load(ROWS + b * T + at, mask=row_ok, other=0)
    q_pos = rows + (S - T)
    if EXPLICIT:
        q_pos = tl.load(Q_POS + b * T + rows, mask=row_ok, other=-1)
    q_doc = rows
    if DOCUMENTS:
        q_doc = tl.load(Q_DOC + b * T + rows, mask=row_ok, other=-2)

    lo = split * per_split
    hi = tl.minimum(lo + per_split, n_keys)
    if CAUSAL and not EXPLICIT:
        hi = tl.minimum(hi, tl.max(tl.where(row_ok, q_pos, -1), 0) + 1)

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
    lanes = tl.arange(0, N)
    for start in tl.range(lo, hi, N):
        keys = start + lanes
        ok = keys < hi
        k_pos = keys
        if EXPLICIT:
            k_pos = tl.load(K_POS + b * S + keys, mask=ok, other=-1)
            ok = ok & (k_pos >= 0)
        k_doc = keys
        if DOCUMENTS:
            k_doc = tl.load(K_DOC + b * S + keys, mask=ok, other=-1)
        k = load_rows(K, keys.to(tl.int64) * k_s, ok, D, BLOCK_D, True)
        s, _ = scores(
            tl.dot(q, tl.trans(k), input_precision="ieee"),
            q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, ALIBI,
        )  # fmt: skip
        seen = permitted(q_pos[:, None], k_pos[None, :], q_doc[:, None], k_doc[None, :], CAUSAL, DOCUMENTS)
        s = tl.where(ok[None, :] & seen, s, float("-inf"))
        keep = True
        if DROPOUT:
            keep = kept(seed, dropout, head_rows[:, None], keys[None, :], S)
        v = load_rows(V, keys.to(tl.int64) * v_s, ok, E, BLOCK_E, True)
        acc, total, top = take(s, unit, v, acc, total, top, keep, scale_kept, True, DROPOUT)

    empty = top == float("-inf")
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), top * LN2 + tl.log(total))
    part = (split * (tl.num_programs(2) // H) + b).to(tl.int64) * limit + at
    store_rows(PART + h * E, part * H * E, row_ok, acc / total[:, None], E, BLOCK_E)
    tl.store(PART_LSE + part * H + h, lse, mask=row_ok)


@triton.jit
def global_rows_dq_kernel(
    Q,
    K,
    V,
    D_OUT,
    LSE,
    DELTA,
    PART,
    PART_SLOPE,
    SLOPES,
    SEED,
    Q_POS,
    K_POS,
    Q_DOC,
    K_DOC,
    LENGTHS,
    ROWS,
    N_ROWS,
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
    T,
    S,
    H,
    limit,
    per_split,
    scale,
    softcap,
    dropout,
    R: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """PART [splits, B, limit, H, D] fp32: dq of rows ROWS[b, 0 … N_ROWS[b]); PART_SLOPE [splits, B, limit, H]."""
    EXPLICIT: tl.constexpr = Q_POS is not None
    DOCUMENTS: tl.constexpr = Q_DOC is not None
    split = tl.program_id(1)
    b, h = tl.program_id(2) // H, tl.program_id(2) % H
    g = h // R
    n_rows = tl.load(N_ROWS + b)
    slot = tl.program_id(0)
    if slot * M >= n_rows:
        return
    n_keys = S
    if LENGTHS is not None:
        n_keys = tl.load(LENGTHS + b)
    at = slot * M + tl.arange(0, M)
    row_ok = at < n_rows
    rows = tl.load(ROWS + b * T + at, mask=row_ok, other=0)
    q_pos = rows + (S - T)
    if EXPLICIT:
        q_pos = tl.load(Q_POS + b * T + rows, mask=row_ok, other=-1)
    q_doc = rows
    if DOCUMENTS:
        q_doc = tl.load(Q_DOC + b * T + rows, mask=row_ok, other=-2)
    lo = split * per_split
    hi = tl.minimum(lo + per_split, n_keys)
    if CAUSAL and not EXPLICIT:
        hi = tl.minimum(hi, tl.max(tl.where(row_ok, q_pos, -1), 0) + 1)

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
    lse_2 = lse_in_log_2(LSE, flat, row_ok)
    delta = tl.load(DELTA + flat, mask=row_ok, other=0.0)
    dq = tl.zeros([M, BLOCK_D], tl.float32)
    d_slope = tl.zeros([M], tl.float32)
    lanes = tl.arange(0, N)
    for start in tl.range(lo, hi, N):
        keys = start + lanes
        ok = keys < hi
        k_pos = keys
        if EXPLICIT:
            k_pos = tl.load(K_POS + b * S + keys, mask=ok, other=-1)
            ok = ok & (k_pos >= 0)
        k_doc = keys
        if DOCUMENTS:
            k_doc = tl.load(K_DOC + b * S + keys, mask=ok, other=-1)
        k = load_rows(K, keys.to(tl.int64) * k_s, ok, D, BLOCK_D, True)
        v = load_rows(V, keys.to(tl.int64) * v_s, ok, E, BLOCK_E, True)
        s, tanh = scores(
            tl.dot(q, tl.trans(k), input_precision="ieee"),
            q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, ALIBI,
        )  # fmt: skip
        seen = permitted(q_pos[:, None], k_pos[None, :], q_doc[:, None], k_doc[None, :], CAUSAL, DOCUMENTS)
        s = tl.where(ok[None, :] & seen, s, float("-inf"))
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

    part = (split * (tl.num_programs(2) // H) + b).to(tl.int64) * limit + at
    store_rows(PART + h * D, part * H * D, row_ok, dq * scale, D, BLOCK_D)
    if ALIBI:
        tl.store(PART_SLOPE + part * H + h, d_slope, mask=row_ok)


@triton.jit
def always_keys_dkdv_kernel(
    Q,
    K,
    V,
    D_OUT,
    LSE,
    DELTA,
    PART_K,
    PART_V,
    SLOPES,
    SEED,
    Q_POS,
    K_POS,
    Q_DOC,
    K_DOC,
    ALWAYS,
    N_ALWAYS,
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
    T,
    S,
    H,
    limit,
    per_split,
    scale,
    softcap,
    dropout,
    R: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """PART_K [splits, B, limit, G, D], PART_V [splits, B, limit, G, E] fp32: dk, dv of ALWAYS[b, : N_ALWAYS[b]]."""
    EXPLICIT: tl.constexpr = Q_POS is not None
    DOCUMENTS: tl.constexpr = Q_DOC is not None
    G = H // R
    split = tl.program_id(1)
    b, g = tl.program_id(2) // G, tl.program_id(2) % G
    n_always = tl.load(N_ALWAYS + b)
    slot = tl.program_id(0)
    if slot * N >= n_always:
        return
    at = slot * N + tl.arange(0, N)
    key_ok = at < n_always
    keys = tl.load(ALWAYS + b * S + at, mask=key_ok, other=0)
    k_pos = keys
    if EXPLICIT:
        k_pos = tl.load(K_POS + b * S + keys, mask=key_ok, other=-1)
    k_doc = keys
    if DOCUMENTS:
        k_doc = tl.load(K_DOC + b * S + keys, mask=key_ok, other=-1)
    lo = split * per_split
    hi = tl.minimum(lo + per_split, T)
    if CAUSAL and not EXPLICIT:  # queries before the first of these keys do not see them
        lo = tl.maximum(lo, tl.min(tl.where(key_ok, k_pos, S), 0) - (S - T))

    b64 = b.to(tl.int64)
    keys_64 = keys.to(tl.int64)
    k = load_rows(K + b64 * k_b + g.to(tl.int64) * k_g, keys_64 * k_s, key_ok, D, BLOCK_D, True)
    v = load_rows(V + b64 * v_b + g.to(tl.int64) * v_g, keys_64 * v_s, key_ok, E, BLOCK_E, True)
    dk = tl.zeros([N, BLOCK_D], tl.float32)
    dv = tl.zeros([N, BLOCK_E], tl.float32)
    slope = 0.0
    unit = unit_of(scale, SOFTCAP, ALIBI)
    seed = 0
    scale_kept = 1.0
    if DROPOUT:
        seed = tl.load(SEED)
        scale_kept = 1.0 / (1.0 - dropout)
    lanes = tl.arange(0, M)
    for r in tl.range(0, R):
        h = g * R + r
        if ALIBI:
            slope = tl.load(SLOPES + h).to(tl.float32)
        head = (b * H + h).to(tl.int64) * T
        q_head, do_head = Q + b64 * q_b + h.to(tl.int64) * q_h, D_OUT + b64 * do_b + h.to(tl.int64) * do_h
        for start in tl.range(lo, hi, M):
            rows = start + lanes
            row_ok = rows < hi
            q_pos = rows + (S - T)
            if EXPLICIT:
                q_pos = tl.load(Q_POS + b * T + rows, mask=row_ok, other=-1)
            q_doc = rows
            if DOCUMENTS:
                q_doc = tl.load(Q_DOC + b * T + rows, mask=row_ok, other=-2)
            q = load_rows(q_head, rows.to(tl.int64) * q_t, row_ok, D, BLOCK_D, True)
            d_out = load_rows(do_head, rows.to(tl.int64) * do_t, row_ok, E, BLOCK_E, True)
            lse_2 = lse_in_log_2(LSE, head + rows, row_ok)
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

    part = (split * (tl.num_programs(2) // G) + b).to(tl.int64) * limit + at
    store_rows(PART_K + g * D, part * G * D, key_ok, dk * scale, D, BLOCK_D)
    store_rows(PART_V + g * E, part * G * E, key_ok, dv, E, BLOCK_E)


@triton.jit
def merge_rows_kernel(
    PART,
    PART_LSE,
    OUT,
    LSE,
    SINKS,
    ROWS,
    N_ROWS,
    o_b,
    o_t,
    o_h,
    B,
    T,
    H,
    limit,
    n_splits,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Merges the splits of one global row of one head by their lse and puts the row where it belongs."""
    at, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if at >= tl.load(N_ROWS + b):
        return
    row = tl.load(ROWS + b * T + at)
    columns = tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_E], tl.float32)
    total = 0.0
    top = float("-inf")
    for split in range(n_splits):
        part = ((split * B + b).to(tl.int64) * limit + at) * H + h
        lse = tl.load(PART_LSE + part)
        new_top = tl.maximum(top, lse)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, weight = tl.exp2((top - shift) * LOG2E), tl.exp2((lse - shift) * LOG2E)
        acc = acc * shrink + weight * tl.load(PART + part * E + columns, mask=columns < E, other=0.0)
        total = total * shrink + weight
        top = new_top
    empty = top == float("-inf")
    if SINKS is not None:
        sink = tl.load(SINKS + h).to(tl.float32)
        with_sink = tl.where(empty, 0.0, tl.maximum(top, sink))
        shrink = tl.exp2((top - with_sink) * LOG2E)
        total = total * shrink + tl.exp2((sink - with_sink) * LOG2E)
        acc = acc * shrink
        top = with_sink
    total = tl.where(empty, 1.0, total)
    out = OUT + b.to(tl.int64) * o_b + row.to(tl.int64) * o_t + h.to(tl.int64) * o_h + columns
    tl.store(out, (acc / total).to(OUT.dtype.element_ty), mask=columns < E)
    tl.store(LSE + (b * H + h).to(tl.int64) * T + row, tl.where(empty, float("-inf"), top + tl.log(total)))


@triton.jit
def sum_rows_kernel(
    PART,
    OUT,
    ROWS,
    N_ROWS,
    o_b,
    o_row,
    o_h,
    B,
    per_sequence,
    H,
    limit,
    n_splits,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """OUT[b, ROWS[b, at], h] = Σ over splits of PART [splits, B, limit, H, WIDTH]; ROWS has `per_sequence` columns."""
    at, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if at >= tl.load(N_ROWS + b):
        return
    row = tl.load(ROWS + b * per_sequence + at)
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(n_splits):
        part = ((split * B + b).to(tl.int64) * limit + at) * H + h
        total += tl.load(PART + part * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    out = OUT + b.to(tl.int64) * o_b + row.to(tl.int64) * o_row + h.to(tl.int64) * o_h + columns
    tl.store(out, total.to(OUT.dtype.element_ty), mask=columns < WIDTH)
