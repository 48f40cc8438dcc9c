"""The forward kernel for Hopper (sm_90): a producer warp loads by TMA, consumers of four warps do everything else.

Source: FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608): warp specialisation, the overlap of one tile's softmax
with the products of its neighbours (algorithm 2) and consumers that take turns on the tensor cores (§3.1).

Legend: B batch, T queries, S keys, H query heads, G key/value heads, R = H // G, D and E head dims (padded: what lies
beyond the tensors' own is read as zeros and not written); C consumers of 64 query rows each, M = 64 · C rows of a tile
of queries, N keys of a tile of keys; `_2` in a name: in units of log 2.

The grid is persistent: a program works through items (`order`), and the producer is ahead by as much as fits in shared
memory, also across items; only where a consumer's queries have a single place (SLOTS), the next item's come when the
rows of the last have left. A slot of shared memory holds what one round multiplies: a tile's keys, and the values of
the tile before it, which may be another item's last.

An item's tiles of keys are counted `it = 0 … n - 1`: first those in which something is hidden from somebody, then those
that all its rows see whole, for which no mask is computed, and from `n_near` on those of the keys that may be seen from
everywhere (global tokens, sinks), which lie gathered in tensors of their own; a row takes of these what lies outside of
its window.
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

LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
ROWS: gl.constexpr = gl.constexpr(64)  # of a consumer: what one wgmma of four warps multiplies
PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)
LANES: gl.constexpr = gl.constexpr(6)  # bits of a score's column that tell its lane apart; the others its register

# The pure functions as the kernel calls them: compiled.
key_range = gluon.jit(ranges.key_range)
tile_range = gluon.jit(ranges.tile_range)


@gluon.jit
def of_documents(SPAN, lo, full_lo, full_hi, hi):
    """What of a range of keys or queries, and of the part of it that all see, lies within a tile's documents."""
    return (
        gl.maximum(lo, gl.load(SPAN)),
        gl.maximum(full_lo, gl.load(SPAN + 1)),
        gl.minimum(full_hi, gl.load(SPAN + 2)),
        gl.minimum(hi, gl.load(SPAN + 3)),
    )


