"""A byte n-gram model: the baseline that a language model has to beat on the same bytes.

Interpolated Witten-Bell smoothing (Witten & Bell 1991): with c(h x) the count of byte x after the history h, n(h) the
sum of c(h x) over x and t(h) the number of distinct bytes seen after h,

    P(x | h) = (c(h x) + t(h) P(x | h')) / (n(h) + t(h))

where h' drops the oldest byte of h; the chain ends in the uniform distribution over 256 bytes. It has no parameter to
tune, sums to one for every history, and gives every byte a positive probability.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Self

import numpy as np

_BYTES = 256
_CHUNK = 1 << 22  # bytes counted at once: bounds the temporary arrays to some hundred MB
Pair = tuple[str | bytes, str | bytes]  # what comes before a document, and the document


class NgramBaseline:
    """Byte n-gram of `order` 0, 1 or 2 preceding bytes (order 2: 64 MiB of counts, seconds for 20 MB of text)."""

    def __init__(self, order: int = 2) -> None:
        if order not in (0, 1, 2):
            raise ValueError(f"order={order}: the n-gram baseline looks back 0, 1 or 2 bytes")
        self.order = order
        self.trained_bytes = 0
        # _counts[k][h, x]: how often byte x followed the k-byte history h
        self._counts = [np.zeros((_BYTES**k, _BYTES), dtype=np.int64 if k < 2 else np.int32) for k in range(order + 1)]

    def fit(self, texts: Iterable[str | bytes]) -> Self:
        """Add the counts of documents; histories never cross from one to the next. May be called again."""
        for data, depth in _batches(zip(repeat(b""), texts), self.order):
            self.trained_bytes += int((depth >= 0).sum())
            for k, counts in enumerate(self._counts):
                at = np.flatnonzero(depth >= k)
                seen = np.bincount(_grams(data, at, k), minlength=counts.size)
                counts += seen.reshape(counts.shape).astype(counts.dtype)
        return self

    def bits_per_byte(self, texts: Iterable[str | bytes], *, after: Iterable[str | bytes] | None = None) -> float:
        """Cross entropy in bits on the UTF-8 bytes of documents; the first bytes of each use the history there is.

        after  what comes before each of the texts: it is history, and not measured
        Raises ValueError when nothing was fitted or the texts hold no byte.
        """
        self._check_fitted()
        bits, n = 0.0, 0
        pairs = zip(repeat(b""), texts) if after is None else zip(after, texts, strict=True)
        for data, depth in _batches(pairs, self.order):
            at = np.flatnonzero(depth >= 0)
            bits -= float(np.log2(self._probability(data, at, np.minimum(depth[at], self.order))).sum())
            n += len(at)
        if n == 0:
            raise ValueError("the texts to measure the n-gram baseline on hold no byte")
        return bits / n

    def distribution(self, history: bytes) -> np.ndarray:
        """P(next byte | history) [256]; only the last `order` bytes of the history count."""
        self._check_fitted()
        probability = np.full(_BYTES, 1 / _BYTES)
        for k in range(min(self.order, len(history)) + 1):
            context = int.from_bytes(history[len(history) - k :], "big")
            counts = self._counts[k][context].astype(np.float64)
            probability = _interpolate(counts, counts.sum(), np.count_nonzero(counts), probability)
        return probability

    def _probability(self, data: np.ndarray, at: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """P of the bytes at `at`, each given its `depth` preceding ones."""
        probability = np.full(len(at), 1 / _BYTES)
        for k, counts in enumerate(self._counts):
            deep = depth >= k
            gram = _grams(data, at[deep], k)
            context = gram // _BYTES
            total, kinds = counts.sum(axis=1), np.count_nonzero(counts, axis=1)
            probability[deep] = _interpolate(
                counts.reshape(-1)[gram], total[context], kinds[context], probability[deep]
            )
        return probability

    def _check_fitted(self) -> None:
        if self.trained_bytes == 0:
            raise ValueError("the n-gram baseline was fitted on no text: call fit() with training documents first")


def _interpolate(count, total, kinds, lower: np.ndarray) -> np.ndarray:
    """Witten-Bell; a history never seen passes the lower order on."""
    seen = total > 0
    return np.where(seen, (count + kinds * lower) / np.where(seen, total + kinds, 1), lower)


def _grams(data: np.ndarray, at: np.ndarray, k: int) -> np.ndarray:
    """The bytes at `at` with the k before each, as one big-endian number."""
    gram = np.zeros(len(at), dtype=np.int32)
    for back in range(k, -1, -1):
        gram = (gram << 8) | data[at - back]
    return gram


def _batches(pairs: Iterable[Pair], order: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some megabytes of bytes at a time, each with how many bytes of its document come before it (at most `order`; -1
    for a byte that is only there as history)."""
    held: list[tuple[np.ndarray, np.ndarray]] = []
    size = 0
    for piece in _pieces(pairs, order):
        held.append(piece)
        size += len(piece[0])
        if size >= _CHUNK:
            yield _joined(held)
            held, size = [], 0
    if held:
        yield _joined(held)


def _pieces(pairs: Iterable[Pair], order: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each document in parts that begin with the last bytes before them, of the part or of the prompt before."""
    for history, text in pairs:
        before = _encoded(history)[-order:] if order else b""
        data = np.frombuffer(before + _encoded(text), dtype=np.uint8)
        for start in range(len(before), len(data), _CHUNK):
            first = max(0, start - order)
            part = data[first : start + _CHUNK]
            depth = np.minimum(np.arange(first, first + len(part)), order)
            depth[: start - first] = -1
            yield part, depth


def _encoded(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _joined(pieces: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([data for data, _ in pieces]), np.concatenate([depth for _, depth in pieces])


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineResult:
    """What a byte n-gram fitted on training text costs on the held-out text.

    bytes  of held-out text that it was measured on: the same as the model's for a fair comparison
    """

    name: str
    order: int
    trained_bytes: int
    bytes: int
    bits_per_byte: float


def measure_baseline(
    train: Iterable[str], held_out: Iterable[str], *, after: Iterable[str] | None = None, order: int = 2
) -> BaselineResult:
    """Fit the n-gram on training documents and measure it on held-out ones, each of which may come after a prompt.

    Raises ValueError when either is empty.
    """
    texts = list(held_out)
    model = NgramBaseline(order).fit(train)
    return BaselineResult(
        name=f"order-{order} byte n-gram",
        order=order,
        trained_bytes=model.trained_bytes,
        bytes=sum(len(text.encode()) for text in texts),
        bits_per_byte=model.bits_per_byte(texts, after=after),
    )
