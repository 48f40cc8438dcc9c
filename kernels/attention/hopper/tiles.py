"""Which tile sizes the Hopper kernel runs with, and how many heads it works on at a time: pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import AttentionSpec

ROWS = 64  # of queries, that a consumer owns
HEAD_DIMS = (64, 128, 256)  # in shared memory; head dims between are read as if zeros followed
LARGEST = HEAD_DIMS[-1]


@dataclass(frozen=True, slots=True)
class Tiles:
    """consumers  of four warps and ROWS queries each
    columns    keys of a tile
    stages     tiles of keys, and as many of values, that shared memory holds
    registers  of a consumer's thread; the producer gives away its own
    halves     the exponentials of a tile's right half come after the wait for the product that runs beside those of
               its left half: what follows the wait runs beside them
    slots      places for a consumer's queries: 2, so that the next item's come while it works, or 1, through which the
               output leaves, too (if as wide: else it has its own)
    """

    consumers: int
    columns: int
    stages: int
    registers: int
    halves: bool = False
    slots: int = 2

    @property
    def rows(self) -> int:
        return self.consumers * ROWS

    @property
    def compiled_registers(self) -> int:
        """Of a thread when the program starts, in multiples of 8 and such that all warps fit: the producer's warp is
        filled up to a group of four."""
        return 65_536 // ((self.consumers + 1) * 128) // 8 * 8


def padded(head_dim: int) -> int:
    """The width in shared memory. Raises ValueError above the largest."""
    for width in HEAD_DIMS:
        if head_dim <= width:
            return width
    raise ValueError(f"head_dim={head_dim}: the Hopper kernel has tiles up to {LARGEST}")


def choose(head_dim: int, *, edges: bool = False) -> Tiles:
    """Tiles for a head dim (the larger of q's and v's). `edges`: a window's left side or documents hide keys, too, or
    softcap or ALiBi want registers."""
    return (_EDGES if edges else _TILES)[padded(head_dim)]


# One H100, TFLOP/s at 16,384 tokens causal, 4,096 causal, and 16,384 full (docs/log.md).
_TILES = {
    # In one run: 527, 443, 443 (best 500); without halves 516, 414, 486 (511); two consumers 458, 414, 426 (439), with
    # halves 470, 394, 424 (462); with one or two of eight exponentials by polynomials 463, 401, 470 and 454, 394,
    # 462 (log.md). Full attention was faster without halves; one tile serves both.
    64: Tiles(3, 128, 4, 160, halves=True),
    128: Tiles(2, 128, 2, 240, halves=True),  # 691; without halves 665, again 600
    256: Tiles(2, 64, 2, 240, slots=1),  # 772, 635 causal; no other tiles were timed
}
# A taller tile has more of an edge. In one run, ms without halves / with them / with three consumers: windows of 1,024
# keys at 65,536 tokens 1.63 / 1.57 / 1.74, packed documents 1.28 / 1.19 / 1.39.
_EDGES = {**_TILES, 64: Tiles(2, 128, 4, 240, halves=True)}


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """Of the two kernels of the backward pass, each of two consumers that own ROWS keys or queries.

    queries, query_stages  of a tile that passes the keys of dk and dv; tiles that shared memory holds, at least two: a
                           consumer waits for the next before it gives one back
    keys, key_stages       of a tile that passes the queries of dq
    registers              of a consumer's thread; the producer gives away its own
    owners                 consumers with keys of their own, for dk and dv: 2, or 1, with whose keys the first consumer
                           sums up dk and the second dv
    """

    queries: int
    query_stages: int
    keys: int
    key_stages: int
    registers: int = 240
    owners: int = 2

    rows = 2 * ROWS  # of queries that a program owns, and of keys (with one owner half as many)
    compiled_registers = 168  # of a thread when the program starts: as in `Tiles`


def choose_backward(head_dim: int, *, curved: bool = False, documents: bool = False) -> BackwardTiles:
    """Tiles of the backward pass for a head dim (the larger of q's and v's). `curved`: softcap or ALiBi keep more of a
    score in registers than its weight; `documents`: a mask that compares ids."""
    table = _CURVED if curved else _DOCUMENTS if documents else _BACKWARD
    return table[padded(head_dim)]


# Keys that a query sees on average, from which on dq comes on the way. The fp32 sums are set to zero, added to and
# rounded, which takes time by rows; what is saved is by pairs. One H100, ms of the whole backward pass with dq on the
# way / in a pass of its own (docs/log.md). d64, causal: 16,384 tokens 5.28 / 6.76, 4,096 1.66 / 1.99, 2,048
# 1.04 / 1.13, 1,024 0.81 / 0.80; windows of 1,024 keys 3.70 / 4.36. d128: windows of 4,096 keys 9.79 / 11.16, of 1,024
# 0.90 / 0.94; 2,048 tokens causal 0.99 / 0.97, 1,024 0.67 / 0.66.
_WORTH_IT = {64: 1024, 128: 2048}


def adds_dq(spec: AttentionSpec, n_queries: int, n_keys: int, head_dim: int, value_dim: int) -> bool:
    """Whether dq comes from the kernel of dk and dv, added up in whatever order: five products of a tile instead of
    seven, for fp32 sums in memory. Not where softcap or ALiBi need the registers, nor between documents, of which
    nobody knows here how long they are, nor with global or sink tokens, whose keys that kernel does not see all; nor
    where a tile has keys that are not there and causality does not hide: their weights, exp(-lse), may be infinite, and
    infinity times a key of zeros is no number."""
    widths = padded(head_dim), padded(value_dim)
    if spec.softcap is not None or spec.alibi or spec.documents or spec.global_tokens or spec.sink_tokens:
        return False
    if widths[0] != widths[1] or widths[0] not in _WORTH_IT or (not spec.causal and n_keys % BackwardTiles.rows):
        return False
    window, half = spec.window, n_queries // 2
    before = n_keys - half if window.left is None else window.left + 1
    behind = 0 if spec.causal else half if window.right is None else window.right
    return min(before + behind, n_keys) >= _WORTH_IT[widths[0]]


# One H100 (docs/results.md), ms for dk and dv, then for dq: 16,384 tokens causal, full, and causal in groups of four;
# 4,096 tokens causal. Differences of up to 3 % are noise. Windows were not timed.
_BACKWARD = {
    # 128 × 2: 3.67, 7.40, 3.85, 1.20; 128 × 3: 3.84, 7.48, 4.01, 1.22; 64 × 4: 4.56, 8.60, 4.67, 1.44;
    # 64 × 6: 4.19, 8.46, 4.14, 1.45
    # 128 × 3: 2.84, 5.46, 2.97, 0.94; 128 × 4: 2.87, 5.55, 2.87, 0.91; 64 × 4: 3.17, 6.26, 3.31, 0.98
    64: BackwardTiles(128, 2, 128, 3),
    # 64 × 2: 3.42, 7.05, 3.55, 1.22; 64 × 3: 3.69, 7.24, 3.41, 1.21; 64 × 4: 3.58, 7.00, 3.55, 1.21;
    # 32 × 4: 4.04, 8.26, 4.32, 1.24
    # 128 × 2: 2.36, 4.47, 2.35, 0.84; 64 × 3: 2.48, 4.71, 2.51, 0.86; 64 × 4: 2.51, 4.87, 2.52, 0.85
    128: BackwardTiles(64, 2, 128, 2),
    # 397 and 368 TFLOP/s at 16,384 and 4,096 causal; no other tiles were timed. dk and dv of ROWS keys take
    # 128 registers of a thread each; of 64 keys dq could hold one tile.
    256: BackwardTiles(64, 2, 32, 3, 224, owners=1),  # what the second consumer leaves of 240 is the first one's
}
# With documents, dq at d128 reloads 36 bytes of a thread in every round of 128 keys and none in those of 64. Not timed.
_DOCUMENTS = {64: _BACKWARD[64], 128: BackwardTiles(64, 2, 64, 3), 256: _BACKWARD[256]}
# Small enough to spill nothing, but for dq at d256 with softcap and ALiBi at once. Not timed.
_CURVED = {
    64: BackwardTiles(64, 4, 64, 4),
    128: BackwardTiles(32, 4, 64, 3),
    256: BackwardTiles(32, 4, 32, 3, 224, owners=1),
}

L2_BYTES = 32 * 2**20  # of the 50 MiB of an H100: the queries and the output pass through it too
# Of the backward pass. At 16,384 tokens causal in d128, 16 heads: 469 TFLOP/s with one head at a time, 454 with four,
# 423 to 434 with all; in groups of four, 471 with one key/value head's queries at a time in dq, 458 to 466 with all.
BACKWARD_L2_BYTES = 8 * 2**20


def heads_at_a_time(n_heads: int, repeats: int, n_keys: int, width: int, l2_bytes: int = L2_BYTES) -> int:
    """How many query heads a grid works on before it goes on: those whose keys and values
    (in dk and dv: queries and the output's gradients) fit in `l2_bytes`.

    `repeats` query heads share their keys and values; `width` is the head dim of k plus that of v, in 16-bit elements.
    """
    kv_heads = max(1, l2_bytes // max(1, 2 * n_keys * width))
    return min(n_heads, kv_heads * repeats)
