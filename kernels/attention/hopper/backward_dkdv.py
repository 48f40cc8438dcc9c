"""dk and dv, and dq on the way: programs of 128 keys of a key/value head, whose consumers pass the tiles of queries
that see them, of one query head of the group after the other. `backward.py` has the legend.

The products for scores and for dP start from the tile's -lse and -delta instead of zero: statistics are read while the
last round's product still runs, and nobody waits for them, nor subtracts them, between products.

dq (FUSED) wants the gradients of scores by query, of all keys of the program, while each consumer has those of its own
keys: they leave them in shared memory for each other, and each computes half of a tile's dq, which TMA adds to what
other programs have added. It does so a round later, at the beginning of the next: neither waits for the other in the
middle of a round, and one may exponentiate while the other multiplies. In which order programs add is up to the
hardware, so that dq, other than dk and dv, is not the same in every bit from run to run.

Wide heads leave a consumer no registers for both dk and dv: there a program has 64 keys, whose dk the first consumer
sums up and whose dv the second (OWNERS), and dq has a kernel of its own.
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
from .backward import CONSUMERS, place, scores
from .backward_squares import LINES, by_thread
from .forward import (
    LOG2E,
    PRODUCER_REGISTERS,
    ROWS,
    copy_tile,
    far_places,
    far_tiles,
    key_tile,
    of_documents,
    tile_range,
)
from .reduce import async_add_shared_to_global

query_range = gluon.jit(ranges.query_range)


@gluon.jit
def visitors(
    tile, b, SPANS, n_tiles, T, S, left, right,
    N: gl.constexpr, M: gl.constexpr, CAUSAL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    DOCUMENTS: gl.constexpr, OWNERS: gl.constexpr,
):  # fmt: skip
    """(first, n_before, first_full, end_full, n_partial, n) of the tiles of queries that see a tile of keys."""
    lo, full_lo, full_hi, hi = query_range(tile * N, N, T, S, S - T, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
    if DOCUMENTS:
        span = b * n_tiles + tile
        if OWNERS == 1:  # spans are those of CONSUMERS · ROWS keys
            span = b * ((n_tiles + CONSUMERS - 1) // CONSUMERS) + tile // CONSUMERS
        lo, full_lo, full_hi, hi = of_documents(SPANS + span * 4, lo, full_lo, full_hi, hi)
    first, first_full, end_full, end = tile_range(lo, full_lo, full_hi, hi, M)
    n_before = first_full - first
    n_partial = n_before + end - end_full
    return first, n_before, first_full, end_full, n_partial, n_partial + end_full - first_full


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


@gluon.jit
def copy_numbers(desc, desc_far, at, far, far_at, full, to):
    """A tile's statistics by TMA, as `copy_tile` copies its rows."""
    if desc_far is None or far < 0:
        tma.async_copy_global_to_shared(desc, [at], full, to)
    else:
        tma.async_copy_global_to_shared(desc_far, [far_at], full, to)


@gluon.jit
def unpermitted(
    s, begin, keys, k_doc, cols, SEEN_FROM, FAR_DOC, b, T, S, CAUSAL: gl.constexpr, DOCUMENTS: gl.constexpr
):  # fmt: skip
    """-inf where a key is not seen by one of the rows that may see everything, numbers `begin + cols`. They are in
    order: by causality those from SEEN_FROM[b, key] on see it. (Those that are not there have no weight.)"""
    if CAUSAL:
        seen_from = gl.load(SEEN_FROM + b * S + keys, mask=keys < S, other=0) - begin
        s = gl.where(cols[None, :] >= seen_from[:, None], s, -float("inf"))
    if DOCUMENTS:
        q_doc = gl.load(FAR_DOC + b * T + begin + cols, mask=cols < T - begin, other=-1)
        s = gl.where(k_doc[:, None] == q_doc[None, :], s, -float("inf"))
    return s


