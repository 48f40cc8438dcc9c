"""Which sequence comes k-th: pure functions of (seed, k), so that any place in the stream can be addressed directly.

Nothing here has state. A run resumes by continuing at k, ranks and loader processes take their share of the k's, and
none of it changes which sequence is the k-th.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 6
_LONGEST_PERIOD = 1 << 16


@dataclass(frozen=True, slots=True)
class Address:
    """Sequence `index` of a source, in the `epoch`-th pass over that source."""

    source: int
    epoch: int
    index: int


class Order(Protocol):
    """Maps a place in a stream to a sequence."""

    def address(self, k: int) -> Address: ...


class MixedStream:
    """An endless stream that mixes sources by weight and shuffles each anew in every pass.

    sizes     sequences of each source
    weights   share of each source in the stream; after any number of sequences each source has been taken within one
              of its share
    seed      None: no shuffling

    Weights are taken as fractions with a common denominator of at most 65,536 (`shares` has what they became); sources
    are then scheduled by the chairman assignment of Tijdeman (1980), whose deviation stays below one, and the schedule
    repeats exactly.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int | None) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes={list(sizes)}: a stream needs sources with at least one sequence each")
        if len(weights) != len(sizes) or min(weights) <= 0:
            raise ValueError(f"weights={list(weights)}: one weight greater than 0 for each of {len(sizes)} sources")
        self._sizes, self._seed = tuple(sizes), seed
        counts = _whole_shares(weights)
        self._period = sum(counts)
        self._counts = counts
        self.shares = tuple(Fraction(count, self._period) for count in counts)
        self._schedule = _schedule(counts)
        self._taken = _ranks(self._schedule, len(sizes))

    def address(self, k: int) -> Address:
        if k < 0:
            raise IndexError(f"sequence {k}: a stream starts at 0")
        period, place = divmod(k, self._period)
        source = self._schedule[place]
        nth = period * self._counts[source] + self._taken[place]  # how often the source came before
        epoch, index = divmod(nth, self._sizes[source])
        if self._seed is not None:
            index = permute(index, self._sizes[source], key=hash_ints(self._seed, source, epoch))
        return Address(source, epoch, index)


