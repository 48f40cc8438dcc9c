"""Documents to evaluate, and a budgeted sample of them from a token store."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from longspan.data.sources import SourceSpec, read
from longspan.data.tokenizer import Tokenizer

SAMPLE_SEED = 0  # every budgeted sample of ours: two evaluations of the same store score the same documents


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalDocument:
    """A document to score.

    tokens        integer ids [n]
    n_bytes       UTF-8 bytes of the text that the scored tokens stand for (control tokens count none)
    source        which source of the mixture it comes from
    id            names it in messages
    truncated     whether `tokens` are only the beginning of the document
    prompt        how many tokens, from the first on, are read and not scored
    n_characters  Unicode code points of that text; None: not counted
    text_sha256   of the UTF-8 bytes of its text as it was before it was tokenised, whole; None: it is not known
    """

    tokens: np.ndarray
    n_bytes: int
    source: str = ""
    id: str = ""
    truncated: bool = False
    prompt: int = 0
    n_characters: int | None = None
    text_sha256: str | None = None

    def text(self, decode: Callable[[Sequence[int]], str]) -> str:
        """What the scored tokens stand for, by a tokenizer's `decode`."""
        text = decode(self.tokens[self.prompt :].tolist())
        # A cut inside a multi-byte character decodes to U+FFFD, which is no part of the text.
        return text.rstrip("\ufffd") if self.truncated else text

    def prompt_text(self, decode: Callable[[Sequence[int]], str]) -> str:
        """What the tokens before the scored ones stand for."""
        return decode(self.tokens[: self.prompt].tolist())


class StoredDocuments(Protocol):
    """One split of a token store (`data.store.TokenStore.documents`)."""

    def __len__(self) -> int: ...
    def tokens(self, document: int, /) -> np.ndarray: ...
    def loss_mask(self, document: int, /) -> np.ndarray | None: ...
    def n_bytes(self, document: int, /) -> int: ...
    def source(self, document: int, /) -> str: ...
    def text_sha256(self, document: int, /) -> str | None: ...


@dataclass(frozen=True, slots=True)
class TextDocuments:
    """Tokenised documents in memory, in the form of a store's: each ends with the separator."""

    ids: Sequence[np.ndarray]
    sizes: Sequence[int]
    sources: Sequence[str]
    digests: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, document: int) -> np.ndarray:
        return self.ids[document]

    def loss_mask(self, document: int) -> None:
        """Every token counts."""

    def n_bytes(self, document: int) -> int:
        return self.sizes[document]

    def source(self, document: int) -> str:
        return self.sources[document]

    def text_sha256(self, document: int) -> str:
        return self.digests[document]


def text_documents(source: SourceSpec, tokenizer: Tokenizer) -> TextDocuments:
    """The documents of a source, tokenised. Raises SourceError for one that holds none."""
    documents = list(read(source))
    encoded = tokenizer.encode_batch([document.text for document in documents])
    return TextDocuments(
        [np.array([*ids, tokenizer.eos_id]) for ids in encoded],
        [len(document.text.encode()) for document in documents],
        [document.source for document in documents],
        [hashlib.sha256(document.text.encode()).hexdigest() for document in documents],
    )


def documents_from(
    documents: StoredDocuments,
    *,
    limit: int | None = None,
    max_tokens: int | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    seed: int = SAMPLE_SEED,
) -> list[EvalDocument]:
    """A sample of a store's documents: whole ones in a seeded random order until a budget is spent.

    limit       at most this many documents; None: all
    max_tokens  at most this many tokens. The document that would exceed them is cut there when `decode` (a tokenizer's)
                is given, so that its bytes can be counted, and left out otherwise
    The prompts of documents that have one (their tokens carry no loss in training) are read and not scored; `decode`
    is needed for them, and to count characters.
    Returns them in the order of the store, each with its index as id. Raises ValueError when the budget admits none.
    """
    chosen: list[tuple[int, int]] = []
    left = math.inf if max_tokens is None else max_tokens
    for i in np.random.default_rng(seed).permutation(len(documents))[:limit]:
        length = len(documents.tokens(int(i)))
        take = length if length <= left else (int(left) if decode is not None else 0)
        if take:
            chosen.append((int(i), take))
        if take < length:
            break
        left -= length
    if not chosen and len(documents):
        raise ValueError(
            f"max_tokens={max_tokens}: the first document drawn has more tokens than that; raise max_tokens, "
            "or pass decode so that a document may be cut"
        )
    return [_stored(documents, i, take, decode) for i, take in sorted(chosen)]


