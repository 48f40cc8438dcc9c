"""Masked language modelling: which tokens of a batch are hidden, and what stands in their place.

The choice is dynamic (Liu et al. 2019, arXiv 1907.11692, §4.1: another one in every pass) and has no state: it is a
pure function of (seed, number of the sequence in the stream), so that a run resumes with the same masks on any number
of ranks, and a validation pass has the same ones each time.

Legend: B sequences, T tokens each, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from .batch import IGNORE, TokenBatch
from .order import hash_ints
from .tokenizer import Tokenizer

# Classes of the first and last byte of a piece, and what else the ends of a piece say.
_ALWAYS, _NEVER, _JOINS = -1, -2, -3  # begins a word; goes on with one; what follows belongs to it
_SPACE, _LETTER, _DIGIT, _SIGN = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Masking:
    """How much is hidden, and how (Devlin et al. 2019, arXiv 1810.04805, §3.1 and appendix A.1).

    probability  share of tokens whose prediction carries loss; special tokens are never chosen
    masked       share of the chosen that become the mask token
    random       share of the chosen that become some other token; the rest stay as they are
    whole_words  choose words instead of tokens: all tokens of a word share its fate
    """

    probability: float = 0.15
    masked: float = 0.8
    random: float = 0.1
    whole_words: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise ValueError(f"probability={self.probability}: a share of the tokens, above 0 and below 1")
        if self.masked < 0 or self.random < 0 or self.masked + self.random > 1:
            raise ValueError(f"masked={self.masked} and random={self.random}: shares of at most 1 together")


class TokenMasker:
    """Hides tokens of batches as a `Masking` says, with one tokenizer's mask token and words.

    Raises ValueError for a tokenizer without a mask token.
    """

    def __init__(self, masking: Masking, tokenizer: Tokenizer, *, seed: int) -> None:
        if tokenizer.mask_id is None:
            raise ValueError("the tokenizer has no mask token")
        self._masking, self._seed = masking, seed
        self._mask_id = tokenizer.mask_id
        self._is_special_V = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_special_V[list(tokenizer.special_ids)] = True
        self._ordinary = np.flatnonzero(~self._is_special_V)
        self._words = WordTable(tokenizer) if masking.whole_words else None

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """The batch with some tokens hidden; its targets are those tokens as they were, and IGNORE everywhere else."""
        tokens_BT = batch.tokens_BT.numpy().copy()
        targets_BT = np.full_like(tokens_BT, IGNORE)
        for tokens_T, targets_T, k in zip(tokens_BT, targets_BT, batch.indices_B.tolist()):
            self._hide(tokens_T, targets_T, k)
        return replace(batch, tokens_BT=torch.from_numpy(tokens_BT), targets_BT=torch.from_numpy(targets_BT))

    def _hide(self, tokens_T: np.ndarray, targets_T: np.ndarray, k: int) -> None:
        masking, length = self._masking, len(tokens_T)
        draws = np.random.Generator(np.random.Philox(key=hash_ints(self._seed, k)))
        chance_T, fate_T = draws.random(length), draws.random(length)
        replacement_T = self._ordinary[draws.integers(len(self._ordinary), size=length)]
        if self._words is not None:
            chance_T = chance_T[self._words.starts(tokens_T)]  # a word has its first token's luck
        chosen_T = (chance_T < masking.probability) & ~self._is_special_V[tokens_T]
        targets_T[chosen_T] = tokens_T[chosen_T]
        hidden_T = chosen_T & (fate_T < masking.masked)
        swapped_T = chosen_T & ~hidden_T & (fate_T < masking.masked + masking.random)
        tokens_T[hidden_T] = self._mask_id
        tokens_T[swapped_T] = replacement_T[swapped_T]


class WordTable:
    """Where words begin in a sequence of tokens, told by the tokens alone.

    A word is a run of letters, of digits or of other signs with the space before it, as GPT-2's pre-tokenizer cuts;
    under WordPiece and SentencePiece, what their marks (`##`, `▁`) say. Bytes beyond ASCII count as letters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = tokenizer.pieces()
        self._first_V = np.full(len(pieces), _ALWAYS, dtype=np.int8)
        self._last_V = np.full(len(pieces), _ALWAYS, dtype=np.int8)
        for token, piece in enumerate(pieces):
            if token not in tokenizer.special_ids:
                self._first_V[token], self._last_V[token] = _ends(piece, tokenizer.word_mark)

    def starts(self, tokens_T: np.ndarray) -> np.ndarray:
        """For each token the index of the first token of its word."""
        first_T, before_T = self._first_V[tokens_T], self._last_V[np.roll(tokens_T, 1)]
        goes_on_T = (first_T == _NEVER) | (first_T == before_T) | (before_T == _JOINS)
        begins_T = (first_T == _ALWAYS) | (before_T == _ALWAYS) | ~goes_on_T
        begins_T[0] = True
        return np.maximum.accumulate(np.where(begins_T, np.arange(len(tokens_T)), 0))


def _ends(piece: bytes, mark: str | None) -> tuple[int, int]:
    """Classes of a piece's first and last byte."""
    if mark == "##":
        return (_NEVER if piece.startswith(b"##") else _ALWAYS), _LETTER
    if mark == "":
        return _ALWAYS, _LETTER
    if mark == "▁":
        return (_ALWAYS if piece.startswith("▁".encode()) else _NEVER), _LETTER
    if not piece:
        return _ALWAYS, _ALWAYS
    first, last = _class_of(piece[0]), _class_of(piece[-1])
    return (_ALWAYS if first == _SPACE else first), (_JOINS if piece.endswith(b" ") else last)


def _class_of(byte: int) -> int:
    character = bytes([byte])
    if byte >= 0x80 or character.isalpha():
        return _LETTER
    return _SPACE if character.isspace() else _DIGIT if character.isdigit() else _SIGN
