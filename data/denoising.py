"""Denoising: texts that are read damaged and written whole (BART: Lewis et al. 2020, arXiv 1910.13461, §2.2).

Damage is dynamic and has no state: a pure function of (seed, number of the sequence in the stream), so that a run
resumes with the same damage on any number of ranks, and a validation pass has the same each time.

Legend: N tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .loader import PackedDataset
from .order import hash_ints
from .seq2seq import PairFrame, Seq2SeqBatch
from .tokenizer import Tokenizer

_DRAWN = 64  # span lengths drawn at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoising:
    """How texts are damaged: BART's text infilling and sentence permutation.

    probability        share of a text's tokens that are hidden
    mean_span          mean length of the hidden spans, which is Poisson distributed. One mask token stands for each
                       span whatever its length; for an empty one it is inserted
    permute_sentences  the sentences come in random order, before spans are hidden
    """

    probability: float = 0.3
    mean_span: float = 3.0
    permute_sentences: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1:
            raise ValueError(f"probability={self.probability}: a share of the tokens, at least 0 and below 1")
        if self.mean_span < 1:
            raise ValueError(f"mean_span={self.mean_span}: spans have at least 1 token on average")

    def expected_length(self, length: int) -> int:
        """About how many tokens are left of a text of `length`, mask tokens included."""
        hidden = round(self.probability * length)
        return length - hidden + round(hidden / self.mean_span)


class Denoiser:
    """Damages texts as a `Denoising` says, with one tokenizer's mask token and sentences.

    Raises ValueError for a tokenizer without a mask token.
    """

    def __init__(self, denoising: Denoising, tokenizer: Tokenizer, *, seed: int) -> None:
        if tokenizer.mask_id is None:
            raise ValueError("the tokenizer has no mask token")
        self._denoising, self._seed, self._mask_id = denoising, seed, tokenizer.mask_id
        self._sentences = SentenceTable(tokenizer) if denoising.permute_sentences else None

    def __call__(self, tokens_N: np.ndarray, k: int) -> np.ndarray:
        """The damaged text of sequence k: at most as long as the text."""
        draws = np.random.Generator(np.random.Philox(key=hash_ints(self._seed, k)))
        if self._sentences is not None:
            sentences = np.split(tokens_N, self._sentences.ends(tokens_N)[:-1])
            tokens_N = np.concatenate([sentences[place] for place in draws.permutation(len(sentences))])
        return self._infill(tokens_N, draws)

    def _infill(self, tokens_N: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        n_hidden = round(self._denoising.probability * len(tokens_N))
        spans = _span_lengths(n_hidden, self._denoising.mean_span, draws)
        # Kept tokens and spans in random order: each arrangement of the spans in the text is as likely as any other.
        n_slots = len(tokens_N) - n_hidden + len(spans)
        is_span = np.zeros(n_slots, dtype=bool)
        is_span[draws.choice(n_slots, size=len(spans), replace=False)] = True
        widths = np.ones(n_slots, dtype=np.int64)
        widths[is_span] = spans
        starts = np.cumsum(widths) - widths
        damaged = np.full(n_slots, self._mask_id, dtype=np.int64)
        damaged[~is_span] = tokens_N[starts[~is_span]]
        return damaged


def _span_lengths(total: int, mean: float, draws: np.random.Generator) -> np.ndarray:
    """Poisson lengths that add up to `total`: the last one is cut to fit. Empty ones are left out as soon as there
    would be more spans than hidden tokens, so that mask tokens never make a text longer."""
    lengths: list[int] = []
    missing = total
    while missing:
        for length in draws.poisson(mean, size=_DRAWN).tolist():
            length = min(length, missing)
            if length or len(lengths) + missing < total:
                lengths.append(length)
                missing -= length
            if not missing:
                break
    return np.array(lengths, dtype=np.int64)


class SentenceTable:
    """Where sentences end in a sequence of tokens, told by the tokens alone: behind a full stop, an exclamation or a
    question mark (and what closes quotes and brackets) before white space, and at the end of a document."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = tokenizer.pieces()
        bare = [piece.rstrip(b"\"')]") for piece in pieces]
        self._stops_V = np.array([piece.endswith((b".", b"!", b"?")) for piece in bare])
        self._closes_V = np.array([piece != b"" and rest == b"" for piece, rest in zip(pieces, bare, strict=True)])
        self._opens_V = np.array([_opens_word(piece, tokenizer.word_mark) for piece in pieces])
        self._special_V = np.zeros(len(pieces), dtype=bool)
        self._special_V[list(tokenizer.special_ids)] = True

    def ends(self, tokens_N: np.ndarray) -> np.ndarray:
        """The index behind the last token of each sentence; the last one is N."""
        last_N = self._special_V[tokens_N]
        # A quote or bracket alone closes what the token before it, whatever that is, may have ended.
        told_by_N = np.maximum.accumulate(np.where(self._closes_V[tokens_N], 0, np.arange(len(tokens_N))))
        last_N[:-1] |= self._stops_V[tokens_N[told_by_N[:-1]]] & self._opens_V[tokens_N[1:]]
        last_N[-1:] = True
        return np.flatnonzero(last_N) + 1


def _opens_word(piece: bytes, mark: str | None) -> bool:
    """Whether white space stands before or at the beginning of a piece."""
    if mark == "##":
        return not piece.startswith(b"##")
    if mark is not None:
        return piece.startswith(mark.encode())
    return piece[:1].isspace()


class DenoisedDataset:
    """The packed sequences of a store as pairs: damaged source, whole target. Batches are framed by the model's tokens;
    what is free at the end of a packed sequence is left out."""

    def __init__(self, packed: PackedDataset, denoiser: Denoiser, frame: PairFrame) -> None:
        self._packed, self._denoiser, self._frame = packed, denoiser, frame

    @property
    def n_sequences(self) -> int:
        return self._packed.n_sequences

    def pair(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Damaged and whole tokens of sequence k, unframed."""
        whole = self._packed.tokens(k)
        return self._denoiser(whole, k), whole

    def batch(self, indices: Sequence[int]) -> Seq2SeqBatch:
        return self._frame.batch([self.pair(k) for k in indices], indices)