@gluon.jit
def produce_queries(
    desc_q, desc_k, desc_v, desc_do, desc_stats, q_s, do_s, k_s, v_s, lse_s, delta_s, kv_full, full, empty,
    desc_far_q, desc_far_do, desc_far_stats, far_rounded,
    tile, b, g, H, R, rounded, first, n_before, first_full, end_full, n_partial, n_near, n,
    M: gl.constexpr, STAGES: gl.constexpr, OWNERS: gl.constexpr,
):  # fmt: skip
    for c in gl.static_range(OWNERS):
        key = (tile * OWNERS + c) * ROWS
        mbarrier.expect(kv_full.index(c), desc_k.block_type.nbytes + desc_v.block_type.nbytes)
        tma.async_copy_global_to_shared(desc_k, [b, key, g, 0], kv_full.index(c), k_s.index(c))
        tma.async_copy_global_to_shared(desc_v, [b, key, g, 0], kv_full.index(c), v_s.index(c))
    at = 0
    for r in range(R):
        h = g * R + r
        stats = (b * H + h) * 2 * rounded
        far_stats = (b * H + h) * 2 * far_rounded
        for it in range(n):
            stage = at % STAGES
            free = ((at // STAGES) & 1) ^ 1
            row = key_tile(it, first, n_before, first_full, end_full, n_partial) * M
            far = (it - n_near) * M
            mbarrier.wait(empty.index(stage), free)
            mbarrier.expect(
                full.index(stage),
                desc_q.block_type.nbytes + desc_do.block_type.nbytes + 2 * desc_stats.block_type.nbytes,
            )
            copy_tile(desc_q, desc_far_q, b, row, far, h, full.index(stage), q_s.index(stage))
            copy_tile(desc_do, desc_far_do, b, row, far, h, full.index(stage), do_s.index(stage))
            copy_numbers(
                desc_stats, desc_far_stats, stats + row, far, far_stats + far, full.index(stage), lse_s.index(stage)
            )
            copy_numbers(
                desc_stats, desc_far_stats, stats + rounded + row, far, far_stats + far_rounded + far,
                full.index(stage), delta_s.index(stage),
            )  # fmt: skip
            at += 1


@gluon.jit
def spread(x, M: gl.constexpr):
    """x [M] in every row, for a product to start from. The copies are hidden from LLVM: it would put them between two
    products, and ptxas then lets none run beside another."""
    rows = x[None, :].broadcast_to([ROWS, M])
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [rows], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def begin_dq(ds_s, k_s, slot, layout: gl.constexpr, CID: gl.constexpr, D: gl.constexpr):
    """A consumer's half of a tile's dq, begun: of the columns, or of the queries where there are ROWS columns."""
    dq = gl.zeros([ROWS, ROWS], gl.float32, layout)
    for c in gl.static_range(CONSUMERS):
        k = k_s.index(c).reshape([ROWS, D])
        ds = ds_s.index(slot * CONSUMERS + c)
        if D > ROWS:
            k = k.slice(CID * ROWS, ROWS, dim=1)
        else:
            ds = ds.slice(CID * ROWS, ROWS, dim=1)
        dq = warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=c > 0, is_async=True)
    return dq


@gluon.jit
def add(dq, dq_s, desc_sums, square, CID: gl.constexpr):
    """A square of dq to what other programs have added."""
    tma.store_wait(0)  # the last one has left the buffer
    dq_s.index(CID).store(by_thread(dq))
    fence_async_shared()
    async_add_shared_to_global(desc_sums, [square * LINES, 0], dq_s.index(CID))


@gluon.jit
def consume_queries(
    q_s, do_s, k_s, v_s, lse_s, delta_s, ds_s, dq_s, kv_full, full, empty, ds_full, read, desc_sums, desc_dk,
    desc_dv, Q_DOC, K_DOC, SLOPES, FAR_ROWS, N_FAR_ROWS, SEEN_FROM, FAR_DOC, T, S, H, R, scale, softcap, left, right,
    tile, b, g, first, n_before, first_full, end_full, n_partial, n_near, n,
    CID: gl.constexpr, M: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    OWNERS: gl.constexpr, CAUSAL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    DOCUMENTS: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, FUSED: gl.constexpr,
):  # fmt: skip
    OWN: gl.constexpr = CID % OWNERS  # where its keys and values lie
    HAS_DK: gl.constexpr = OWNERS == CONSUMERS or CID == 0
    HAS_DV: gl.constexpr = OWNERS == CONSUMERS or CID == 1
    STARTED: gl.constexpr = not (SOFTCAP or ALIBI)  # scores from -lse: not where more is done to them than to scale
    dtype: gl.constexpr = desc_dk.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, E, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dk_layout, k_width=2)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dv_layout, k_width=2)
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16]
    )
    cols_layout: gl.constexpr = gl.SliceLayout(0, s_layout)

    key = (tile * OWNERS + OWN) * ROWS
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
    k = k_s.index(OWN).reshape([ROWS, D])
    v = v_s.index(OWN).reshape([ROWS, E])
    mbarrier.wait(kv_full.index(OWN), 0)
    n_rounds = R * n
    if n_rounds > 0:
        mbarrier.wait(full.index(0), 0)
    start = lse_s.index(0).load(cols_layout)
    delta = delta_s.index(0).load(cols_layout)
    tiles = (T + M - 1) // M  # of queries
    square = 0  # which is to be added to next
    if FUSED:  # the first round adds zeros
        square = ((b * H + g * R) * tiles + key_tile(0, first, n_before, first_full, end_full, n_partial)) * CONSUMERS
        ds_s.index(CONSUMERS + CID).store(gl.zeros([ROWS, M], dtype, s_layout))
        fence_async_shared()
        mbarrier.arrive(ds_full.index(1), count=1)
    it = 0
    r = 0
    for at in range(n_rounds):
        stage = at % STAGES
        q = q_s.index(stage).reshape([M, D])
        d_out = do_s.index(stage).reshape([M, E])
        s_start = nothing
        if STARTED:
            s_start = spread(start, M)
        if HAS_DK:
            dp_start = spread(delta, M)
        # Two slots: who writes to one again has seen the other consumer's arrival at the second, by when that had read
        # the first.
        if FUSED:
            mbarrier.wait(ds_full.index((at + 1) % 2), (at // 2) & 1)
            dq = begin_dq(ds_s, k_s, (at + 1) % 2, dq_layout, CID, D)
        s = warpgroup_mma(k, q.permute((1, 0)), s_start, use_acc=STARTED, is_async=True)
        if FUSED:  # out while scores are multiplied; with dP in flight as well ptxas would serialise all products
            dq = warpgroup_mma_wait(1, deps=(dq,))
            add(dq, dq_s, desc_sums, square + CID, CID)
        if HAS_DK:
            dp = warpgroup_mma(v, d_out.permute((1, 0)), dp_start, is_async=True)
        row = key_tile(it, first, n_before, first_full, end_full, n_partial) * M
        if FUSED:
            square = ((b * H + g * R + r) * tiles + row // M) * CONSUMERS
        s = warpgroup_mma_wait(1 if HAS_DK else 0, deps=(s,))
        if FAR_ROWS is None or it < n_near:
            s, steep = scores(s, keys, row + (S - T) + cols, scale, softcap, slope, SOFTCAP, ALIBI)
        else:
            begin = (it - n_near) * M
            rows = cols
            if ALIBI:
                rows = far_places(FAR_ROWS, N_FAR_ROWS, b, begin, cols, T)
            s, steep = scores(s, keys, rows + (S - T), scale, softcap, slope, SOFTCAP, ALIBI)
            s = unpermitted(s, begin, keys, k_doc, cols, SEEN_FROM, FAR_DOC, b, T, S, CAUSAL, DOCUMENTS)
        if it < n_partial:
            s = unseen(s, row, low, high, k_doc, cols, Q_DOC, b, T, CAUSAL or HAS_RIGHT, HAS_LEFT, DOCUMENTS)
        if STARTED:
            p = gl.exp2(s * unit)
        else:
            p = gl.exp2(s + start[None, :])
        if HAS_DV:
            p_half = gl.convert_layout(p.to(dtype), p_layout)
        if FUSED:  # before the wait: tensor cores go on. In two passes heads of 64 were slower so
            dv = warpgroup_mma(p_half, d_out, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
        else:
            if HAS_DK:
                # Long since true: a branch, across which ptxas does not move the exponentials behind the wait.
                mbarrier.wait(full.index(stage), (at // STAGES) & 1)
                dp = warpgroup_mma_wait(0, deps=(dp,))
            if HAS_DV:
                dv = warpgroup_mma(p_half, d_out, dv, is_async=True)
        if HAS_DK:
            ds = p * dp
            if SOFTCAP:
                ds = ds * steep
            ds_16 = ds.to(dtype)
            ds_half = gl.convert_layout(ds_16, ds_layout)
            dk = warpgroup_mma(ds_half, q, dk, is_async=True)
        if FUSED:
            ds_s.index(at % 2 * CONSUMERS + CID).store(ds_16)
            fence_async_shared()
            mbarrier.arrive(ds_full.index(at % 2), count=1)
        # The next round's statistics; after the last one these again.
        after = gl.minimum(at + 1, n_rounds - 1)
        mbarrier.wait(full.index(after % STAGES), (after // STAGES) & 1)
        start = lse_s.index(after % STAGES).load(cols_layout)
        if HAS_DK:
            delta = delta_s.index(after % STAGES).load(cols_layout)
        # What wgmma still reads stays in its registers until it is done.
        if OWNERS == CONSUMERS:
            dv, p_half, dk, ds_half = warpgroup_mma_wait(0, deps=(dv, p_half, dk, ds_half))
        elif HAS_DK:
            dk, ds_half = warpgroup_mma_wait(0, deps=(dk, ds_half))
        else:
            dv, p_half = warpgroup_mma_wait(0, deps=(dv, p_half))
        mbarrier.arrive(empty.index(stage), count=1)
        it += 1
        if it == n:
            it = 0
            r += 1
            if ALIBI:
                slope = gl.load(SLOPES + g * R + gl.minimum(r, R - 1)).to(gl.float32)

    if FUSED and n_rounds > 0:
        mbarrier.wait(ds_full.index((n_rounds + 1) % 2), (n_rounds // 2) & 1)
        dq = begin_dq(ds_s, k_s, (n_rounds + 1) % 2, dq_layout, CID, D)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        add(dq, dq_s, desc_sums, square + CID, CID)
    if FUSED or OWNERS == 1:  # each has read the other's keys, or both the same
        mbarrier.arrive(read.index(0), count=1)
        mbarrier.wait(read.index(0), 0)
    # The keys and values have been read: their place takes the gradients.
    if HAS_DK:
        k.store((dk * scale).to(dtype))
    if HAS_DV:
        v.store(dv.to(dtype))
    fence_async_shared()
    if HAS_DK:
        tma.async_copy_shared_to_global(desc_dk, [b, key, g, 0], k_s.index(OWN))
    if HAS_DV:
        tma.async_copy_shared_to_global(desc_dv, [b, key, g, 0], v_s.index(OWN))
    tma.store_wait(0)


# Sizes are not compiled in, nor whether 16 divides them: one kernel serves all lengths and numbers of heads.
@gluon.jit(do_not_specialize=["T", "S", "H", "G", "R", "left", "right", "n_tiles", "n_heads", "group", "rounded",
                               "far_rounded"])  # fmt: skip
def dkdv_kernel(
    desc_q, desc_k, desc_v, desc_do, desc_stats, desc_dk, desc_dv, desc_sums, SPANS, Q_DOC, K_DOC, SLOPES, desc_far_q,
    desc_far_do, desc_far_stats, FAR_ROWS, N_FAR_ROWS, SEEN_FROM, FAR_DOC, T, S, H, G, R, scale, softcap, left, right,
    n_tiles, n_heads, group, rounded, far_rounded,
    M: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr, OWNERS: gl.constexpr,
    REGISTERS: gl.constexpr, CAUSAL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    DOCUMENTS: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, FUSED: gl.constexpr,
):  # fmt: skip
    """A program has OWNERS · ROWS keys of one key/value head; `n_heads` is B · G.

    FUSED: dq is added to `desc_sums`, without the scale, in squares (`backward_squares.py`); of M and D one is ROWS and
    the other CONSUMERS · ROWS, and OWNERS is CONSUMERS. Otherwise it is None."""
    SPARE: gl.constexpr = 16 if OWNERS == 1 else 0  # registers that the producer has use for and dv has not
    tile, head = place(n_tiles, n_heads, group, False)
    b = head // G
    g = head % G
    first, n_before, first_full, end_full, n_partial, n = visitors(
        tile, b, SPANS, n_tiles, T, S, left, right, OWNERS * ROWS, M, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS,
        OWNERS,
    )  # fmt: skip
    n_near = n
    if FAR_ROWS is not None:
        n += far_tiles(N_FAR_ROWS, b, M)
    q_s = gl.allocate_shared_memory(desc_q.dtype, [STAGES, 1, M, 1, D], desc_q.layout)
    do_s = gl.allocate_shared_memory(desc_do.dtype, [STAGES, 1, M, 1, E], desc_do.layout)
    k_s = gl.allocate_shared_memory(desc_k.dtype, [OWNERS, 1, ROWS, 1, D], desc_k.layout)
    v_s = gl.allocate_shared_memory(desc_v.dtype, [OWNERS, 1, ROWS, 1, E], desc_v.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, M], desc_stats.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, M], desc_stats.layout)
    ds_s = q_s
    dq_s = q_s
    if FUSED:
        ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, M], desc_q.dtype)
        ds_s = gl.allocate_shared_memory(desc_q.dtype, [2 * CONSUMERS, ROWS, M], ds_layout)
        dq_s = gl.allocate_shared_memory(gl.float32, [CONSUMERS, LINES, ROWS * ROWS // LINES], desc_sums.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(kv_full.index(c), count=1)
    for slot in gl.static_range(2):
        mbarrier.init(ds_full.index(slot), count=CONSUMERS)
    mbarrier.init(read.index(0), count=CONSUMERS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    # warp_specialize takes constants only where they stand in its tuples.
    gl.warp_specialize(
        [
            (consume_queries, (
                q_s, do_s, k_s, v_s, lse_s, delta_s, ds_s, dq_s, kv_full, full, empty, ds_full, read, desc_sums,
                desc_dk, desc_dv, Q_DOC, K_DOC, SLOPES, FAR_ROWS, N_FAR_ROWS, SEEN_FROM, FAR_DOC, T, S, H, R, scale,
                softcap, left, right, tile, b, g, first, n_before, first_full, end_full, n_partial, n_near, n, 0, M, D,
                E, STAGES, OWNERS, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI, FUSED,
            )),
            (consume_queries, (
                q_s, do_s, k_s, v_s, lse_s, delta_s, ds_s, dq_s, kv_full, full, empty, ds_full, read, desc_sums,
                desc_dk, desc_dv, Q_DOC, K_DOC, SLOPES, FAR_ROWS, N_FAR_ROWS, SEEN_FROM, FAR_DOC, T, S, H, R, scale,
                softcap, left, right, tile, b, g, first, n_before, first_full, end_full, n_partial, n_near, n, 1, M, D,
                E, STAGES, OWNERS, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI, FUSED,
            )),
            (produce_queries, (
                desc_q, desc_k, desc_v, desc_do, desc_stats, q_s, do_s, k_s, v_s, lse_s, delta_s, kv_full, full, empty,
                desc_far_q, desc_far_do, desc_far_stats, far_rounded, tile, b, g, H, R, rounded, first, n_before,
                first_full, end_full, n_partial, n_near, n, M, STAGES, OWNERS,
            )),
        ],
        [4, 1],
        [REGISTERS - SPARE, PRODUCER_REGISTERS + SPARE],
    )  # fmt: skip
