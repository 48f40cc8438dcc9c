"""What the kernels share: who sees whom, scores, dropout, and where rows lie. All are device functions.

Positions, documents and flags come as vectors that the caller has already spread along its tile's other axis, so the
same functions serve tiles of queries × keys (forward, dq) and of keys × queries (dk, dv).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import ranges

INTERPRETED: bool = triton.knobs.runtime.interpret
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
FAR: tl.constexpr = tl.constexpr(2**31 - 1)

# The pure functions as the kernels call them: compiled, or as they are under the interpreter.
key_range = ranges.key_range if INTERPRETED else triton.jit(ranges.key_range)
query_range = ranges.query_range if INTERPRETED else triton.jit(ranges.query_range)
tile_range = ranges.tile_range if INTERPRETED else triton.jit(ranges.tile_range)
residue_class = ranges.residue_class if INTERPRETED else triton.jit(ranges.residue_class)


@triton.jit
def permitted(q_pos, k_pos, q_doc, k_doc, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Causality and documents: what even a global token obeys."""
    ok = q_pos == q_pos
    if CAUSAL:
        ok = ok & (k_pos <= q_pos)
    if DOCUMENTS:
        ok = ok & (q_doc == k_doc)
    return ok


@triton.jit
def neighbours(
    q_pos,
    k_pos,
    left,
    right,
    dilation,
    LAYOUT,
    q_block,
    kv_block,
    q_blocks,
    kv_blocks,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    MODULO: tl.constexpr,
):
    """In the window, and in the block layout where there is one; `left` and `right` count keys `dilation` apart."""
    back = q_pos - k_pos
    ok = back == back
    if HAS_LEFT:
        ok = ok & (back <= left * dilation)
    if HAS_RIGHT:
        ok = ok & (back >= -right * dilation)
    if MODULO:
        # of a non-negative number: `%` of negative ones differs between the interpreter and the GPU
        ok = ok & (tl.where(back < 0, -back, back) % dilation == 0)
    if LAYOUT is not None:
        q_at, k_at = tl.maximum(q_pos, 0) // q_block, tl.maximum(k_pos, 0) // kv_block
        known = (q_pos >= 0) & (k_pos >= 0) & (q_at < q_blocks) & (k_at < kv_blocks)
        cell = q_at * kv_blocks + k_at
        ok = ok & known & (tl.load(LAYOUT + cell, mask=known, other=0) != 0)
    return ok


@triton.jit
def scores(qk, q_pos, k_pos, scale, softcap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """(scores, tanh of the softcap), of raw products `qk`; scale, then softcap, then ALiBi. `unit` times the scores is
    in units of log 2: where nothing but the scale happens, that product waits to be fused into the exponent."""
    tanh = qk
    s = qk
    if SOFTCAP:
        x = qk * (scale / softcap)
        shrunk = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        tanh = (1.0 - shrunk) / (1.0 + shrunk)
        tanh = tl.where(x < 0, -tanh, tanh)
        s = tanh * (softcap * LOG2E)
    if ALIBI:
        if not SOFTCAP:
            s = s * (scale * LOG2E)
        s -= slope * LOG2E * tl.abs(q_pos - k_pos).to(tl.float32)
    return s, tanh


@triton.jit
def unit_of(scale, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """What `scores` must be multiplied by to be in units of log 2."""
    unit = 1.0
    if not SOFTCAP and not ALIBI:
        unit = scale * LOG2E
    return unit


@triton.jit
def kept(seed, p, head_row, keys, n_keys):
    """Dropout's mask: `head_row` is (b * H + h) * T + query row, int64 (reference.dropout_keep has the definition)."""
    return tl.rand(seed, head_row * n_keys + keys) >= p


@triton.jit
def tile_at(it, listed, first, first_full, end_full, LISTED: tl.constexpr):
    """The it-th partly visible tile: those before the full ones, then those after; or the one that a list names."""
    tile = listed
    if not LISTED:
        before = first_full - first
        tile = tl.where(it < before, first + it, end_full + it - before)
    return tile


@triton.jit
def load_rows(ptr, offsets, ok, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_DIM] at ptr + offsets (a column) + 0 … DIM - 1; zeros where not ok and beyond DIM."""
    columns = tl.arange(0, BLOCK_DIM)
    ptrs = ptr + offsets[:, None] + columns[None, :]
    if MASKED:
        if DIM == BLOCK_DIM:
            rows = tl.load(ptrs, mask=ok[:, None], other=0.0)
        else:
            rows = tl.load(ptrs, mask=ok[:, None] & (columns[None, :] < DIM), other=0.0)
    elif DIM == BLOCK_DIM:
        rows = tl.load(ptrs)
    else:
        rows = tl.load(ptrs, mask=columns[None, :] < DIM, other=0.0)
    return rows


@triton.jit
def store_rows(ptr, offsets, ok, rows, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    columns = tl.arange(0, BLOCK_DIM)
    tl.store(
        ptr + offsets[:, None] + columns[None, :],
        rows.to(ptr.dtype.element_ty),
        mask=ok[:, None] & (columns[None, :] < DIM),
    )
