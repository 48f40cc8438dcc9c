"""dq in fp32 while many programs add to it: squares of ROWS · ROWS, each as a consumer has it in its registers.

A square is LINES lines of numbers, one of each thread of a consumer. So a thread writes 16 bytes at a time to shared
memory, no two of its quarter of a warp meet in a bank, and what TMA adds to is one piece of memory. [B, H, tiles of
queries, CONSUMERS] squares are all of dq: of a tile each consumer's half, of its columns or, where there are ROWS
columns, of its queries.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .backward import CONSUMERS
from .forward import ROWS

LINES: gl.constexpr = gl.constexpr(128)


@gluon.jit
def by_thread(square):
    """[LINES, ROWS · ROWS // LINES] of [ROWS, ROWS] as wgmma leaves it: nothing moves."""
    # rows are (warp, half, lane // 4), columns (piece, lane % 4, pair)
    x = gl.permute(square.reshape([4, 2, 8, 8, 4, 2]), (0, 2, 4, 3, 1, 5))
    return x.reshape([LINES, ROWS * ROWS // LINES])


@gluon.jit(do_not_specialize=["T", "H", "tiles"])  # a D that 16 divides is written four bytes at a time
def round_kernel(
    SUMS, DQ, scale, q_b, q_t, q_h, T, H, D, tiles, WIDE: gl.constexpr,
):  # fmt: skip
    """DQ [B, T, H, D] from SUMS, times the scale. A program has one square. WIDE: a tile is ROWS queries, whose columns
    the consumers share; otherwise CONSUMERS · ROWS queries of ROWS columns."""
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    at = gl.program_id(0)
    head = at // (tiles * CONSUMERS)
    half = at % CONSUMERS
    row = at // CONSUMERS % tiles * ROWS
    col = half * ROWS
    if not WIDE:
        row = row * CONSUMERS + half * ROWS
        col = 0
    line = gl.arange(0, LINES, gl.SliceLayout(1, flat))
    place = gl.arange(0, ROWS * ROWS // LINES, gl.SliceLayout(0, flat))
    begin = SUMS + at.to(gl.int64) * (ROWS * ROWS)
    x = gl.load(begin + (line * (ROWS * ROWS // LINES))[:, None] + place[None, :])
    # (warp, lane // 4, lane % 4, piece, half, pair) back to rows and columns. Four lines are two rows: as they were
    # read, a warp writes 128 bytes of a row at a time.
    x = gl.permute(x.reshape([4, 8, 4, 8, 2, 2]), (0, 4, 1, 3, 2, 5)).reshape([ROWS, ROWS]) * scale
    square: gl.constexpr = x.type.layout
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, square))
    cols = col + gl.arange(0, ROWS, gl.SliceLayout(0, square))
    dq = DQ + (head // H).to(gl.int64) * q_b + (head % H).to(gl.int64) * q_h
    gl.store(dq + (rows.to(gl.int64) * q_t)[:, None] + cols[None, :], x, mask=(rows < T)[:, None] & (cols < D)[None, :])