@gluon.jit
def visits(
    tile, b, SPANS, n_tiles, T, S, left, right,
    M: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """(first, n_before, first_full, end_full, n_partial, n) of the tiles of keys that a tile of queries visits."""
    lo, full_lo, full_hi, hi = key_range(tile * M, M, T, S, S - T, left, right, CAUSAL, HAS_LEFT, HAS_RIGHT)
    if DOCUMENTS:
        lo, full_lo, full_hi, hi = of_documents(SPANS + (b * n_tiles + tile) * 4, lo, full_lo, full_hi, hi)
    first, first_full, end_full, end = tile_range(lo, full_lo, full_hi, hi, N)
    n_before = first_full - first
    n_full = end_full - first_full
    # Rows that see nothing still visit one tile, of which the mask leaves nothing: zeros need no path of their own.
    n_partial = gl.maximum(n_before + end - end_full, n_full == 0)
    return first, n_before, first_full, end_full, n_partial, n_partial + n_full


@gluon.jit
def key_tile(it, first, n_before, first_full, end_full, n_partial):
    """Which tile of keys is visited as the it-th: partly visible ones before and after the whole ones, then these."""
    partial = gl.where(it < n_before, first + it, end_full + it - n_before)
    return gl.where(it < n_partial, partial, first_full + it - n_partial)


@gluon.jit
def far_tiles(N_FAR, b, N: gl.constexpr):
    """How many tiles of N a sequence's gathered rows fill."""
    return (gl.load(N_FAR + b) + N - 1) // N


@gluon.jit
def far_places(FAR, N_FAR, b, begin, cols, n):
    """Which of n rows were gathered as numbers `begin + cols`; n for none."""
    return gl.load(FAR + b * n + begin + cols, mask=cols < gl.load(N_FAR + b) - begin, other=n)


# -- the producer ------------------------------------------------------------------------------------------------------


@gluon.jit
def copy_tile(desc, desc_far, b, at, far, head, full, to):
    """A tile by TMA: rows from `at` on or, where `far` is not negative, of the gathered ones those from `far` on."""
    if desc_far is None or far < 0:
        tma.async_copy_global_to_shared(desc, [b, at, head, 0], full, to)
    else:
        tma.async_copy_global_to_shared(desc_far, [b, far, head, 0], full, to)


@gluon.jit
def load_queries(
    desc_q, q_s, q_full, q_empty, turn, tile, b, h, C: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    for c in gl.static_range(C):
        slot = (turn & (SLOTS - 1)) * C + c
        mbarrier.wait(q_empty.index(slot), ((turn >> (SLOTS - 1)) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), desc_q.block_type.nbytes)
        tma.async_copy_global_to_shared(
            desc_q, [b, tile * (ROWS * C) + c * ROWS, h, 0], q_full.index(slot), q_s.index(slot)
        )


@gluon.jit
def produce(
    desc_q, desc_k, desc_v, q_s, k_s, v_s, q_full, q_empty, full, empty,
    ORDER, SPANS, desc_far_k, desc_far_v, N_ALWAYS, T, S, H, R, left, right, n_tiles, width,
    C: gl.constexpr, N: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    at = 0  # tiles of keys loaded so far
    # What the last of them was: its values come in the next slot.
    last_b = 0
    last_key = 0
    last_far = -1
    last_g = 0
    ORDER += gl.program_id(0) * width
    for turn in range(gl.load(ORDER)):
        item = gl.load(ORDER + 1 + turn)
        tile = item % n_tiles
        head = item // n_tiles
        b = head // H
        h = head % H
        first, n_before, first_full, end_full, n_partial, n = visits(
            tile, b, SPANS, n_tiles, T, S, left, right, ROWS * C, N, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS
        )
        n_near = n
        if N_ALWAYS is not None:
            n += far_tiles(N_ALWAYS, b, N)
        for it in range(n):
            stage = at % STAGES
            free = ((at // STAGES) & 1) ^ 1
            key = key_tile(it, first, n_before, first_full, end_full, n_partial) * N
            far = (it - n_near) * N
            if SLOTS == 2 and it == 0:
                load_queries(desc_q, q_s, q_full, q_empty, turn, tile, b, h, C, SLOTS)
            mbarrier.wait(empty.index(stage), free)
            if at == 0:
                mbarrier.expect(full.index(stage), desc_k.block_type.nbytes)
            else:
                mbarrier.expect(full.index(stage), desc_k.block_type.nbytes + desc_v.block_type.nbytes)
            copy_tile(desc_k, desc_far_k, b, key, far, h // R, full.index(stage), k_s.index(stage))
            if at > 0:
                copy_tile(desc_v, desc_far_v, last_b, last_key, last_far, last_g, full.index(stage), v_s.index(stage))
            last_b = b
            last_key = key
            last_far = far
            last_g = h // R
            if SLOTS == 1 and it == 0:  # behind keys and values, which need not wait until the queries' place is free
                load_queries(desc_q, q_s, q_full, q_empty, turn, tile, b, h, C, SLOTS)
            at += 1
    stage = at % STAGES
    mbarrier.wait(empty.index(stage), ((at // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), desc_v.block_type.nbytes)
    copy_tile(desc_v, desc_far_v, last_b, last_key, last_far, last_g, full.index(stage), v_s.index(stage))


# -- the consumers -----------------------------------------------------------------------------------------------------


@gluon.jit
def shaped(s, key, q_pos, cols, scale, softcap, slope, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr):
    """Scores of raw products s [ROWS, N] with the keys from `key` on: scale, softcap, ALiBi. Without softcap and ALiBi
    the scale waits to be fused into the exponent."""
    if SOFTCAP:
        x = s * (scale / softcap)
        shrunk = gl.exp2(gl.abs(x) * (-2.0 * LOG2E))
        tanh = (1.0 - shrunk) / (1.0 + shrunk)
        s = gl.where(x < 0, -tanh, tanh) * (softcap * LOG2E)
    if ALIBI:
        if not SOFTCAP:
            s = s * (scale * LOG2E)
        away = gl.abs(q_pos[:, None] - (key + cols)[None, :]).to(gl.float32)
        s = s - (slope * LOG2E) * away
    return s


@gluon.jit
def hidden(s, key, low, high, q_doc, cols, K_DOC, b, S, HAS_LOW: gl.constexpr, DOCUMENTS: gl.constexpr):
    """-inf where a row does not see a key: low <= key < high of the row, and of its document."""
    # Columns are compared as a constant and a lane's offset: as themselves they would fill 32 registers in every round.
    offset = (cols & LANES)[None, :]
    ok = (cols & ~LANES)[None, :] < (high - key)[:, None] - offset
    if HAS_LOW:
        ok = ok & ((cols & ~LANES)[None, :] >= (low - key)[:, None] - offset)
    if DOCUMENTS:
        k_doc = gl.load(K_DOC + b * S + key + cols, mask=key + cols < S, other=-1)
        ok = ok & (q_doc[:, None] == k_doc[None, :])
    return gl.where(ok, s, -float("inf"))


@gluon.jit
def beyond(
    s, begin, rows, q_doc, cols, OUTSIDE, N_FAR, FAR_DOC, b, T, S, HAS_RIGHT: gl.constexpr, DOCUMENTS: gl.constexpr
):  # fmt: skip
    """-inf where a row does not see one of the keys that may be seen from everywhere, numbers `begin + cols`, or has it
    in its window. They are in order: outside of it lie those before OUTSIDE[b, row, 0] and from OUTSIDE[b, row, 1] on.
    """
    there = rows < T
    ok = cols[None, :] < (gl.load(OUTSIDE + (b * T + rows) * 2, mask=there, other=0) - begin)[:, None]
    if HAS_RIGHT:
        after = cols[None, :] >= (gl.load(OUTSIDE + (b * T + rows) * 2 + 1, mask=there, other=0) - begin)[:, None]
        ok = ok | (after & (cols < gl.load(N_FAR + b) - begin)[None, :])
    if DOCUMENTS:
        k_doc = gl.load(FAR_DOC + b * S + begin + cols, mask=cols < S - begin, other=-1)
        ok = ok & (q_doc[:, None] == k_doc[None, :])
    return gl.where(ok, s, -float("inf"))


@gluon.jit
def finite(top):
    """What to subtract: the maximum, but 0 where a row has seen nothing, because -inf - (-inf) is no number."""
    return gl.where(top == -float("inf"), 0.0, top)


@gluon.jit
def packed(p):
    """Pairs of 16 bits as one register of 32, in the place of their first; nobody reads the second's. Passed from round
    to round as they are they would be registers of 16 bits, whose halves ptxas may swap and swap back."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $2; mov.b32 $1, 0;", "=r,=r,r", [p], dtype=gl.int32, is_pure=True, pack=2
    )


@gluon.jit
def unpacked(x, dtype: gl.constexpr):
    if dtype == gl.float16:
        return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2)
    else:  # after a return it would be compiled, too
        return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def row_max(s, N: gl.constexpr, layout: gl.constexpr):
    """Neighbours first: no chain of 32 maxima, each of which waits for the last."""
    pairs = gl.max(s.reshape([ROWS, N // 8, 4, 2]), 3)
    return gl.convert_layout(gl.max(gl.max(pairs, 1), 1), layout)


@gluon.jit
def lane_sums(p, N: gl.constexpr):
    """[ROWS, 4]: what each of the four lanes that share a row holds of its sum, until the item ends."""
    return gl.sum(gl.sum(p.reshape([ROWS, N // 8, 4, 2]), 3), 1)


@gluon.jit
def halves(x, N: gl.constexpr):
    """The left and the right columns."""
    return gl.split(gl.permute(x.reshape([ROWS, 2, N // 2]), (0, 2, 1)))


@gluon.jit
def joined(left, right, N: gl.constexpr, layout: gl.constexpr):
    return gl.convert_layout(gl.permute(gl.join(left, right), (0, 2, 1)).reshape([ROWS, N]), layout)


@gluon.jit
def start(
    q_s, k_s, q_full, full, nothing, turn, n_turns, at,
    CID: gl.constexpr, C: gl.constexpr, N: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The product of the turn's item with its first tile of keys. After the last item this multiplies what happens to
    lie there, and nobody looks at it."""
    stage = at % STAGES
    slot = (turn & (SLOTS - 1)) * C + CID
    if turn < n_turns:
        mbarrier.wait(q_full.index(slot), (turn >> (SLOTS - 1)) & 1)
        mbarrier.wait(full.index(stage), (at // STAGES) & 1)
    return warpgroup_mma(
        q_s.index(slot).reshape([ROWS, D]), k_s.index(stage).reshape([N, D]).permute((1, 0)), nothing, use_acc=False,
        is_async=True,
    )  # fmt: skip


@gluon.jit
def consume(
    q_s, k_s, v_s, o_s, q_full, q_empty, full, empty, desc_o, LSE, ORDER, SPANS, Q_DOC,
    K_DOC, SLOPES, SINKS, ALWAYS, N_ALWAYS, OUTSIDE, FAR_DOC, T, S, H, scale, softcap, left, right, n_tiles, width,
    CID: gl.constexpr, C: gl.constexpr, N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, SLOTS: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    DOCUMENTS: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, SINK: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = desc_o.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, E, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, o_layout)

    lanes = gl.arange(0, ROWS, rows_layout)
    cols = gl.arange(0, N, gl.SliceLayout(0, s_layout))
    nothing = gl.zeros([ROWS, N], gl.float32, s_layout)
    unit = scale * LOG2E
    if SOFTCAP or ALIBI:
        unit = 1.0
    at = 0  # tiles of keys consumed so far
    ORDER += gl.program_id(0) * width
    n_turns = gl.load(ORDER)
    item = gl.load(ORDER + 1)
    running = start(q_s, k_s, q_full, full, nothing, 0, 1, 0, CID, C, N, D, SLOTS, STAGES)
    for turn in range(n_turns):
        tile = item % n_tiles
        head = item // n_tiles
        item = gl.load(ORDER + gl.minimum(turn + 2, n_turns))  # the next, by the time that it is needed
        slot = (turn & (SLOTS - 1)) * C + CID
        q = q_s.index(slot).reshape([ROWS, D])
        b = head // H
        h = head % H
        first, n_before, first_full, end_full, n_partial, n = visits(
            tile, b, SPANS, n_tiles, T, S, left, right, ROWS * C, N, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS
        )
        n_near = n
        if ALWAYS is not None:
            n += far_tiles(N_ALWAYS, b, N)
        row = tile * (ROWS * C) + CID * ROWS
        rows = row + lanes
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

        # The first tile: its product was begun before the last item's rows were written.
        s = warpgroup_mma_wait(0, deps=(running,))
        mbarrier.arrive(empty.index(at % STAGES), count=1)
        key = key_tile(0, first, n_before, first_full, end_full, n_partial) * N
        s = shaped(s, key, q_pos, cols, scale, softcap, slope, SOFTCAP, ALIBI)
        s = hidden(s, key, low, high, q_doc, cols, K_DOC, b, S, HAS_LEFT, DOCUMENTS)
        top = row_max(s, N, rows_layout) * unit
        p = gl.exp2(s * unit - finite(top)[:, None])
        total = lane_sums(p, N)
        lanes_layout: gl.constexpr = total.type.layout
        carried = packed(gl.convert_layout(p.to(dtype), p_layout))
        acc = gl.zeros([ROWS, E], gl.float32, o_layout)

        # Each round: products with tile `it` of K and tile `it - 1` of V, then the softmax of `it` while the latter
        # still runs.
        for it in range(1, n):
            p_half = unpacked(carried, dtype)
            stage = (at + it) % STAGES
            mbarrier.wait(full.index(stage), ((at + it) // STAGES) & 1)
            s = warpgroup_mma(
                q, k_s.index(stage).reshape([N, D]).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            acc = warpgroup_mma(p_half, v_s.index(stage).reshape([N, E]), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            key = key_tile(it, first, n_before, first_full, end_full, n_partial) * N
            if ALWAYS is None or it < n_near:
                s = shaped(s, key, q_pos, cols, scale, softcap, slope, SOFTCAP, ALIBI)
            else:
                begin = (it - n_near) * N
                k_pos = cols
                if ALIBI:
                    k_pos = far_places(ALWAYS, N_ALWAYS, b, begin, cols, S)
                s = shaped(s, 0, q_pos, k_pos, scale, softcap, slope, SOFTCAP, ALIBI)
                s = beyond(s, begin, rows, q_doc, cols, OUTSIDE, N_ALWAYS, FAR_DOC, b, T, S, HAS_RIGHT, DOCUMENTS)
            if it < n_partial:
                s = hidden(s, key, low, high, q_doc, cols, K_DOC, b, S, HAS_LEFT, DOCUMENTS)
            new_top = gl.maximum(top, row_max(s, N, rows_layout) * unit)
            shift = finite(new_top)
            shrink = gl.exp2(top - shift)
            total = total * gl.convert_layout(shrink, gl.SliceLayout(1, lanes_layout))[:, None]
            top = new_top
            x = s * unit - shift[:, None]
            if HALVES:
                x, rest = halves(x, N)
            p = gl.exp2(x)
            total += gl.convert_layout(lane_sums(p, N // 2 if HALVES else N), lanes_layout)
            # Long since true: a branch, across which ptxas does not move the exponentials. Without it they all come
            # after the wait, where no product runs beside them. (Triton synchronises the four warps before they wait
            # for the same array of barriers again: the queries' has not been waited for in this round.)
            mbarrier.wait(q_full.index(slot), (turn >> (SLOTS - 1)) & 1)
            # The weights that wgmma still reads stay in their registers until it is done.
            acc, p_half = warpgroup_mma_wait(0, deps=(acc, p_half))
            acc = acc * gl.convert_layout(shrink, out_rows)[:, None]
            if HALVES:
                rest = gl.exp2(rest)
                total += gl.convert_layout(lane_sums(rest, N // 2), lanes_layout)
                p = joined(p, rest, N, s_layout)
            carried = packed(gl.convert_layout(p.to(dtype), p_layout))
            mbarrier.arrive(empty.index(stage), count=1)

        if SLOTS == 2:
            mbarrier.arrive(q_empty.index(slot), count=1)
        p_half = unpacked(carried, dtype)
        at += n
        stage = at % STAGES
        mbarrier.wait(full.index(stage), (at // STAGES) & 1)
        acc = warpgroup_mma(p_half, v_s.index(stage).reshape([N, E]), acc, is_async=True)
        if SLOTS == 2:
            running = start(q_s, k_s, q_full, full, nothing, turn + 1, n_turns, at, CID, C, N, D, SLOTS, STAGES)

        total = gl.convert_layout(gl.sum(total, 1), rows_layout)
        blind = top == -float("inf")
        if SINK:  # a logit without a value: it enlarges the denominator of rows that see a key
            sink_2 = gl.load(SINKS + h).to(gl.float32) * LOG2E
            with_sink = gl.where(blind, 0.0, gl.maximum(top, sink_2))
            shrink = gl.exp2(top - with_sink)
            total = total * shrink + gl.exp2(sink_2 - with_sink)
            top = with_sink
        total = gl.where(blind, 1.0, total)
        lse = gl.where(blind, -float("inf"), top * LN2 + gl.log(total))
        gl.store(LSE + (b * H + h).to(gl.int64) * T + rows, lse, mask=rows < T)
        factor = 1.0 / total
        if SINK:
            factor = factor * shrink
        acc, p_half = warpgroup_mma_wait(SLOTS - 1, deps=(acc, p_half))
        acc = acc * gl.convert_layout(factor, out_rows)[:, None]
        tma.store_wait(0)  # the last item's rows have left the buffer
        o_s.index(CID).reshape([ROWS, E]).store(acc.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(desc_o, [b, row, h, 0], o_s.index(CID))
        if SLOTS == 1:  # the next queries take the place through which these rows leave
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(slot), count=1)
            running = start(q_s, k_s, q_full, full, nothing, turn + 1, n_turns, at, CID, C, N, D, SLOTS, STAGES)
    warpgroup_mma_wait(0, deps=(running,))
    tma.store_wait(0)


# -- the kernel --------------------------------------------------------------------------------------------------------


# Sizes are not compiled in, nor whether 16 divides them: one kernel serves all lengths and numbers of heads.
@gluon.jit(do_not_specialize=["T", "S", "H", "R", "left", "right", "n_tiles", "width"])
def forward_kernel(
    desc_q, desc_k, desc_v, desc_o, LSE, ORDER, SPANS, Q_DOC, K_DOC, SLOPES, SINKS, desc_far_k, desc_far_v, ALWAYS,
    N_ALWAYS, OUTSIDE, FAR_DOC, T, S, H, R, scale, softcap, left, right, n_tiles, width,
    C: gl.constexpr, N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, CAUSAL: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, DOCUMENTS: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, SINK: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    q_s = gl.allocate_shared_memory(desc_q.dtype, [SLOTS * C, 1, ROWS, 1, D], desc_q.layout)
    k_s = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, N, 1, D], desc_k.layout)
    v_s = gl.allocate_shared_memory(desc_v.dtype, [STAGES, 1, N, 1, E], desc_v.layout)
    if SLOTS == 1 and D == E:
        o_s = q_s
    else:
        o_s = gl.allocate_shared_memory(desc_o.dtype, [C, 1, ROWS, 1, E], desc_o.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS * C, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [SLOTS * C, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS * C):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=C)
    # warp_specialize takes constants only where they stand in its tuples.
    if C == 2:
        gl.warp_specialize(
            [
                (consume, (
                    q_s, k_s, v_s, o_s, q_full, q_empty, full, empty,
                    desc_o, LSE, ORDER, SPANS, Q_DOC, K_DOC, SLOPES, SINKS, ALWAYS, N_ALWAYS, OUTSIDE, FAR_DOC, T, S, H,
                    scale, softcap, left, right, n_tiles, width, 0, C, N, D, E, SLOTS, STAGES, CAUSAL,
                    HAS_LEFT, HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI, SINK, HALVES,
                )),
                (consume, (
                    q_s, k_s, v_s, o_s, q_full, q_empty, full, empty,
                    desc_o, LSE, ORDER, SPANS, Q_DOC, K_DOC, SLOPES, SINKS, ALWAYS, N_ALWAYS, OUTSIDE, FAR_DOC, T, S, H,
                    scale, softcap, left, right, n_tiles, width, 1, C, N, D, E, SLOTS, STAGES, CAUSAL,
                    HAS_LEFT, HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI, SINK, HALVES,
                )),
                (produce, (
                    desc_q, desc_k, desc_v, q_s, k_s, v_s, q_full, q_empty, full, empty, ORDER,
                    SPANS, desc_far_k, desc_far_v, N_ALWAYS, T, S, H, R, left, right, n_tiles, width, C, N, SLOTS,
                    STAGES, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS,
                )),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (
                    q_s, k_s, v_s, o_s, q_full, q_empty, full, empty,
                    desc_o, LSE, ORDER, SPANS, Q_DOC, K_DOC, SLOPES, SINKS, ALWAYS, N_ALWAYS, OUTSIDE, FAR_DOC, T, S, H,
                    scale, softcap, left, right, n_tiles, width, 0, C, N, D, E, SLOTS, STAGES, CAUSAL,
                    HAS_LEFT, HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI, SINK, HALVES,
                )),
                (consume, (
                    q_s, k_s, v_s, o_s, q_full, q_empty, full, empty,
                    desc_o, LSE, ORDER, SPANS, Q_DOC, K_DOC, SLOPES, SINKS, ALWAYS, N_ALWAYS, OUTSIDE, FAR_DOC, T, S, H,
                    scale, softcap, left, right, n_tiles, width, 1, C, N, D, E, SLOTS, STAGES, CAUSAL,
                    HAS_LEFT, HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI, SINK, HALVES,
                )),
                (consume, (
                    q_s, k_s, v_s, o_s, q_full, q_empty, full, empty,
                    desc_o, LSE, ORDER, SPANS, Q_DOC, K_DOC, SLOPES, SINKS, ALWAYS, N_ALWAYS, OUTSIDE, FAR_DOC, T, S, H,
                    scale, softcap, left, right, n_tiles, width, 2, C, N, D, E, SLOTS, STAGES, CAUSAL,
                    HAS_LEFT, HAS_RIGHT, DOCUMENTS, SOFTCAP, ALIBI, SINK, HALVES,
                )),
                (produce, (
                    desc_q, desc_k, desc_v, q_s, k_s, v_s, q_full, q_empty, full, empty, ORDER,
                    SPANS, desc_far_k, desc_far_v, N_ALWAYS, T, S, H, R, left, right, n_tiles, width, C, N, SLOTS,
                    STAGES, CAUSAL, HAS_LEFT, HAS_RIGHT, DOCUMENTS,
                )),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
