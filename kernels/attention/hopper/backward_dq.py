"""dq: programs of 128 queries of a head, whose consumers pass the tiles of keys that these see. `backward.py` has the
legend."""

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

from .backward import CONSUMERS, place, scores
from .forward import (
    LOG2E,
    PRODUCER_REGISTERS,
    ROWS,
    beyond,
    copy_tile,
    far_places,
    far_tiles,
    hidden,
    key_tile,
    visits,
)


@gluon.jit
def produce_keys(
    desc_q, desc_k, desc_v, desc_do, q_s, do_s, k_s, v_s, q_full, full, empty, desc_far_k, desc_far_v,
    tile, b, h, g, first, n_before, first_full, end_full, n_partial, n_near, n,
    N: gl.constexpr, STAGES: gl.constexpr,
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
        far = (it - n_near) * N
        mbarrier.wait(empty.index(stage), free)
        mbarrier.expect(full.index(stage), desc_k.block_type.nbytes + desc_v.block_type.nbytes)
        copy_tile(desc_k, desc_far_k, b, key, far, g, full.index(stage), k_s.index(stage))
        copy_tile(desc_v, desc_far_v, b, key, far, g, full.index(stage), v_s.index(stage))


@gluon.jit
def consume_keys(
    q_s, do_s, k_s, v_s, q_full, full, empty, desc_dq, STATS, D_SLOPE, Q_DOC, K_DOC, SLOPES, ALWAYS, N_ALWAYS,
    OUTSIDE, FAR_DOC, T, S, H, scale, softcap, left, right, rounded, tile, b, h, first, n_before, first_full, end_full,
    n_partial, n_near, n,
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
    start = gl.load(STATS + head * 2 * rounded + rows) * unit
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
        k_pos = key + cols
        if ALWAYS is None or it < n_near:
            s, steep = scores(s, q_pos, k_pos, scale, softcap, slope, SOFTCAP, ALIBI)
        else:
            begin = (it - n_near) * N
            if ALIBI:
                k_pos = far_places(ALWAYS, N_ALWAYS, b, begin, cols, S)
            s, steep = scores(s, q_pos, k_pos, scale, softcap, slope, SOFTCAP, ALIBI)
            s = beyond(s, begin, rows, q_doc, cols, OUTSIDE, N_ALWAYS, FAR_DOC, b, T, S, HAS_RIGHT, DOCUMENTS)
        if it < n_partial:
            s = hidden(s, key, low, high, q_doc, cols, K_DOC, b, S, HAS_LEFT, DOCUMENTS)
        p = gl.exp2(s * unit + start[:, None])
        # Long since true: a branch, across which ptxas does not move the exponentials behind the wait that follows.
        mbarrier.wait(full.index(stage), phase)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        ds = p * (dp + delta[:, None])
        if ALIBI:
            away = gl.abs(q_pos[:, None] - k_pos[None, :]).to(gl.float32)
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
    desc_q, desc_k, desc_v, desc_do, desc_dq, STATS, D_SLOPE, SPANS, Q_DOC, K_DOC, SLOPES, desc_far_k, desc_far_v,
    ALWAYS, N_ALWAYS, OUTSIDE, FAR_DOC, T, S, H, R, scale, softcap, left, right, n_tiles, n_heads, group, rounded,
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
    n_near = n
    if ALWAYS is not None:
        n += far_tiles(N_ALWAYS, b, N)
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
                SLOPES, ALWAYS, N_ALWAYS, OUTSIDE, FAR_DOC, T, S, H, scale, softcap, left, right, rounded, tile, b, h,
                first, n_before, first_full, end_full, n_partial, n_near, n, 0, N, D, E, STAGES, CAUSAL, HAS_LEFT,
                HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI,
            )),
            (consume_keys, (
                q_s, do_s, k_s, v_s, q_full, full, empty, desc_dq, STATS, D_SLOPE, Q_DOC, K_DOC,
                SLOPES, ALWAYS, N_ALWAYS, OUTSIDE, FAR_DOC, T, S, H, scale, softcap, left, right, rounded, tile, b, h,
                first, n_before, first_full, end_full, n_partial, n_near, n, 1, N, D, E, STAGES, CAUSAL, HAS_LEFT,
                HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI,
            )),
            (produce_keys, (
                desc_q, desc_k, desc_v, desc_do, q_s, do_s, k_s, v_s, q_full, full, empty, desc_far_k, desc_far_v,
                tile, b, h, h // R, first, n_before, first_full, end_full, n_partial, n_near, n, N, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