def tokens_digest(documents: Iterable[EvalDocument]) -> str:
    """SHA-256 of what a model reads and of which of it is scored: each document's number of tokens, how many of them
    are prompt, and the tokens, as little-endian 64-bit integers. Names count nothing."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(np.array([len(document.tokens), document.prompt], dtype="<i8").tobytes())
        digest.update(np.asarray(document.tokens).astype("<i8").tobytes())
    return digest.hexdigest()


def text_digest(documents: Iterable[EvalDocument], decode: Callable[[Sequence[int]], str]) -> str:
    """SHA-256 of the same in words, which tokenizers have in common: of a line for each document with the SHA-256 of
    its prompt and of its text. A text that is known as it was before it was tokenised, and is scored whole, counts as
    that; any other as the tokenizer's `decode` has it."""
    digest = hashlib.sha256()
    for document in documents:
        prompt = hashlib.sha256(document.prompt_text(decode).encode()).hexdigest()
        text = None if document.prompt or document.truncated else document.text_sha256
        digest.update(f"{prompt} {text or hashlib.sha256(document.text(decode).encode()).hexdigest()}\n".encode())
    return digest.hexdigest()


def in_full_windows(
    document: EvalDocument, *, window: int, stride: int, first: int, decode: Callable[[Sequence[int]], str]
) -> EvalDocument | None:
    """The document as Beltagy et al. 2020 (arXiv 2004.05150, §4.2.2) score it: windows that are full, and of each the
    last `stride` tokens alone. What comes before the first of them becomes prompt, what the last full window does not
    reach is cut. None: it is shorter than a window.

    first   the first token that is asked for: 0 where another precedes the document, else 1
    decode  a tokenizer's, to count the bytes of what is left (a character belongs to the token that completes it)
    """
    spare = len(document.tokens) - first - window
    if spare < 0:
        return None
    end = first + window + spare // stride * stride
    prompt = max(document.prompt, first + window - stride)
    if prompt >= end:
        return None
    before, through = (decode(document.tokens[:n].tolist()).rstrip("\ufffd") for n in (prompt, end))
    return replace(
        document,
        tokens=document.tokens[:end],
        prompt=prompt,
        n_bytes=len(through.encode()) - len(before.encode()),
        n_characters=len(through) - len(before),
        truncated=document.truncated or end < len(document.tokens),
    )


def _stored(
    documents: StoredDocuments, i: int, take: int, decode: Callable[[Sequence[int]], str] | None
) -> EvalDocument:
    tokens = np.asarray(documents.tokens(i))
    prompt = _prompt_length(documents, i)
    whole = EvalDocument(
        tokens=tokens,
        n_bytes=int(documents.n_bytes(i)),
        source=str(documents.source(i)),
        id=str(i),
        prompt=prompt,
        text_sha256=documents.text_sha256(i),
    )
    if take == len(tokens) and not prompt:
        return whole if decode is None else replace(whole, n_characters=len(whole.text(decode)))
    if decode is None:
        raise ValueError(f"document {i} has a prompt, which is not scored: pass decode, to count the bytes of the rest")
    taken = replace(whole, tokens=tokens[:take], truncated=take < len(tokens), prompt=min(prompt, take))
    text = taken.text(decode)
    return replace(taken, n_bytes=len(text.encode()), n_characters=len(text))


def _prompt_length(documents: StoredDocuments, i: int) -> int:
    """How many tokens come before the first one that carries loss."""
    mask = documents.loss_mask(i)
    if mask is None or mask.all():
        return 0
    carrying = np.flatnonzero(mask)
    prompt = int(carrying[0]) if len(carrying) else len(mask)
    if len(carrying) != len(mask) - prompt:
        raise ValueError(f"document {i} has tokens without loss behind its prompt, which evaluation does not know")
    return prompt
