"""Which keys a tile of queries can see, and which queries a tile of keys: pure integer functions.

They hold for attention whose positions are arithmetic: n_q queries and n_k keys, one position apart, query row i at
position i + shift, key j at position j. (A dilated window becomes that by residue classes: `residue_class`.) The
kernels call these very functions, compiled, so they use only integers, `min`, `max` and `//` of non-negative numbers,
and flags are ints. The tests check each of them exhaustively against `AttentionContext.allowed`.

A range is four numbers (lo, full_lo, full_hi, hi): nobody in the tile sees anything outside [lo, hi), everybody in it
sees all of [full_lo, full_hi). `full_lo >= full_hi` says that nothing is seen by all.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .spec import AttentionSpec


def key_range(
    start: int,
    count: int,
    n_q: int,
    n_k: int,
    shift: int,
    left: int,
    right: int,
    CAUSAL: int,
    HAS_LEFT: int,
    HAS_RIGHT: int,
) -> tuple[int, int, int, int]:
    """The keys that the query rows [start, start + count) of n_q see; `left`, `right` count only if HAS_… says so."""
    first = start + shift
    last = min(start + count, n_q) - 1 + shift
    lo = 0
    full_lo = 0
    hi = n_k
    full_hi = n_k
    if CAUSAL:
        hi = min(hi, last + 1)
        full_hi = min(full_hi, first + 1)
    if HAS_RIGHT:
        hi = min(hi, last + right + 1)
        full_hi = min(full_hi, first + right + 1)
    if HAS_LEFT:
        lo = max(lo, first - left)
        full_lo = max(full_lo, last - left)
    return lo, full_lo, full_hi, hi


def query_range(
    start: int,
    count: int,
    n_q: int,
    n_k: int,
    shift: int,
    left: int,
    right: int,
    CAUSAL: int,
    HAS_LEFT: int,
    HAS_RIGHT: int,
) -> tuple[int, int, int, int]:
    """The query rows that see the keys [start, start + count) of n_k: the inverse of `key_range`."""
    first = start
    last = min(start + count, n_k) - 1
    lo = 0
    full_lo = 0
    hi = n_q
    full_hi = n_q
    if CAUSAL:
        lo = max(lo, first - shift)
        full_lo = max(full_lo, last - shift)
    if HAS_RIGHT:
        lo = max(lo, first - right - shift)
        full_lo = max(full_lo, last - right - shift)
    if HAS_LEFT:
        hi = min(hi, last + left + 1 - shift)
        full_hi = min(full_hi, first + left + 1 - shift)
    return lo, full_lo, full_hi, hi


def tile_range(lo: int, full_lo: int, full_hi: int, hi: int, TILE: int) -> tuple[int, int, int, int]:
    """A range in tiles of TILE: (first, first full, end of full, end), first <= first full <= end of full <= end."""
    first = max(lo, 0) // TILE
    end = max(first, (max(hi, 0) + TILE - 1) // TILE)
    first_full = min(max(first, (max(full_lo, 0) + TILE - 1) // TILE), end)
    end_full = min(max(first_full, max(full_hi, 0) // TILE), end)
    return first, first_full, end_full, end


def residue_class(residue: int, dilation: int, n_queries: int, n_keys: int) -> tuple[int, int, int, int]:
    """(first query row, queries, keys, shift) of the positions that are `residue` modulo `dilation`.

    Attention under a dilated window never leaves a residue class, and within one it is attention under an adjacent
    window: row r, r + d, r + 2d … see keys residue, residue + d, …, at positions that are 0, 1, 2 … in units of d.
    """
    behind = n_keys - n_queries  # the position of query row 0
    row = ((residue - behind) % dilation + dilation) % dilation
    queries = (max(n_queries - row, 0) + dilation - 1) // dilation
    keys = (max(n_keys - residue, 0) + dilation - 1) // dilation
    shift = (row + behind - residue) // dilation  # exact
    return row, queries, keys, shift


# -- block-sparse layouts: lists of tiles instead of one range --------------------------------------------------------


@lru_cache(maxsize=256)
def tile_lists(
    spec: AttentionSpec, n_queries: int, n_keys: int, q_tile: int, kv_tile: int, *, by_key: bool, may_be_full: bool
) -> np.ndarray:
    """[tiles, 4 + longest] int32. A row: its tile, how many tiles are partly visible from it, how many wholly, then
    those, then these; the last column is there to be read ahead. Longest rows first: no long one is left to the end.

    Tiles of queries list tiles of keys, or the other way round (`by_key`). A pair of tiles is listed
    when the block layout, the window and causality leave any of its pairs visible; it is whole when they leave all of
    them (never when `may_be_full` is false: then something else may still hide a pair).
    Raises ValueError when a position lies past the pattern.
    """
    layout = spec.block_sparse
    if layout is None:
        raise ValueError("tile_lists: the spec has no block_sparse layout")
    pattern = np.asarray(layout.pattern, dtype=bool)
    if n_keys > pattern.shape[0] * layout.q_block or n_keys > pattern.shape[1] * layout.kv_block:
        raise ValueError(
            f"block_sparse covers {pattern.shape[0] * layout.q_block} query and {pattern.shape[1] * layout.kv_block} "
            f"key positions, but the call reaches {n_keys} and {n_keys}"
        )
    q_first, q_last = _tile_ends(n_queries, q_tile, n_keys - n_queries)
    k_first, k_last = _tile_ends(n_keys, kv_tile, 0)
    some, every = _blocks_between(pattern, layout.q_block, layout.kv_block, (q_first, q_last), (k_first, k_last))

    left, right = spec.window.span
    q_first, q_last = q_first[:, None], q_last[:, None]
    if spec.causal:
        some &= k_first <= q_last
        every &= k_last <= q_first
    if right is not None:
        some &= k_first <= q_last + right
        every &= k_last <= q_first + right
    if left is not None:
        some &= k_last >= q_first - left
        every &= k_first >= q_last - left
    whole_tiles = (np.arange(len(q_first)) + 1) * q_tile <= n_queries
    every &= whole_tiles[:, None] & ((np.arange(len(k_first)) + 1) * kv_tile <= n_keys)
    if not may_be_full or spec.window.dilation > 1:
        every &= False
    if by_key:
        some, every = some.T, every.T
    return _as_lists(some & ~every, every)


def _tile_ends(n: int, tile: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last position of each tile."""
    first = np.arange(0, max(n, 1), tile)
    return first + offset, np.minimum(first + tile, n) - 1 + offset