class SinglePass:
    """Each sequence of each source once, in a fixed order that spreads the sources evenly: for validation."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.shares = tuple(Fraction(size, sum(sizes)) for size in sizes)
        places = [(np.arange(size) + 0.5) / size for size in sizes]
        sources = np.repeat(np.arange(len(sizes)), sizes)
        indices = np.concatenate([np.arange(size) for size in sizes])
        order = np.lexsort((sources, np.concatenate(places)))
        self._sources, self._indices = sources[order], indices[order]

    def __len__(self) -> int:
        return len(self._sources)

    def address(self, k: int) -> Address:
        if not 0 <= k < len(self):
            raise IndexError(f"sequence {k}: the pass has {len(self)}")
        return Address(int(self._sources[k]), 0, int(self._indices[k]))


class BucketedStream:
    """An endless stream over items of one source in which neighbours are of like length: for padded batches.

    lengths   of the items
    bucket    neighbours that belong together: groups of so many items begin at multiples of it in every pass
    pools     the shuffled items are cut into pools of `pools` groups; each is sorted by length, cut into groups, and
              the groups are shuffled. More of them: less padding, and less chance in who meets whom
    seed      None: stored order, and no buckets

    Every pass holds each item once; the last group of a pass, and of a pool there, may be smaller.
    """

    def __init__(self, lengths: np.ndarray, *, bucket: int, pools: int = 50, seed: int | None) -> None:
        if len(lengths) < 1 or bucket < 1 or pools < 1:
            raise ValueError(f"{len(lengths)} items in buckets of {bucket}, {pools} to a pool: each is at least 1")
        self._lengths, self._bucket, self._pool, self._seed = lengths, bucket, bucket * pools, seed
        self._held: tuple[tuple[int, int], np.ndarray] | None = None  # the pool asked for last

    def address(self, k: int) -> Address:
        if k < 0:
            raise IndexError(f"sequence {k}: a stream starts at 0")
        epoch, place = divmod(k, len(self._lengths))
        if self._seed is None:
            return Address(0, epoch, place)
        pool, place = divmod(place, self._pool)
        if self._held is None or self._held[0] != (epoch, pool):
            self._held = ((epoch, pool), self._ordered(epoch, pool, self._seed))
        return Address(0, epoch, int(self._held[1][place]))

    def _ordered(self, epoch: int, pool: int, seed: int) -> np.ndarray:
        """The items of a pool in the order in which they come."""
        size = len(self._lengths)
        key = hash_ints(seed, 0, epoch)
        places = range(pool * self._pool, min((pool + 1) * self._pool, size))
        items = np.array([permute(place, size, key=key) for place in places])
        # Stable: items of one length stay shuffled. (In stored order they would often be of one class.)
        items = items[np.argsort(self._lengths[items], kind="stable")]
        whole = len(items) // self._bucket
        groups = [items[group * self._bucket : (group + 1) * self._bucket] for group in range(whole)]
        key = hash_ints(seed, 1, epoch, pool)
        shuffled = [groups[permute(group, whole, key=key)] for group in range(whole)]
        return np.concatenate([*shuffled, items[whole * self._bucket :]])


def permute(index: int, size: int, *, key: int) -> int:
    """Where a pseudo-random permutation of 0 … size-1, chosen by `key`, sends `index`.

    A balanced Feistel network over the next even number of bits, walked until it lands inside (Black & Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains"): no table, the same cost anywhere.
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} is not in 0 … {size - 1}")
    half = max(2, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(right + _mix(key + number)) & mask)
        index = left << half | right
        if index < size:
            return index


def hash_ints(*values: int) -> int:
    """64 well-mixed bits of some integers."""
    state = 0
    for value in values:
        state = _mix(state ^ (value & _MASK))
    return state


def _mix(value: int) -> int:
    """The output function of SplitMix64 (Steele, Lea & Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers, each at least 1, with a sum of at most _LONGEST_PERIOD."""
    exact = [Fraction(weight).limit_denominator(10_000) or Fraction(weight) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * denominator) for weight in exact]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total <= _LONGEST_PERIOD:
        return counts
    scaled = [Fraction(count * _LONGEST_PERIOD, total) for count in counts]
    floors = [max(1, int(share)) for share in scaled]
    by_rest = sorted(range(len(counts)), key=lambda source: floors[source] - scaled[source])
    for source in by_rest[: max(0, _LONGEST_PERIOD - sum(floors))]:
        floors[source] += 1
    return floors


def _schedule(counts: Sequence[int]) -> list[int]:
    """One period: source s exactly counts[s] times, every prefix within one of its shares."""
    n_sources, period = len(counts), sum(counts)
    if n_sources == 1:
        return [0]
    slack = 2 * n_sources - 2
    taken = [0] * n_sources
    schedule = []
    for place in range(1, period + 1):
        # A source may be taken when its share after this place exceeds what it had by 1/slack; of those, the one whose
        # share first comes within 1/slack of the next whole number is taken. In integers: times period and slack.
        best, best_due = -1, 0
        for source, count in enumerate(counts):
            if slack * (count * place - period * taken[source]) >= period:
                due = slack * (taken[source] + 1) - 1  # over count: when the source must be taken
                if best < 0 or due * counts[best] < best_due * count:
                    best, best_due = source, due
        taken[best] += 1
        schedule.append(best)
    return schedule


def _ranks(schedule: Sequence[int], n_sources: int) -> list[int]:
    """For each place of the schedule, how often its source stands before it."""
    taken = [0] * n_sources
    ranks = []
    for source in schedule:
        ranks.append(taken[source])
        taken[source] += 1
    return ranks
