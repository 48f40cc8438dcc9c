"""The backward kernels for Hopper (sm_90): dk and dv by tiles of keys, dq by tiles of queries. A producer warp loads by
TMA, two consumers of four warps do everything else; both kernels recompute the weights from the lse.

As two kernels nothing is added atomically and gradients are deterministic, for seven products a tile instead of five.
Where `tiles.adds_dq` says so and nobody asks for determinism, the first kernel adds up dq, too, in any order. dk and dv
of a key/value head are summed over its group of query heads inside the program.

    P = exp(s - lse)      dP = dO · Vᵀ      dS = P ∘ (dP - delta)      delta = rowsum(dO ∘ O) - dlse
    dQ = scale · dS · K   dK = scale · dSᵀ · Q   dV = Pᵀ · dO

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 2); transposed scores, whose weights are left operands
from registers, and specialised warps from FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608).

Legend: B batch, T queries, S keys, H query heads, G key/value heads, R = H // G, D and E head dims (padded: what lies
beyond the tensors' own is read as zeros and not written); a consumer owns ROWS keys (dk, dv) or queries (dq); M rows of
a tile of queries, N keys of a tile of keys.

A program's tiles of the other side are counted `it = 0 … n - 1`: first those in which something is hidden from
somebody, then those that are seen whole, for which no mask is computed. Statistics of rows come as what is added:
-delta, and -lse in the unit of the products (in log 2 where softcap or ALiBi change them); in its place -inf for
queries that are not there and those that see nothing: their weights are 0.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .forward import LOG2E

CONSUMERS: gl.constexpr = gl.constexpr(2)
STATS_ROWS: gl.constexpr = gl.constexpr(32)


# -- what both kernels read of a row -----------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["T", "H", "rounded"])  # an E that 16 divides is read 16 bytes at a time
def stats_kernel(
    OUT, D_OUT, LSE, D_LSE, STATS, factor, o_b, o_t, o_h, do_b, do_t, do_h, T, H, E, rounded, WIDTH: gl.constexpr,
):  # fmt: skip
    """STATS [B · H, 2, rounded] fp32, `rounded` a multiple of all tiles: the lse times `factor`, which is negative, and
    -delta. Of rows that are not there -inf and 0, and -inf instead of the lse of those that see nothing. A program has
    STATS_ROWS rows of a head."""
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
    gl.store(stats, gl.where(lse == -float("inf"), lse, lse * factor))
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