def _blocks_between(
    pattern: np.ndarray,
    q_block: int,
    kv_block: int,
    q_ends: tuple[np.ndarray, np.ndarray],
    k_ends: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of tiles: does any, does every block that they touch lie in the pattern?"""
    counts = np.zeros((pattern.shape[0] + 1, pattern.shape[1] + 1), dtype=np.int64)
    counts[1:, 1:] = pattern.cumsum(axis=0).cumsum(axis=1)
    # Positions before the first key lie in no block; such rows see nothing, and no tile with one of them is whole.
    q_from, q_to = (np.maximum(end, 0) // q_block for end in q_ends)
    k_from, k_to = (end // kv_block for end in k_ends)
    q_to, k_to = q_to + 1, k_to + 1
    inside = (
        counts[q_to[:, None], k_to]
        - counts[q_from[:, None], k_to]
        - counts[q_to[:, None], k_from]
        + counts[q_from[:, None], k_from]
    )
    touched = (q_to - q_from)[:, None] * (k_to - k_from)
    visible = (q_ends[1] >= 0)[:, None]
    return (inside > 0) & visible, (inside == touched) & (q_ends[0] >= 0)[:, None]


def _as_lists(partial: np.ndarray, full: np.ndarray) -> np.ndarray:
    length = (partial | full).sum(axis=1)
    lists = np.zeros((len(length), 4 + int(length.max(initial=0))), dtype=np.int32)
    for row, tile in enumerate(np.argsort(-length, kind="stable")):
        some, every = np.flatnonzero(partial[tile]), np.flatnonzero(full[tile])
        listed = (tile, len(some), len(every), *some, *every)
        lists[row, : len(listed)] = listed
    return lists
