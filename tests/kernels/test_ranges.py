"""Tile ranges and lists against `AttentionContext.allowed`, for every small shape."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from longspan.kernels.attention import AttentionContext, AttentionSpec, BlockLayout, Window
from longspan.kernels.attention.ranges import key_range, query_range, residue_class, tile_lists, tile_range

SHAPES = [(T, S) for T in (1, 2, 5, 8, 13) for S in (1, 3, 8, 11, 16)]
WINDOWS = [Window(left, right) for left in (None, 0, 1, 4, 20) for right in (None, 0, 2, 20)]


def visible(spec: AttentionSpec, T: int, S: int) -> np.ndarray:
    return AttentionContext().allowed(spec, slice(0, T), slice(0, S), lengths=(T, S))[0].numpy()


def flags(spec: AttentionSpec) -> tuple[int, int, int, int, int]:
    window = spec.window
    return (
        window.left or 0,
        window.right or 0,
        int(spec.causal),
        int(window.left is not None),
        int(window.right is not None and not spec.causal),
    )


def check_range(found: tuple[int, int, int, int], seen: np.ndarray) -> None:
    """`seen` [rows of the tile, other side]: outside [lo, hi) nothing, in [full_lo, full_hi) everything."""
    lo, full_lo, full_hi, hi = found
    lo, hi = max(lo, 0), max(hi, 0)
    assert not seen[:, :lo].any()
    assert not seen[:, hi:].any()
    if full_lo < full_hi:
        assert full_lo >= 0
        assert seen[:, full_lo:full_hi].all()
    some, every = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.all(axis=0))
    if len(some):  # and the bounds are tight
        assert (lo, hi) == (some[0], some[-1] + 1)
    assert len(every) == max(0, full_hi - max(full_lo, 0))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), SHAPES)
def test_ranges_are_exact(T: int, S: int, causal: bool) -> None:
    for window, tile in itertools.product(WINDOWS, (1, 3, 4)):
        spec = AttentionSpec(causal=causal, window=window)
        seen = visible(spec, T, S)
        for start in range(0, T, tile):
            check_range(key_range(start, tile, T, S, S - T, *flags(spec)), seen[start : start + tile])
        for start in range(0, S, tile):
            check_range(query_range(start, tile, T, S, S - T, *flags(spec)), seen[:, start : start + tile].T)


def test_a_range_in_tiles() -> None:
    for lo, full_lo, full_hi, hi in itertools.product(range(-3, 12), repeat=4):
        first, first_full, end_full, end = tile_range(lo, full_lo, full_hi, hi, 4)
        assert 0 <= first <= first_full <= end_full <= end
        tiles = {key // 4 for key in range(max(lo, 0), max(hi, 0))}
        assert tiles <= set(range(first, end))
        for tile in range(first_full, end_full):
            assert full_lo <= 4 * tile
            assert 4 * tile + 4 <= full_hi
        if lo <= full_lo <= full_hi <= hi and lo >= 0:  # a proper range: neither list is longer than it has to be
            assert tiles == set(range(first, end)) or lo == hi
            full = {t for t in range(4) if full_lo <= 4 * t and 4 * t + 4 <= full_hi}
            assert len(full) == end_full - first_full


@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
@pytest.mark.parametrize(("T", "S"), SHAPES)
def test_a_dilated_window_is_an_adjacent_one_in_each_residue_class(T: int, S: int, dilation: int) -> None:
    for causal, left, right in itertools.product((True, False), (None, 0, 2), (None, 0, 1)):
        spec = AttentionSpec(causal=causal, window=Window(left, right, dilation))
        seen = visible(spec, T, S)
        rebuilt = np.zeros_like(seen)
        rows_met = []
        for residue in range(dilation):
            row, n_q, n_k, shift = residue_class(residue, dilation, T, S)
            rows, keys = row + dilation * np.arange(n_q), residue + dilation * np.arange(n_k)
            rows_met += rows.tolist()
            for i in range(n_q):
                lo, full_lo, full_hi, hi = key_range(i, 1, n_q, n_k, shift, *flags(spec))
                assert (max(lo, 0), max(hi, 0, lo)) == (full_lo, max(full_hi, full_lo)) or hi <= lo
                rebuilt[rows[i], keys[max(lo, 0) : max(hi, 0)]] = True
        assert sorted(rows_met) == list(range(T))
        assert (rebuilt == seen).all()


def butterfly(n: int) -> list[list[bool]]:
    return [[(i ^ j) & ((i ^ j) - 1) == 0 for j in range(n)] for i in range(n)]


LAYOUTS = [
    BlockLayout.from_rows(butterfly(8), q_block=4, kv_block=4),
    BlockLayout.from_rows([[1, 0, 1], [0, 1, 1], [1, 0, 0]], q_block=7, kv_block=6),
    BlockLayout.from_rows([[1]], q_block=64, kv_block=64),
    BlockLayout.from_rows([[0, 1], [0, 0]], q_block=9, kv_block=9),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [Window(), Window(left=5), Window(3, 4), Window(2, 2, 2)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_lists_hold_every_tile_once(layout: BlockLayout, window: Window, causal: bool) -> None:
    spec = AttentionSpec(causal=causal, window=window, block_sparse=layout)
    for (T, S), (q_tile, kv_tile) in itertools.product(((18, 18), (5, 17), (18, 9), (1, 16)), ((4, 4), (8, 4), (3, 5))):
        seen = visible(spec, T, S)
        for by_key in (False, True):
            lists = tile_lists(spec, T, S, q_tile, kv_tile, by_key=by_key, may_be_full=True)
            picture = seen.T if by_key else seen
            rows, columns = (kv_tile, q_tile) if by_key else (q_tile, kv_tile)
            assert len(lists) == -(-picture.shape[0] // rows)
            assert sorted(lists[:, 0]) == list(range(len(lists)))
            assert (np.diff(lists[:, 1] + lists[:, 2]) <= 0).all(), "longest first"
            for at, n_partial, n_full, *tiles in lists.tolist():
                listed = tiles[: n_partial + n_full]
                assert len(set(listed)) == len(listed)
                strip = picture[at * rows : (at + 1) * rows]
                for tile in range(-(-picture.shape[1] // columns)):
                    block = strip[:, tile * columns : (tile + 1) * columns]
                    assert tile in listed or not block.any()
                    if tile in tiles[n_partial : n_partial + n_full]:
                        assert block.all()
                        assert block.shape == (rows, columns)


def test_an_aligned_layout_visits_exactly_its_blocks() -> None:
    layout = LAYOUTS[0]
    spec = AttentionSpec(causal=False, block_sparse=layout)
    lists = tile_lists(spec, 32, 32, 4, 4, by_key=False, may_be_full=True)
    assert int(lists[:, 1].sum()) == 0
    assert int(lists[:, 2].sum()) == sum(map(sum, layout.pattern))
    hidden = tile_lists(spec, 32, 32, 4, 4, by_key=False, may_be_full=False)
    assert int(hidden[:, 1].sum()) == int(lists[:, 2].sum())


def test_lists_refuse_positions_past_the_pattern() -> None:
    spec = AttentionSpec(causal=False, block_sparse=LAYOUTS[0])
    with pytest.raises(ValueError, match="covers 32 query and 32 key positions, but the call reaches 33"):
        tile_lists(spec, 33, 33, 4, 4, by_key=False, may_be_full=True)
