"""Fixed-length sequences out of documents, as an index: a packing says which pieces of which documents stand where,
and copies nothing.

concat     documents back to back, split every `context` tokens. Every token is the input of exactly one sequence,
           except the last (number of tokens - 1) % context + 1 of the split, which do not fill one (the very last
           predicts nothing); `keep_tail` makes them a last, padded sequence.
best_fit   no document of at most `context` tokens is cut. A longer one gives pieces of `context` tokens, each a
           sequence of its own, and its rest is packed like a document. Best-fit decreasing (Johnson 1973; for language
           models Ding et al. 2024, arXiv 2404.10830, §3); the free places at a sequence's end are padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

PackingMethod = Literal["concat", "best_fit"]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start … start+length-1 of a document."""

    document: int
    start: int
    length: int


class Packing(Protocol):
    """`len` sequences; `spans(i)` tells what stands in sequence i, from its first token on; `document_after(i)` which
    document begins right behind it, None where none does; `lengths()` the length of every span of every sequence and
    of the padding behind them, where there is any, in no particular order."""

    def __len__(self) -> int: ...

    def spans(self, sequence: int) -> list[Span]: ...

    def document_after(self, sequence: int) -> int | None: ...

    def lengths(self) -> np.ndarray: ...

    @property
    def n_tokens(self) -> int:
        """Tokens (not padding) in all sequences."""
        ...


def pack(
    lengths: np.ndarray,
    context: int,
    method: PackingMethod = "concat",
    *,
    documents: np.ndarray | None = None,
    keep_tail: bool = False,
) -> Packing:
    """Pack documents of the given lengths (tokens, each with its eos) into sequences of `context` tokens.

    documents   the numbers that spans use for them; None: 0, 1, …
    keep_tail   concat: keep what does not fill a sequence (best_fit always does)
    The same lengths give the same packing. Raises ValueError.
    """
    if context < 1:
        raise ValueError(f"context={context}: a sequence has at least one token")
    numbers = np.arange(len(lengths)) if documents is None else np.asarray(documents)
    if method == "concat":
        return ConcatPacking(np.asarray(lengths), numbers, context, keep_tail)
    if method == "best_fit":
        return BestFitPacking(np.asarray(lengths), numbers, context)
    raise ValueError(f"packing '{method}' is unknown: use concat or best_fit")


