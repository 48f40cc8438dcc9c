"""Which tile sizes the Hopper kernel runs with, and how many heads it works on at a time: pure functions."""

from __future__ import annotations

from dataclasses import dataclass

ROWS = 64  # of queries, that a consumer owns
HEAD_DIMS = (64, 128)  # in shared memory; head dims between are read as if zeros followed
LARGEST = HEAD_DIMS[-1]


@dataclass(frozen=True, slots=True)
class Tiles:
    """consumers  of four warps and ROWS queries each
    columns    keys of a tile
    stages     tiles of keys, and as many of values, that shared memory holds
    turns      consumers take turns on the tensor cores: one multiplies while another exponentiates
    registers  of a consumer's thread; the producer gives away its own
    """

    consumers: int
    columns: int
    stages: int
    turns: bool
    registers: int

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
    """Tiles for a head dim (the larger of q's and v's). `edges`: a window's left side or documents hide keys, too."""
    return (_EDGES if edges else _TILES)[padded(head_dim)]


# One H100, TFLOP/s at 16,384 tokens causal, 4,096 causal, and 16,384 full (docs/log.md).
_TILES = {
    64: Tiles(2, 128, 4, False, 240),  # 437, 363, 446; with turns 437, 362, 445; three consumers 440, 337, 457: spills
    128: Tiles(2, 128, 2, False, 240),  # 646, 487, 644; with turns 629, 482, 613
}
_EDGES = _TILES  # a taller tile has more of an edge


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """Of the two kernels of the backward pass, each of two consumers that own ROWS keys or queries.

    queries, query_stages  of a tile that passes the keys of dk and dv; tiles that shared memory holds
    keys, key_stages       of a tile that passes the queries of dq
    registers              of a consumer's thread; the producer gives away its own
    """

    queries: int
    query_stages: int
    keys: int
    key_stages: int
    registers: int = 240

    rows = 2 * ROWS  # of keys or queries that a program owns
    compiled_registers = 168  # of a thread when the program starts: as in `Tiles`


def choose_backward(head_dim: int, *, curved: bool = False) -> BackwardTiles:
    """Tiles of the backward pass for a head dim (the larger of q's and v's). `curved`: softcap or ALiBi keep more of a
    score in registers than its weight."""
    return (_CURVED if curved else _BACKWARD)[padded(head_dim)]


# As large as registers allow: dk and dv of 64 keys take 128 of a thread's 240 at d128, scores and their gradients one
# for each query of a tile. Not yet measured.
_BACKWARD = {64: BackwardTiles(64, 4, 128, 3), 128: BackwardTiles(64, 3, 128, 2)}
_CURVED = {64: BackwardTiles(64, 4, 64, 4), 128: BackwardTiles(32, 4, 64, 3)}

L2_BYTES = 32 * 2**20  # of the 50 MiB of an H100: the queries and the output pass through it too


def heads_at_a_time(n_heads: int, repeats: int, n_keys: int, width: int) -> int:
    """How many query heads a persistent grid works on before it goes on: those whose keys and values fit in L2.

    `repeats` query heads share their keys and values; `width` is the head dim of k plus that of v, in 16-bit elements.
    """
    kv_heads = max(1, L2_BYTES // max(1, 2 * n_keys * width))
    return min(n_heads, kv_heads * repeats)
