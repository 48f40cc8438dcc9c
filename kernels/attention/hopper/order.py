"""Who works on what in a persistent grid: pure functions of sizes, computed once for each of them.

Legend: an item is a tile of query rows of one head of one sequence; its number is head · n_tiles + tile, where `head`
counts batch × heads.
"""

from __future__ import annotations

import heapq
from functools import lru_cache

import numpy as np

from ..ranges import key_range, tile_range
from ..spec import AttentionSpec

_OF_DOCUMENTS = 4
_PER_ITEM = 1  # what an item costs beside its tiles of keys, in tiles: its first scores and the writing of its rows


@lru_cache(maxsize=256)
def schedule(spec: AttentionSpec, n_queries: int, n_keys: int, n_heads: int, group: int, programs: int,
             rows: int, columns: int, far: int = 0) -> np.ndarray:  # fmt: skip
    """[programs, 1 + most] int32. A row: how many items the program has, then these, in order.

    `group` heads at a time, so that their keys and values stay in the L2 cache; of these the longest items first, each
    to whoever is done first (Graham 1969). That is what a counter in memory would come to, without the counter: what
    still runs at the end is short. `far` tiles of keys that may be seen from everywhere come to each item's own.

    Where documents begin nobody knows here. Items count for at most _OF_DOCUMENTS tiles then: over eight settings of
    packed documents with eight draws each the busiest of 132 programs had 9 to 19 % more than its share on average (if
    all counted as one document 8 to 31 %), with a single document 4 and 9 % (none).
    """
    lengths = visits(spec, n_queries, n_keys, rows, columns)
    if spec.documents:
        lengths = [min(n, _OF_DOCUMENTS) for n in lengths]
    lengths = [n + far for n in lengths]
    tiles = sorted(range(len(lengths)), key=lambda tile: (-lengths[tile], -tile))
    found: list[list[int]] = [[] for _ in range(programs)]
    free = [(0, program) for program in range(programs)]  # (when, who); a heap
    for begin in range(0, n_heads, group):
        for tile in tiles:
            for head in range(begin, min(begin + group, n_heads)):
                at, program = free[0]
                heapq.heapreplace(free, (at + lengths[tile] + _PER_ITEM, program))
                found[program].append(head * len(lengths) + tile)
    table = np.zeros((programs, 1 + max(map(len, found))), dtype=np.int32)
    for program, items in enumerate(found):
        table[program, : 1 + len(items)] = (len(items), *items)
    return table


def visits(spec: AttentionSpec, n_queries: int, n_keys: int, rows: int, columns: int) -> list[int]:
    """How many tiles of keys each tile of queries visits; as if all were one document."""
    window = spec.window
    flags = (int(spec.causal), int(window.left is not None), int(window.right is not None and not spec.causal))
    found = []
    for start in range(0, n_queries, rows):
        seen = key_range(
            start, rows, n_queries, n_keys, n_keys - n_queries, window.left or 0, window.right or 0, *flags
        )
        first, _, _, end = tile_range(*seen, columns)
        found.append(max(end - first, 1))
    return found
