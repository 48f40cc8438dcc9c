"""From the nll of single tokens to the numbers of an evaluation, each with the protocol that it was measured by.

Legend: N scored tokens, d documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from ..bootstrap import ratio_interval

Scored = Literal["all", "full_windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringProtocol:
    """How a perplexity was measured: without these fields the number means nothing.

    bos                  the token that the first one is conditioned on; None: the first token is not scored
    precision            of the matmuls; softmax and sums are always fp32
    documents            how many were scored, `truncated` of them only in part
    documents_available  how many they were drawn from; None: not stated
    max_tokens           the budget that they were drawn for; None: all tokens
    sample_seed          of the draw; None: not stated
    prompts              how many documents have a prompt, which is read and not scored
    scored               "all": every token; "full_windows": the last `stride` tokens of each window that is full
    merged               whether windows were computed several at a time, which changes no number
    tokens_sha256        what was read and scored, in tokens (`documents.tokens_digest`); None: not stated
    text_sha256          the same as text, which tokenizers have in common (`documents.text_digest`); None: not stated
    tokenizer_sha256     of the tokenizer.json that the tokens are of; None: not stated
    """

    window: int
    stride: int
    bos: int | None
    weighting: Literal["token"] = "token"
    precision: str
    documents: int
    documents_available: int | None = None
    max_tokens: int | None = None
    sample_seed: int | None = None
    truncated: int = 0
    prompts: int = 0
    scored: Scored = "all"
    merged: bool = False
    tokens_sha256: str | None = None
    text_sha256: str | None = None
    tokenizer_sha256: str | None = None

    @property
    def words(self) -> str:
        """One sentence that lets somebody else reproduce the number."""
        each = "every token but the first" if self.bos is None else f"every token (the first given token {self.bos})"
        if self.prompts:
            each += f", but for {self.prompts:,} prompts, which are only read,"
        if self.scored == "full_windows":
            each = f"the last {self.stride:,} tokens of every full window" + (
                f", {self.prompts:,} prompts aside," if self.prompts else ""
            )
            windows = f"windows of exactly {self.window:,} tokens that advance by {self.stride:,}"
        elif self.stride == self.window:
            windows = f"disjoint windows of at most {self.window:,} tokens"
        else:
            windows = f"windows of at most {self.window:,} tokens that advance by {self.stride:,}"
        if self.merged:
            windows += ", several in one pass (no prediction reaches back to where its window begins)"
        scope = f"{self.documents:,} documents"
        if self.documents_available is not None:
            scope = f"{self.documents:,} of {self.documents_available:,} documents"
        if self.max_tokens is not None:
            scope += f" (at most {self.max_tokens:,} tokens, drawn with seed {self.sample_seed})"
        cut = f"{self.truncated:,} of them truncated" if self.truncated else "none truncated"
        return (
            f"Each document alone, {each} scored exactly once, in {windows}; mean over tokens; "
            f"{self.precision}; {scope}, {cut}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentScore:
    """One document's share of a perplexity: the sum of nll of its scored tokens, in nats, how many those are, and the
    UTF-8 bytes that they stand for."""

    id: str
    source: str
    nll: float
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionBucket:
    """Tokens at positions [start, end) of their documents.

    `standard_error` of the loss, with documents as the independent draws; None with fewer than two of them.
    """

    start: int
    end: int
    loss: float
    standard_error: float | None
    tokens: int
    documents: int

    @property
    def positions(self) -> str:
        """The positions in words: "5", or "8 – 11" (both included)."""
        return f"{self.start:,}" if self.end - self.start == 1 else f"{self.start:,} – {self.end - 1:,}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBucket:
    """Documents of start to end - 1 tokens, what is read and not scored included.

    `standard_error` of the loss, with documents as the independent draws; None with fewer than two of them.
    """

    start: int
    end: int
    loss: float
    standard_error: float | None
    bits_per_byte: float | None
    tokens: int
    documents: int

    @property
    def lengths(self) -> str:
        """The lengths in words: "1", or "8 – 15" (both included)."""
        return f"{self.start:,}" if self.end - self.start == 1 else f"{self.start:,} – {self.end - 1:,}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceResult:
    """One source's share of the documents."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    bits_per_character: float | None
    tokens: int
    bytes: int
    characters: int | None
    documents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityResult:
    """The numbers of one evaluation and how they were measured.

    loss                nats per token: sum of nll / tokens
    loss_interval       95 % bootstrap interval of the loss over documents (seeded); None with fewer than ten documents
    perplexity          exp(loss)
    bits_per_token      loss / ln 2
    bits_per_byte       sum of nll / ln 2 / UTF-8 bytes of the scored documents; None when they have no bytes
    bits_per_character  the same over Unicode code points; None where they were not counted
    by_length           documents by their number of tokens, in octaves
    """

    protocol: ScoringProtocol
    loss: float
    loss_interval: tuple[float, float] | None
    perplexity: float
    bits_per_token: float
    bits_per_byte: float | None
    bits_per_character: float | None
    tokens: int
    bytes: int
    characters: int | None
    documents: int
    by_position: tuple[PositionBucket, ...]
    by_length: tuple[LengthBucket, ...]
    by_source: dict[str, SourceResult]

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON, with the protocol in words beside its fields."""
        record = asdict(self)
        record["protocol"]["words"] = self.protocol.words
        return record


def summarise(
    nll_N: np.ndarray,
    document_N: np.ndarray,
    position_N: np.ndarray,
    *,
    n_bytes: Sequence[int],
    sources: Sequence[str],
    n_characters: Sequence[int | None] | None = None,
    protocol: ScoringProtocol,
    seed: int = 0,
) -> PerplexityResult:
    """The token-weighted loss and everything derived from it.

    nll_N, document_N, position_N   nats, document index and position in the document of each scored token
    n_bytes, sources, n_characters  one entry a document; documents without a scored token count nowhere
    seed                            of the bootstrap
    """
    nll_N = nll_N.astype(np.float64)
    total_d = np.bincount(document_N, weights=nll_N, minlength=len(n_bytes))
    count_d = np.bincount(document_N, minlength=len(n_bytes))
    bytes_d = np.asarray(n_bytes, dtype=np.int64)
    source_d = np.asarray(sources, dtype=object)
    # NaN: not counted, and so is every sum with it.
    characters_d = np.array(n_characters if n_characters is not None else [None] * len(n_bytes), dtype=np.float64)
    scored_d = count_d > 0
    everything = _of_source(total_d[scored_d], count_d[scored_d], bytes_d[scored_d], characters_d[scored_d])
    return PerplexityResult(
        protocol=protocol,
        loss=everything.loss,
        loss_interval=ratio_interval(total_d[scored_d], count_d[scored_d], seed=seed),
        perplexity=everything.perplexity,
        bits_per_token=everything.loss / math.log(2),
        bits_per_byte=everything.bits_per_byte,
        bits_per_character=everything.bits_per_character,
        tokens=everything.tokens,
        bytes=everything.bytes,
        characters=everything.characters,
        documents=everything.documents,
        by_position=_by_position(nll_N, document_N, position_N),
        by_length=_by_length(total_d, count_d, bytes_d, document_N, position_N),
        by_source={
            source: _of_source(total_d[chosen_d], count_d[chosen_d], bytes_d[chosen_d], characters_d[chosen_d])
            for source in sorted(set(source_d[scored_d]))
            for chosen_d in [scored_d & (source_d == source)]
        },
    )


def _by_position(nll_N: np.ndarray, document_N: np.ndarray, position_N: np.ndarray) -> tuple[PositionBucket, ...]:
    edges = position_edges(int(position_N.max()) + 1)
    bucket_N = np.searchsorted(edges, position_N, side="right") - 1
    buckets = []
    for bucket in np.unique(bucket_N):
        inside_N = bucket_N == bucket
        total_d = np.bincount(document_N[inside_N], weights=nll_N[inside_N])
        count_d = np.bincount(document_N[inside_N])
        total_d, count_d = total_d[count_d > 0], count_d[count_d > 0]
        buckets.append(
            PositionBucket(
                start=int(edges[bucket]),
                end=int(edges[bucket + 1]),
                loss=float(total_d.sum() / count_d.sum()),
                standard_error=standard_error(total_d, count_d),
                tokens=int(count_d.sum()),
                documents=len(count_d),
            )
        )
    return tuple(buckets)


def _by_length(
    total_d: np.ndarray, count_d: np.ndarray, bytes_d: np.ndarray, document_N: np.ndarray, position_N: np.ndarray
) -> tuple[LengthBucket, ...]:
    """Octaves of length that hold a scored document; a document is as long as its last scored position tells."""
    length_d = np.zeros(len(count_d), dtype=np.int64)
    np.maximum.at(length_d, document_N, position_N + 1)
    buckets = []
    for octave in sorted({int(length).bit_length() for length in length_d if length}):
        start, end = 1 << (octave - 1), 1 << octave
        chosen_d = (length_d >= start) & (length_d < end)
        total, count = total_d[chosen_d], count_d[chosen_d]
        buckets.append(
            LengthBucket(
                start=start,
                end=end,
                loss=float(total.sum() / count.sum()),
                standard_error=standard_error(total, count),
                bits_per_byte=_bits_per(total.sum(), bytes_d[chosen_d].sum()),
                tokens=int(count.sum()),
                documents=len(count),
            )
        )
    return tuple(buckets)


def position_edges(n: int) -> np.ndarray:
    """Bucket edges 0, 1, 2, 4, 8, … the last one ≥ n; from 8 on each octave is halved (8, 12, 16, 24, 32, …)."""
    edges = [0, 1]
    while edges[-1] < n:
        octave = 1 << (edges[-1].bit_length() - 1)
        edges.append(octave + octave // 2 if edges[-1] == octave and octave >= 8 else 2 * octave)
    return np.array(edges)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _bits_per(nats: float, units: float) -> float | None:
    """NaN units: not counted."""
    return float(nats / math.log(2) / units) if units > 0 else None


def _of_source(total_d: np.ndarray, count_d: np.ndarray, bytes_d: np.ndarray, characters_d: np.ndarray) -> SourceResult:
    characters = characters_d.sum()
    loss = float(total_d.sum() / count_d.sum())
    return SourceResult(
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=_bits_per(total_d.sum(), bytes_d.sum()),
        bits_per_character=_bits_per(total_d.sum(), characters),
        tokens=int(count_d.sum()),
        bytes=int(bytes_d.sum()),
        characters=None if math.isnan(characters) else int(characters),
        documents=len(count_d),
    )


def standard_error(total_d: np.ndarray, count_d: np.ndarray) -> float | None:
    """Of the ratio Σ total / Σ count when documents are the independent draws (linearised)."""
    n = len(count_d)
    if n < 2:
        return None
    residual_d = total_d - total_d.sum() / count_d.sum() * count_d
    return float(np.sqrt(n / (n - 1) * np.sum(residual_d**2)) / count_d.sum())
