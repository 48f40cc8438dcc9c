"""Steps of a session that are recorded once and replayed, whoever the sequences are.

A recording knows addresses: its rows stay where they are, sequences move in and out, and a row that nobody has decodes
a token of its own into a page of its own. There is a recording for each power of two of rows, so that few sequences
do not pay for many.

Legend: B sequences, N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .decoder import Decoder
from .paging import CachedSequence, PagedCache, PagePool
from .step import DecodeStep


class RecordedSteps:
    """Logits of the next token of any sequences of a pool, up to `most` at a time."""

    def __init__(self, model: Decoder, pool: PagePool, most: int, *, compiled: bool = False) -> None:
        self._model, self._pool, self._most, self._compiled = model, pool, most, compiled
        self._rows: dict[int, _Rows] = {}
        self._capacity = 0

    def advance(self, sequences: Sequence[CachedSequence], tokens: Sequence[int], longest: int) -> Tensor:
        """Reads one token of each sequence; logits [B, V].

        longest   tokens that any of the sequences may come to hold; recordings are as wide as the longest text so far

        Raises OutOfPages, and leaves the sequences as they were, when the pool has too few pages for all and for the
        rows that nobody has: `release`, or take the step plainly.
        """
        if longest > self._capacity:
            self.release()
            self._rows.clear()
            self._capacity = min(1 << (longest - 1).bit_length(), max(longest, self._pool.longest))
        n_rows = min(1 << (len(sequences) - 1).bit_length(), max(self._most, len(sequences)))
        if n_rows not in self._rows:
            self._rows[n_rows] = _Rows(self._model, self._pool, n_rows, self._capacity, compiled=self._compiled)
        return self._rows[n_rows].advance(sequences, tokens)

    def release(self) -> bool:
        """Gives back the pages of rows that nobody has; were there any?"""
        released = [rows.release() for rows in self._rows.values()]
        return any(released)


class _Rows:
    def __init__(self, model: Decoder, pool: PagePool, n_rows: int, length: int, *, compiled: bool) -> None:
        self._idle = [pool.open() for _ in range(n_rows)]
        self._cache: PagedCache = pool.cache(self._idle, length=length)
        self._step = DecodeStep(model, self._cache, compiled=compiled)

    def advance(self, sequences: Sequence[CachedSequence], tokens: Sequence[int]) -> Tensor:
        rows = self._seated(sequences)
        place_B = [rows.index(sequence) for sequence in sequences]
        token_of = dict(zip(place_B, tokens, strict=True))
        device = self._cache.pool.device
        try:
            logits_NV = self._step(torch.tensor([token_of.get(row, 0) for row in range(len(rows))], device=device))
        finally:
            for idle in self._idle:
                idle.length = 0
        return logits_NV[torch.tensor(place_B, device=device)]  # a copy: the next replay writes over them

    def _seated(self, sequences: Sequence[CachedSequence]) -> list[CachedSequence]:
        """Who stays keeps its row; who comes takes one that nobody has."""
        staying = [held if held in sequences else None for held in self._cache.sequences]
        coming = [sequence for sequence in sequences if sequence not in staying]
        rows = [coming.pop() if held is None and coming else held for held in staying]
        seated = [idle if held is None else held for held, idle in zip(rows, self._idle, strict=True)]
        if seated != list(self._cache.sequences):
            self._cache.hold(seated)
        return seated

    def release(self) -> bool:
        had = any(idle.pages for idle in self._idle)
        for idle in self._idle:
            idle.truncate(0)
        return had