class ConcatPacking:
    """Sequence i is tokens i·context … (i+1)·context-1 of the documents back to back; O(documents) memory."""

    def __init__(self, lengths: np.ndarray, documents: np.ndarray, context: int, keep_tail: bool) -> None:
        self._documents, self._context = documents, context
        self._ends = np.cumsum(lengths, dtype=np.int64)
        total = int(self._ends[-1]) if len(self._ends) else 0
        inputs = max(0, total - 1)  # the very last token has nothing to predict
        self._length = -(-inputs // context) if keep_tail else inputs // context
        self.n_tokens = min(total, self._length * context)

    def __len__(self) -> int:
        return self._length

    def spans(self, sequence: int) -> list[Span]:
        _check(sequence, len(self))
        position = sequence * self._context
        stop = min(position + self._context, self.n_tokens)
        place = int(np.searchsorted(self._ends, position, side="right"))
        found = []
        while position < stop:
            end = int(self._ends[place])
            begin = int(self._ends[place - 1]) if place else 0
            length = min(end, stop) - position
            found.append(Span(int(self._documents[place]), position - begin, length))
            position, place = position + length, place + 1
        return found

    def document_after(self, sequence: int) -> int | None:
        _check(sequence, len(self))
        stop = (sequence + 1) * self._context
        place = int(np.searchsorted(self._ends, stop, side="left")) + 1
        begins = place < len(self._documents) and int(self._ends[place - 1]) == stop
        return int(self._documents[place]) if begins else None

    def lengths(self) -> np.ndarray:
        cuts = np.arange(0, self._length * self._context + 1, self._context)
        return np.diff(np.union1d(cuts, self._ends[self._ends <= self.n_tokens]))


class BestFitPacking:
    """Sequences as runs of spans in three flat arrays, ordered by their first document."""

    def __init__(self, lengths: np.ndarray, documents: np.ndarray, context: int) -> None:
        self._context = context
        pieces = _cut(lengths.astype(np.int64), context)
        bins = _best_fit_decreasing(pieces[:, 2], context)
        # Documents keep their order inside a sequence, and sequences follow their first document.
        by_bin = np.lexsort((pieces[:, 1], pieces[:, 0], bins))
        starts = np.flatnonzero(np.diff(bins[by_bin], prepend=-1))
        first = pieces[by_bin[starts]]
        order = np.lexsort((first[:, 1], first[:, 0]))
        ends = np.append(starts[1:], len(by_bin))
        sizes = (ends - starts)[order]
        self._offsets = np.concatenate(([0], np.cumsum(sizes)))
        shift = np.repeat(starts[order] - self._offsets[:-1], sizes)
        self._pieces = pieces[by_bin[np.arange(len(by_bin)) + shift]]
        self._documents = documents
        self.n_tokens = int(lengths.sum())

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def spans(self, sequence: int) -> list[Span]:
        _check(sequence, len(self))
        rows = self._pieces[self._offsets[sequence] : self._offsets[sequence + 1]]
        return [Span(int(self._documents[place]), start, length) for place, start, length in rows.tolist()]

    def document_after(self, sequence: int) -> int | None:
        _check(sequence, len(self))
        return None  # sequences are not neighbours in any text

    def lengths(self) -> np.ndarray:
        lengths = self._pieces[:, 2]
        free = self._context - np.add.reduceat(lengths, self._offsets[:-1])
        return np.concatenate([lengths, free[free > 0]])


def _check(sequence: int, length: int) -> None:
    if not 0 <= sequence < length:
        raise IndexError(f"sequence {sequence}: the packing has {length}")


def _cut(lengths: np.ndarray, context: int) -> np.ndarray:
    """[pieces, 3] (place of the document, start, length): documents cut every `context` tokens."""
    counts = -(-lengths // context)
    place = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = nth * context
    return np.stack([place, start, np.minimum(lengths[place] - start, context)], axis=1)


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item: longest item first, into the fullest bin that still has room, else a new one."""
    bins = np.empty(len(lengths), dtype=np.int64)
    roomy = _SmallestAtLeast(capacity)
    by_room: dict[int, list[int]] = {}
    n_bins = 0
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist()):
        room = roomy.find(length)
        if room is None:
            chosen, room = n_bins, capacity
            n_bins += 1
        else:
            chosen = by_room[room].pop()
            if not by_room[room]:
                roomy.remove(room)
        bins[item] = chosen
        if room > length:
            by_room.setdefault(room - length, []).append(chosen)
            roomy.add(room - length)
    return bins


class _SmallestAtLeast:
    """A set of integers up to `limit` that finds its smallest member ≥ x in two steps: two levels of bit masks."""

    def __init__(self, limit: int) -> None:
        self._words = [0] * (limit // 1024 + 1)
        self._used = 0  # bit i: word i is not empty

    def add(self, value: int) -> None:
        self._words[value >> 10] |= 1 << (value & 1023)
        self._used |= 1 << (value >> 10)

    def remove(self, value: int) -> None:
        self._words[value >> 10] &= ~(1 << (value & 1023))
        if not self._words[value >> 10]:
            self._used &= ~(1 << (value >> 10))

    def find(self, value: int) -> int | None:
        word = value >> 10
        if word < len(self._words) and (rest := self._words[word] >> (value & 1023)):
            return value + _lowest_bit(rest)
        above = self._used >> (word + 1)
        if not above:
            return None
        word += 1 + _lowest_bit(above)
        return (word << 10) + _lowest_bit(self._words[word])


def _lowest_bit(value: int) -> int:
    return (value & -value).bit_length() - 1
