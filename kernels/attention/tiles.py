"""Which tile sizes a fused kernel runs with: pure functions of the head dim and the dtype, no search at run time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache


class Pass(StrEnum):
    FORWARD = "forward"
    DQ = "dq"
    DKDV = "dkdv"


@dataclass(frozen=True, slots=True)
class Tiles:
    """rows   queries (of dkdv: keys) that one program owns
    columns   keys (of dkdv: queries) it visits at a time
    warps     of 32 threads in a program
    stages    depth of the software pipeline over visits
    """

    rows: int
    columns: int
    warps: int
    stages: int


INTERPRETED = Tiles(16, 16, 1, 1)  # small, so that short tests still visit several


def choose(
    which: Pass,
    head_dim: int,
    *,
    bytes_per_element: int,
    short: bool = False,
    listed: bool = False,
    compact: bool = False,
) -> Tiles:
    """Tiles for a head dim (the larger of q's and v's) and element size.

    `short`: rows see few keys (a window of at most a thousand, documents): long pipelines and tall tiles do not pay.
    `listed`: tiles come from a list, which a taller tile reads less often.
    `compact`: the GPU gives a program about 99 KiB of shared memory (capability 8.6, 8.9, 12.x), not 163 or 227.
    """
    if bytes_per_element == 4:
        return _FP32[which][_step(head_dim, _FP32[which])]
    if compact:
        return _COMPACT[which][_step(head_dim, _COMPACT[which])]
    table = _LISTED if listed else _SHORT if short else _HALF
    return table[which][_step(head_dim, table[which])]


def _step(head_dim: int, table: dict[int, Tiles]) -> int:
    """The smallest listed head dim that holds this one."""
    for limit in sorted(table):
        if head_dim <= limit:
            return limit
    raise ValueError(f"head_dim={head_dim}: tiles are listed up to {max(table)}")


# bf16 on one H100, TFLOP/s of the kernel alone at lengths 4,096 and 16,384 (causal, 16 heads of 128 and 32 of 64);
# beside each choice the best that it was measured against. Head dim 32 is set by analogy.
_HALF: dict[Pass, dict[int, Tiles]] = {
    Pass.FORWARD: {
        32: Tiles(128, 64, 4, 3),
        64: Tiles(128, 64, 8, 3),  # 347 and 456; 64 × 64 with 4 warps 335 and 418
        128: Tiles(64, 64, 4, 3),  # 368 and 524; 128 × 128 with 8 warps 349 and 516
        256: Tiles(128, 32, 8, 3),  # 326 at 4,096; 128 × 64 with 2 stages 318
    },
    Pass.DQ: {
        32: Tiles(64, 64, 4, 3),
        64: Tiles(64, 64, 4, 3),  # 495 and 573; 128 × 64 with 4 warps 458 and 527
        128: Tiles(128, 64, 8, 3),  # 546 and 658; 64 × 64 with 4 warps 515 and 575
        256: Tiles(64, 32, 4, 2),  # 288 at 4,096; with 8 warps 164
    },
    Pass.DKDV: {
        32: Tiles(64, 64, 4, 3),
        64: Tiles(64, 64, 4, 3),  # 478 and 512; 128 × 64 with 8 warps 381 and 443
        128: Tiles(128, 64, 8, 3),  # 501 and 571, full 540; with 2 stages 520, 568 and 467; 64 × 32: 526 in full
        256: Tiles(32, 32, 4, 2),  # 210 at 4,096; 64 × 32 with 8 warps 183
    },
}

# Windows, at length 16,384: 256 keys each side (12 heads of 64) and 1,024 causal keys (16 heads of 128 over 4), in
# TFLOP/s on what the window shows; and documents of 2,048 in 65,536.
_SHORT: dict[Pass, dict[int, Tiles]] = {
    Pass.FORWARD: {
        32: Tiles(64, 64, 4, 3),
        64: Tiles(64, 64, 4, 3),  # 237; 128 × 64 with 8 warps 161
        128: Tiles(64, 64, 4, 3),  # 379 (documents 421); 128 × 64 with 8 warps 313 (379)
        256: _HALF[Pass.FORWARD][256],
    },
    Pass.DQ: {
        32: Tiles(64, 32, 4, 3),
        64: Tiles(64, 32, 4, 3),  # 213; 64 × 64 200
        128: Tiles(64, 64, 4, 2),  # 489 (documents 492); 128 × 64 with 8 warps 444 (486)
        256: _HALF[Pass.DQ][256],
    },
    Pass.DKDV: {
        32: Tiles(64, 32, 4, 3),
        64: Tiles(64, 32, 4, 3),  # 325; 64 × 64 304
        128: Tiles(64, 32, 4, 3),  # 452 (documents 431); 128 × 64 with 8 warps 431 (386)
        256: _HALF[Pass.DKDV][256],
    },
}

# A BigBird-like layout of 128 × 128 blocks at 8,192 (16 heads of 128), TFLOP/s on the listed blocks.
_LISTED: dict[Pass, dict[int, Tiles]] = {
    Pass.FORWARD: {
        **_HALF[Pass.FORWARD],
        128: Tiles(128, 64, 8, 3),  # 276; 64 × 64 with 4 warps 192
    },
    Pass.DQ: _HALF[Pass.DQ],  # 423; 64 × 64 with 4 warps 417
    Pass.DKDV: {
        **_HALF[Pass.DKDV],
        128: Tiles(64, 32, 4, 3),  # 387; 128 × 64 with 8 warps 377
    },
}

# By what compiles into 99 KiB; not measured.
_COMPACT: dict[Pass, dict[int, Tiles]] = {
    Pass.FORWARD: {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 4, 2)},
    Pass.DQ: {64: Tiles(64, 32, 4, 3), 128: Tiles(64, 32, 4, 2), 256: Tiles(32, 32, 4, 2)},
    Pass.DKDV: {64: Tiles(64, 32, 4, 3), 128: Tiles(64, 32, 4, 2), 256: Tiles(32, 16, 4, 2)},
}

# Without tensor cores for fp32 (tf32 is off) registers are what limits: the largest tiles that compile without spills.
_FP32: dict[Pass, dict[int, Tiles]] = {
    Pass.FORWARD: {64: Tiles(64, 32, 8, 2), 128: Tiles(32, 16, 8, 2), 256: Tiles(32, 16, 8, 1)},
    Pass.DQ: {64: Tiles(32, 32, 8, 2), 128: Tiles(32, 16, 8, 2), 256: Tiles(16, 16, 8, 2)},
    Pass.DKDV: {64: Tiles(32, 32, 8, 2), 128: Tiles(32, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
}


# -- decoding ----------------------------------------------------------------------------------------------------------

MOST_SPLITS = 128
LEAST_TILES = 4  # of a split: below, starting it and joining its sums costs more than the parallelism gives


@lru_cache(maxsize=4096)
def choose_decode(rows: int, head_dim: int, q_bytes: int, kv_bytes: int) -> Tiles:
    """Tiles of the decode kernel for a group's `rows` (queries × heads that share their keys).

    16 rows are the least that tensor cores multiply. More than 32 would not fit in registers beside the sums, so they
    go to further programs, which find the same keys in the L2 cache. A tile of keys is 16 KiB, as is one of values:
    with two of each on their way, a program hides the latency of memory behind 64 KiB.

    One H100, GB/s of K and V at head dim 128, one program a processor (8-bit: three); a copy reaches 3,000:
    8 × 32,768 over 4 heads  64 keys and 3 stages 2,882; 4 stages 2,550; 128 keys 2,553; with 8 warps 2,456
    64 × 4,096 over 4 heads  64 keys and 3 stages 2,995; 4 stages 2,947; 128 keys 2,972; 32 keys and 5 stages 2,948
    8 × 65,536 in int8       128 keys and 3 stages 2,304; 64 keys 2,149; 128 keys and 8 warps 1,777
    Head dim 64, 64 × 4,096 over 12 heads: 128 keys and 3 stages 3,046; 4 stages 3,017; 64 keys 3,017.
    """
    width = 1 << max(5, (head_dim - 1).bit_length())
    if q_bytes == 4:  # without tensor cores registers are what limits
        return Tiles(16, {32: 64, 64: 32, 128: 32, 256: 16}[width], 8, 2)
    columns = {32: 128, 64: 128, 128: 64, 256: 32}[width]
    if kv_bytes == 1:
        columns = min(128, 2 * columns)
    return Tiles(32 if rows > 16 else 16, columns, 4, 3)


@lru_cache(maxsize=4096)
def n_splits(programs: int, tiles: int, processors: int, *, kv_bytes: int = 2) -> int:
    """Into how many splits the `tiles` of keys of each of `programs` (batch × key/value heads × tiles of rows) are cut.

    A function of sizes that a CUDA graph holds fixed, never of lengths on the device. Enough splits to give every
    processor a program; of 8-bit keys, whose conversion keeps it busy while nothing is loaded, three. No more, because
    every split costs a start and its sums in fp32, and none shorter than LEAST_TILES.

    One H100, GB/s with one, two, three, four programs a processor: 1 × 131,072 over 4 heads 2,773 2,684 2,564 2,420;
    8 × 32,768 2,882 2,727 2,660 2,803; in pages of 16 2,787 2,674 2,503 2,687; 8 × 65,536 in int8 1,906 2,068 2,304
    2,309.
    """
    wanted = -(-(3 if kv_bytes == 1 else 1) * processors // max(programs, 1))
    return max(1, min(wanted, tiles // LEAST_TILES, MOST_SPLITS))
