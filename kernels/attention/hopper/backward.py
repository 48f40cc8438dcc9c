"""The backward kernels for Hopper (sm_90): dk and dv by tiles of keys, dq by tiles of queries. A producer warp loads by
TMA, two consumers of four warps do everything else; both kernels recompute the weights from the lse.

Nothing is added atomically, so gradients are deterministic; dk and dv of a key/value head are summed over its group of
query heads inside the program. The price is seven products a tile instead of five.

    P = exp(s - lse)      dP = dO · Vᵀ      dS = P ∘ (dP - delta)      delta = rowsum(dO ∘ O) - dlse
    dQ = scale · dS · K   dK = scale · dSᵀ · Q   dV = Pᵀ · dO

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 2); transposed scores, whose weights are left operands
from registers, and specialised warps from FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608).

Legend: B batch, T queries, S keys, H query heads, G key/value heads, R = H // G, D and E head dims (padded: what lies
beyond the tensors' own is read as zeros and not written); a consumer owns ROWS keys (dk, dv) or queries (dq); M rows of
a tile of queries, N keys of a tile of keys; `_2` in a name: in units of log 2.

A program's tiles of the other side are counted `it = 0 … n - 1`: first those in which something is hidden from
somebody, then those that are seen whole, for which no mask is computed. Queries that are not there, and those that see
nothing, have an lse of +inf here, so their weights are 0.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import ranges
from .forward import LOG2E, PRODUCER_REGISTERS, ROWS, hidden, key_tile, tile_range, visits

CONSUMERS: gl.constexpr = gl.constexpr(2)
STATS_ROWS: gl.constexpr = gl.constexpr(32)

query_range = gluon.jit(ranges.query_range)


# -- what both kernels read of a row -----------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["T", "H", "E", "rounded"])
def stats_kernel(
    OUT, D_OUT, LSE, D_LSE, STATS, o_b, o_t, o_h, do_b, do_t, do_h, T, H, E, rounded, WIDTH: gl.constexpr,
):  # fmt: skip
    """STATS [B · H, 2, rounded] fp32, `rounded` a multiple of all tiles: the lse in units of log 2, and -delta. Of rows
    that are not there +inf and 0, and an lse of +inf of those that see nothing. A program has STATS_ROWS rows of a
    head."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    n_tiles = rounded // STATS_ROWS
    head = gl.program_id(0) // n_tiles
    b = (head // H).to(gl.int64)
    h = (head % H).to(gl.int64)
    rows = gl.program_id(0) % n_tiles * STATS_ROWS + gl.arange(0, STATS_ROWS, gl.SliceLayout(1, layout))
    cols = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    there = rows < T
    mask = there[:, None] & (cols < E)[None, :]
    rows_64 = rows.to(gl.int64)
    out = gl.load(OUT + b * o_b + h * o_h + (rows_64 * o_t)[:, None] + cols[None, :], mask=mask, other=0.0)
    d_out = gl.load(D_OUT + b * do_b + h * do_h + (rows_64 * do_t)[:, None] + cols[None, :], mask=mask, other=0.0)
    row = head.to(gl.int64) * T + rows_64
    lse = gl.load(LSE + row, mask=there, other=float("inf"))
    delta = -gl.sum(out.to(gl.float32) * d_out.to(gl.float32), 1)
    if D_LSE is not None:
        delta = gl.load(D_LSE + row, mask=there, other=0.0) + delta
    stats = STATS + head.to(gl.int64) * 2 * rounded + rows_64
    gl.store(stats, gl.where(lse == -float("inf"), float("inf"), lse * LOG2E))
    gl.store(stats + rounded, delta)


# -- what both kernels compute -----------------------------------------------------------------------------------------


@gluon.jit
def place(n_tiles, n_heads, group, LAST_FIRST: gl.constexpr):
    """(tile, head) of this program: `group` heads at a time, which share the cache, and of these the longest first."""
    at = gl.program_id(0)
    begin = at // (group * n_tiles) * group
    size = gl.minimum(group, n_heads - begin)
    at -= begin * n_tiles
    tile = at // size
    if LAST_FIRST:
        tile = n_tiles - 1 - tile
    return tile, begin + at % size


@gluon.jit
def visitors(
    tile, b, SPANS, n_tiles, T, S, left, right,
    N: gl.constexpr, M: gl.constexpr, CAUSAL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """(first, n_before, first_full, end_full, n_partial, n) of the tiles of queries that see a tile of keys."""
    lo, full_lo, full_hi, hi = query_range(tile * N, N, T, S, S - T, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
    if DOCUMENTS:
        span = SPANS + (b * n_tiles + tile) * 4
        lo = gl.maximum(lo, gl.load(span))
        full_lo = gl.maximum(full_lo, gl.load(span + 1))
        full_hi = gl.minimum(full_hi, gl.load(span + 2))
        hi = gl.minimum(hi, gl.load(span + 3))
    first, first_full, end_full, end = tile_range(lo, full_lo, full_hi, hi, M)
    n_before = first_full - first
    n_partial = n_before + end - end_full
    return first, n_before, first_full, end_full, n_partial, n_partial + end_full - first_full


@gluon.jit
def scores(s, rows, cols, scale, softcap, slope, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr):
    """(scores, slope of the softcap) of raw products with positions `rows` and `cols`, one of queries, one of keys.
    Without softcap and ALiBi the scale waits to be fused into the exponent."""
    steep = s
    if SOFTCAP:
        x = s * (scale / softcap)
        shrunk = gl.exp2(gl.abs(x) * (-2.0 * LOG2E))
        tanh = (1.0 - shrunk) / (1.0 + shrunk)
        steep = 1.0 - tanh * tanh
        s = gl.where(x < 0, -tanh, tanh) * (softcap * LOG2E)
    if ALIBI:
        if not SOFTCAP:
            s = s * (scale * LOG2E)
        s = s - (slope * LOG2E) * gl.abs(rows[:, None] - cols[None, :]).to(gl.float32)
    return s, steep


@gluon.jit
def unseen(
    s, row, low, high, k_doc, cols, Q_DOC, b, T, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, DOCUMENTS: gl.constexpr
):  # fmt: skip
    """-inf where a key is not seen by a row: low <= row < high of the key, and of its document."""
    if HAS_LOW:
        s = gl.where(cols[None, :] >= (low - row)[:, None], s, -float("inf"))
    if HAS_HIGH:
        s = gl.where(cols[None, :] < (high - row)[:, None], s, -float("inf"))
    if DOCUMENTS:
        q_doc = gl.load(Q_DOC + b * T + row + cols, mask=row + cols < T, other=-1)
        s = gl.where(k_doc[:, None] == q_doc[None, :], s, -float("inf"))
    return s


# -- dk and dv ---------------------------------------------------------------------------------------------------------


@gluon.jit
def produce_queries(
    desc_q, desc_k, desc_v, desc_do, desc_stats, q_s, do_s, k_s, v_s, lse_s, delta_s, kv_full, full, empty,
    tile, b, g, H, R, rounded, first, n_before, first_full, end_full, n_partial, n,
    M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for c in gl.static_range(CONSUMERS):
        key = (tile * CONSUMERS + c) * ROWS
        mbarrier.expect(kv_full.index(c), desc_k.block_type.nbytes + desc_v.block_type.nbytes)
        tma.async_copy_global_to_shared(desc_k, [b, key, g, 0], kv_full.index(c), k_s.index(c))
        tma.async_copy_global_to_shared(desc_v, [b, key, g, 0], kv_full.index(c), v_s.index(c))
    at = 0
    for r in range(R):
        h = g * R + r
        stats = (b * H + h) * 2 * rounded
        for it in range(n):
            stage = at % STAGES
            free = ((at // STAGES) & 1) ^ 1
            row = key_tile(it, first, n_before, first_full, end_full, n_partial) * M
            mbarrier.wait(empty.index(stage), free)
            mbarrier.expect(
                full.index(stage),
                desc_q.block_type.nbytes + desc_do.block_type.nbytes + 2 * desc_stats.block_type.nbytes,
            )
            tma.async_copy_global_to_shared(desc_q, [b, row, h, 0], full.index(stage), q_s.index(stage))
            tma.async_copy_global_to_shared(desc_do, [b, row, h, 0], full.index(stage), do_s.index(stage))
            tma.async_copy_global_to_shared(desc_stats, [stats + row], full.index(stage), lse_s.index(stage))
            tma.async_copy_global_to_shared(
                desc_stats, [stats + rounded + row], full.index(stage), delta_s.index(stage)
            )
            at += 1


@gluon.jit
def consume_queries(
    q_s, do_s, k_s, v_s, lse_s, delta_s, kv_full, full, empty, desc_dk, desc_dv, Q_DOC, K_DOC,
    SLOPES, T, S, R, scale, softcap, left, right, tile, b, g, first, n_before, first_full, end_full, n_partial, n,
    CID: gl.constexpr, M: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, DOCUMENTS: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = desc_dk.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, E, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dk_layout, k_width=2)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dv_layout, k_width=2)
    cols_layout: gl.constexpr = gl.SliceLayout(0, s_layout)

    key = (tile * CONSUMERS + CID) * ROWS
    keys = key + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    cols = gl.arange(0, M, cols_layout)
    nothing = gl.zeros([ROWS, M], gl.float32, s_layout)
    unit = scale * LOG2E
    if SOFTCAP or ALIBI:
        unit = 1.0
    # Rows of queries that see a key: low <= row < high.
    low = keys
    high = keys
    if CAUSAL:
        low = keys - (S - T)
    elif HAS_RIGHT:
        low = keys - right - (S - T)
    if HAS_LEFT:
        high = keys + left + 1 - (S - T)
    k_doc = keys
    if DOCUMENTS:
        k_doc = gl.load(K_DOC + b * S + keys, mask=keys < S, other=-3)
    slope = 0.0
    if ALIBI:
        slope = gl.load(SLOPES + g * R).to(gl.float32)

    dk = gl.zeros([ROWS, D], gl.float32, dk_layout)
    dv = gl.zeros([ROWS, E], gl.float32, dv_layout)
    k = k_s.index(CID).reshape([ROWS, D])
    v = v_s.index(CID).reshape([ROWS, E])
    mbarrier.wait(kv_full.index(CID), 0)
    it = 0
    r = 0
    for at in range(R * n):
        stage = at % STAGES
        phase = (at // STAGES) & 1
        q = q_s.index(stage).reshape([M, D])
        d_out = do_s.index(stage).reshape([M, E])
        mbarrier.wait(full.index(stage), phase)
        s = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma(v, d_out.permute((1, 0)), nothing, use_acc=False, is_async=True)
        row = key_tile(it, first, n_before, first_full, end_full, n_partial) * M
        s = warpgroup_mma_wait(1, deps=(s,))
        s, steep = scores(s, keys, row + (S - T) + cols, scale, softcap, slope, SOFTCAP, ALIBI)
        if it < n_partial:
            s = unseen(s, row, low, high, k_doc, cols, Q_DOC, b, T, CAUSAL or HAS_RIGHT, HAS_LEFT, DOCUMENTS)
        lse_2 = lse_s.index(stage).load(cols_layout)
        p = gl.exp2(s * unit - lse_2[None, :])
        p_half = gl.convert_layout(p.to(dtype), p_layout)
        # Long since true: a branch, across which ptxas does not move the exponentials behind the wait that follows.
        mbarrier.wait(full.index(stage), phase)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        dv = warpgroup_mma(p_half, d_out, dv, is_async=True)
        delta = delta_s.index(stage).load(cols_layout)
        ds = p * (dp + delta[None, :])
        if SOFTCAP:
            ds = ds * steep
        ds_half = gl.convert_layout(ds.to(dtype), ds_layout)
        dk = warpgroup_mma(ds_half, q, dk, is_async=True)
        it += 1
        if it == n:
            it = 0
            r += 1
            if ALIBI:
                slope = gl.load(SLOPES + g * R + gl.minimum(r, R - 1)).to(gl.float32)
        # What wgmma still reads stays in its registers until it is done.
        dv, p_half, dk, ds_half = warpgroup_mma_wait(0, deps=(dv, p_half, dk, ds_half))
        mbarrier.arrive(empty.index(stage), count=1)

    # The keys and values have been read: their place takes the gradients.
    k.store((dk * scale).to(dtype))
    v.store(dv.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc_dk, [b, key, g, 0], k_s.index(CID))
    tma.async_copy_shared_to_global(desc_dv, [b, key, g, 0], v_s.index(CID))
    tma.store_wait(0)


# Sizes are not compiled in, nor whether 16 divides them: one kernel serves all lengths and numbers of heads.
@gluon.jit(do_not_specialize=["T", "S", "H", "G", "R", "left", "right", "n_tiles", "n_heads", "group", "rounded"])
def dkdv_kernel(
    desc_q, desc_k, desc_v, desc_do, desc_stats, desc_dk, desc_dv, SPANS, Q_DOC, K_DOC, SLOPES, T, S, H, G, R, scale,
    softcap, left, right, n_tiles, n_heads, group, rounded,
    M: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, DOCUMENTS: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """A program has CONSUMERS · ROWS keys of one key/value head; `n_heads` is B · G."""
    tile, head = place(n_tiles, n_heads, group, False)
    b = head // G
    g = head % G
    first, n_before, first_full, end_full, n_partial, n = visitors(
        tile, b, SPANS, n_tiles, T, S, left, right, CONSUMERS * ROWS, M, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS
    )
    q_s = gl.allocate_shared_memory(desc_q.dtype, [STAGES, 1, M, 1, D], desc_q.layout)
    do_s = gl.allocate_shared_memory(desc_do.dtype, [STAGES, 1, M, 1, E], desc_do.layout)
    k_s = gl.allocate_shared_memory(desc_k.dtype, [CONSUMERS, 1, ROWS, 1, D], desc_k.layout)
    v_s = gl.allocate_shared_memory(desc_v.dtype, [CONSUMERS, 1, ROWS, 1, E], desc_v.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, M], desc_stats.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, M], desc_stats.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(kv_full.index(c), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    # warp_specialize takes constants only where they stand in its tuples.
    gl.warp_specialize(
        [
            (consume_queries, (
                q_s, do_s, k_s, v_s, lse_s, delta_s, kv_full, full, empty, desc_dk, desc_dv,
                Q_DOC, K_DOC, SLOPES, T, S, R, scale, softcap, left, right, tile, b, g, first, n_before, first_full,
                end_full, n_partial, n, 0, M, D, E, STAGES, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI,
            )),
            (consume_queries, (
                q_s, do_s, k_s, v_s, lse_s, delta_s, kv_full, full, empty, desc_dk, desc_dv,
                Q_DOC, K_DOC, SLOPES, T, S, R, scale, softcap, left, right, tile, b, g, first, n_before, first_full,
                end_full, n_partial, n, 1, M, D, E, STAGES, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI,
            )),
            (produce_queries, (
                desc_q, desc_k, desc_v, desc_do, desc_stats, q_s, do_s, k_s, v_s, lse_s, delta_s, kv_full, full, empty,
                tile, b, g, H, R, rounded, first, n_before, first_full, end_full,
                n_partial, n, M, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# -- dq ----------------------------------------------------------------------------------------------------------------


@gluon.jit
def produce_keys(
    desc_q, desc_k, desc_v, desc_do, q_s, do_s, k_s, v_s, q_full, full, empty,
    tile, b, h, g, first, n_before, first_full, end_full, n_partial, n, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for c in gl.static_range(CONSUMERS):
        row = (tile * CONSUMERS + c) * ROWS
        mbarrier.expect(q_full.index(c), desc_q.block_type.nbytes + desc_do.block_type.nbytes)
        tma.async_copy_global_to_shared(desc_q, [b, row, h, 0], q_full.index(c), q_s.index(c))
        tma.async_copy_global_to_shared(desc_do, [b, row, h, 0], q_full.index(c), do_s.index(c))
    for it in range(n):
        stage = it % STAGES
        free = ((it // STAGES) & 1) ^ 1
        key = key_tile(it, first, n_before, first_full, end_full, n_partial) * N
        mbarrier.wait(empty.index(stage), free)
        mbarrier.expect(full.index(stage), desc_k.block_type.nbytes + desc_v.block_type.nbytes)
        tma.async_copy_global_to_shared(desc_k, [b, key, g, 0], full.index(stage), k_s.index(stage))
        tma.async_copy_global_to_shared(desc_v, [b, key, g, 0], full.index(stage), v_s.index(stage))


@gluon.jit
def consume_keys(
    q_s, do_s, k_s, v_s, q_full, full, empty, desc_dq, STATS, D_SLOPE, Q_DOC, K_DOC, SLOPES,
    T, S, H, scale, softcap, left, right, rounded, tile, b, h, first, n_before, first_full, end_full, n_partial, n,
    CID: gl.constexpr, N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, DOCUMENTS: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = desc_dq.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dq_layout, k_width=2)

    row = (tile * CONSUMERS + CID) * ROWS
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    cols = gl.arange(0, N, gl.SliceLayout(0, s_layout))
    nothing = gl.zeros([ROWS, N], gl.float32, s_layout)
    unit = scale * LOG2E
    if SOFTCAP or ALIBI:
        unit = 1.0
    q_pos = rows + (S - T)
    # Keys that a row sees: low <= key < high.
    high = gl.zeros_like(rows) + S
    low = gl.zeros_like(rows)
    if CAUSAL:
        high = gl.minimum(high, q_pos + 1)
    if HAS_RIGHT:
        high = gl.minimum(high, q_pos + right + 1)
    if HAS_LEFT:
        low = q_pos - left
    q_doc = rows
    if DOCUMENTS:
        q_doc = gl.load(Q_DOC + b * T + rows, mask=rows < T, other=-2)
    slope = 0.0
    if ALIBI:
        slope = gl.load(SLOPES + h).to(gl.float32)
    head = (b * H + h).to(gl.int64)
    lse_2 = gl.load(STATS + head * 2 * rounded + rows)
    delta = gl.load(STATS + (head * 2 + 1) * rounded + rows)
    d_slope = gl.zeros_like(delta)

    dq = gl.zeros([ROWS, D], gl.float32, dq_layout)
    q = q_s.index(CID).reshape([ROWS, D])
    d_out = do_s.index(CID).reshape([ROWS, E])
    mbarrier.wait(q_full.index(CID), 0)
    for it in range(n):
        stage = it % STAGES
        phase = (it // STAGES) & 1
        k = k_s.index(stage).reshape([N, D])
        v = v_s.index(stage).reshape([N, E])
        mbarrier.wait(full.index(stage), phase)
        s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma(d_out, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
        key = key_tile(it, first, n_before, first_full, end_full, n_partial) * N
        s = warpgroup_mma_wait(1, deps=(s,))
        s, steep = scores(s, q_pos, key + cols, scale, softcap, slope, SOFTCAP, ALIBI)
        if it < n_partial:
            s = hidden(s, key, low, high, q_doc, cols, K_DOC, b, S, HAS_LEFT, DOCUMENTS)
        p = gl.exp2(s * unit - lse_2[:, None])
        # Long since true: a branch, across which ptxas does not move the exponentials behind the wait that follows.
        mbarrier.wait(full.index(stage), phase)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        ds = p * (dp + delta[:, None])
        if ALIBI:
            away = gl.abs(q_pos[:, None] - (key + cols)[None, :]).to(gl.float32)
            d_slope -= gl.sum(ds * away, 1)
        if SOFTCAP:
            ds = ds * steep
        ds_half = gl.convert_layout(ds.to(dtype), ds_layout)
        dq = warpgroup_mma(ds_half, k, dq, is_async=True)
        # What wgmma still reads stays in its registers until it is done.
        dq, ds_half = warpgroup_mma_wait(0, deps=(dq, ds_half))
        mbarrier.arrive(empty.index(stage), count=1)

    if ALIBI:
        gl.store(D_SLOPE + head * T + rows, d_slope, mask=rows < T)
    # The queries have been read: their place takes the gradient.
    q.store((dq * scale).to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc_dq, [b, row, h, 0], q_s.index(CID))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "S", "H", "R", "left", "right", "n_tiles", "n_heads", "group", "rounded"])
def dq_kernel(
    desc_q, desc_k, desc_v, desc_do, desc_dq, STATS, D_SLOPE, SPANS, Q_DOC, K_DOC, SLOPES, T, S, H, R, scale, softcap,
    left, right, n_tiles, n_heads, group, rounded,
    N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, DOCUMENTS: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """A program has CONSUMERS · ROWS queries of one head; `n_heads` is B · H. With ALiBi also D_SLOPE [B, H, T], each
    row's share of the slope's gradient."""
    tile, head = place(n_tiles, n_heads, group, CAUSAL)
    b = head // H
    h = head % H
    first, n_before, first_full, end_full, n_partial, n = visits(
        tile, b, SPANS, n_tiles, T, S, left, right, CONSUMERS * ROWS, N, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS
    )
    q_s = gl.allocate_shared_memory(desc_q.dtype, [CONSUMERS, 1, ROWS, 1, D], desc_q.layout)
    do_s = gl.allocate_shared_memory(desc_do.dtype, [CONSUMERS, 1, ROWS, 1, E], desc_do.layout)
    k_s = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, N, 1, D], desc_k.layout)
    v_s = gl.allocate_shared_memory(desc_v.dtype, [STAGES, 1, N, 1, E], desc_v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    gl.warp_specialize(
        [
            (consume_keys, (
                q_s, do_s, k_s, v_s, q_full, full, empty, desc_dq, STATS, D_SLOPE, Q_DOC, K_DOC,
                SLOPES, T, S, H, scale, softcap, left, right, rounded, tile, b, h, first, n_before, first_full,
                end_full, n_partial, n, 0, N, D, E, STAGES, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI,
            )),
            (consume_keys, (
                q_s, do_s, k_s, v_s, q_full, full, empty, desc_dq, STATS, D_SLOPE, Q_DOC, K_DOC,
                SLOPES, T, S, H, scale, softcap, left, right, rounded, tile, b, h, first, n_before, first_full,
                end_full, n_partial, n, 1, N, D, E, STAGES, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI,
            )),
            (produce_keys, (
                desc_q, desc_k, desc_v, desc_do, q_s, do_s, k_s, v_s, q_full, full, empty,
                tile, b, h, h // R, first, n_before, first_full, end_full, n_partial, n, N, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
