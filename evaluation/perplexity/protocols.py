"""Other people's perplexities, computed from passes of ours (`protocol_definitions` says what each script does).

What is shared. A prediction of a causal model does not depend on what follows it, so windows that begin at the same
token with the same thing before it are prefixes of one another: they are read once, to the longest end that any
protocol wants, and each takes its numbers from there. `disjoint` and `lm_eval_rolling` differ by the separator at the
end of a document, which moves its last window by one token: they share all windows but the last of long documents.
`token_strided`, `yarn` and `yarn_truncate` share the first window of a document, `longformer` all of its windows with
a `token_strided` of the same stride. `longlora` reads a window every few tokens of a stream; the blocks of `fla` are
among them where a block is a multiple of that step and the streams are the same (one document). The windows of `yarn`
each begin with `bos`, so past a document's first none is anyone else's. `hf_docs` tokenises a text of its own. Where
keys are rotated by the length of a sequence (dynamic RoPE scaling past the original length) a longer pass changes
earlier predictions: `share=False` reads each window by itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from longspan.data.tokenizer import Tokenizer

from ..passes import LanguageModel, Precision, rotates_by_length
from .documents import EvalDocument, in_full_windows
from .protocol_definitions import ProtocolDefinition, Read, Text, definition_of
from .sliding_window import ScoredRow, check_request, score_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolResult:
    """One model, one text, one way to count.

    loss                nats, averaged as the protocol does
    perplexity          exp(loss)
    bits_per_token      loss / ln 2
    bits_per_byte       and per character, where every token counts once; None elsewhere: there is no sum over the text
    word_perplexity     exp(sum of nll / words), words between white space: what lm-evaluation-harness prints; else None
    tokens              predictions that were scored, each as often as it was
    distinct            of how many different tokens of the text
    windows, read       windows, and the tokens that go through the model in them, were this protocol computed alone
    mean_context        tokens before a scored one in its window, `bos` included, averaged with the loss's weights
    """

    name: str
    source: str
    words: str
    window: int
    stride: int
    loss: float
    perplexity: float
    bits_per_token: float
    bits_per_byte: float | None
    bits_per_character: float | None
    word_perplexity: float | None
    tokens: int
    distinct: int
    windows: int
    read: int
    mean_context: float


def measure_protocols(
    model: LanguageModel,
    documents: Sequence[EvalDocument],
    names: Sequence[str],
    *,
    tokenizer: Tokenizer,
    window: int,
    bos: int | None,
    batch: int,
    device: torch.device | str,
    precision: Precision = "fp32",
    stride: int | None = None,
    strides: Mapping[str, int] = MappingProxyType({}),
    share: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[ProtocolResult]:
    """One result for each name, in that order, from the forward passes that all of them need together.

    documents  as stored, a separator (the tokenizer's `eos_id`) at the end of each
    tokenizer  to tell the separator, and for protocols that tokenise a text of their own
    window     tokens of a forward pass, for every protocol: the M of the scripts
    bos        the token that precedes a text; None: there is none
    stride     of `token_strided` and `longformer`; None: half the window
    strides    by name, in place of what a script fixes (`yarn` 256, `longlora` 256, `hf_docs` 512)
    share      whether windows that begin alike are read once (never where a longer pass changes earlier predictions)
    progress   called with (predictions computed, predictions to compute)

    Raises ValueError for an unknown name, a stride beyond the window, documents with prompts (no other protocol knows
    any), a protocol that needs a `bos` where there is none, and texts that hold none of a protocol's windows.
    """
    definitions = [definition_of(name) for name in names]
    check_request(model, documents, window=window, stride=stride or 1, batch=batch, bos=bos)
    for definition in definitions:
        _check(definition, documents, bos)
    texts = _Texts(documents, tokenizer)
    found: list[tuple[ProtocolDefinition, int, list[_Placed], _Amount]] = []
    for definition in definitions:
        advance = _advance(definition, window, stride, strides)
        reads, amount = _reads(definition, texts, window, advance, bos is not None)
        found.append((definition, advance, reads, amount))
    share = share and not rotates_by_length(model)
    passes = _passes([placed for _, _, reads, _ in found for placed in reads], texts, bos=bos, share=share)
    nll = score_rows(model, passes.rows, batch=batch, device=device, precision=precision, progress=progress)
    return [
        _result(definition, window, advance, bos, reads, [passes.nll_of(nll, placed) for placed in reads], amount)
        for definition, advance, reads, amount in found
    ]


# -- texts and passes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Amount:
    """Of the text that a protocol scores; None: it is no sum over a text, or nobody counted."""

    bytes: int | None = None
    characters: int | None = None
    words: int | None = None


@dataclass(frozen=True, slots=True)
class _Placed:
    """A window over one of the sequences."""

    sequence: int
    read: Read

    def key(self, share: bool) -> tuple[object, ...]:
        """Windows with the same key begin alike."""
        whole = (self.sequence, self.read.start, self.read.after_bos)
        return whole if share else (*whole, self.read.end)


class _Texts:
    """The sequences that protocols read, each held once: a text is its document up to the separator."""

    def __init__(self, documents: Sequence[EvalDocument], tokenizer: Tokenizer) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.sequences = [np.asarray(document.tokens, dtype=np.int64) for document in documents]
        self.strings = [document.text(tokenizer.decode) for document in documents]
        self._streams: dict[Text, tuple[int, int]] = {}

    def text_length(self, document: int) -> int:
        tokens = self.sequences[document]
        return len(tokens) - int(len(tokens) > 0 and tokens[-1] == self.tokenizer.eos_id)

    def stream(self, kind: Text) -> tuple[int, int]:
        """Which sequence holds all documents, and how many of its tokens belong to it."""
        if kind not in self._streams:
            tokens = self._all_documents(kind)
            alone = np.array_equal(self.sequences[0][: len(tokens)], tokens)  # a single document is its own stream
            if not alone:
                self.sequences.append(tokens)
            self._streams[kind] = (0 if alone else len(self.sequences) - 1, len(tokens))
        return self._streams[kind]

    def _all_documents(self, kind: Text) -> np.ndarray:
        stored = self.sequences[: len(self.documents)]
        start = np.array(self.tokenizer.start_ids, dtype=np.int64)
        if kind == "stored stream":
            return np.concatenate(stored)
        if kind == "text stream":
            return np.concatenate([x for i, each in enumerate(stored) for x in (start, each[: self.text_length(i)])])
        joined = self.tokenizer.encode("\n\n".join(self.strings))
        return np.concatenate([start, np.array(joined, dtype=np.int64)])


def _reads(
    definition: ProtocolDefinition, texts: _Texts, window: int, stride: int, bos: bool
) -> tuple[list[_Placed], _Amount]:
    """The windows of a protocol, and how much text they score."""
    amount = _Amount()
    if definition.text in ("documents", "texts"):
        chosen = list(enumerate(texts.documents))
        if definition.full:
            decode = texts.tokenizer.decode
            cut = (
                (i, in_full_windows(each, window=window, stride=stride, first=0 if bos else 1, decode=decode))
                for i, each in chosen
            )
            chosen = [(i, document) for i, document in cut if document is not None]
        stored = definition.text == "documents"
        lengths = [len(document.tokens) if stored else texts.text_length(i) for i, document in chosen]
        reads = [
            _Placed(i, read)
            for (i, document), n in zip(chosen, lengths)
            for read in definition.windows(n, document.prompt, window, stride, bos)
        ]
        if definition.sums:
            seen = {placed.sequence for placed in reads}
            amount = _amount([(document, texts.strings[i]) for i, document in chosen if i in seen], definition)
    else:
        sequence, n = texts.stream(definition.text)
        reads = [_Placed(sequence, read) for read in definition.windows(n, 0, window, stride, bos)]
    if not reads:
        raise ValueError(
            f"protocol {definition.name}: the text has none of its windows of {window:,} tokens (the documents have "
            f"{sum(len(tokens) for tokens in texts.sequences[: len(texts.documents)]):,} tokens); lower window, or "
            "evaluate more text"
        )
    return reads, amount


def _amount(scored: Sequence[tuple[EvalDocument, str]], definition: ProtocolDefinition) -> _Amount:
    characters = [document.n_characters for document, _ in scored]
    counted = [each for each in characters if each is not None]
    return _Amount(
        bytes=sum(document.n_bytes for document, _ in scored),
        characters=sum(counted) if len(counted) == len(characters) else None,
        # The harness counts what its splitting leaves, which for text with white space at an end is one more.
        words=sum(len(re.split(r"\s+", text)) for _, text in scored) if definition.by_word else None,
    )


@dataclass(frozen=True, slots=True)
class _Passes:
    """What is read for all protocols: windows that begin alike in one row, as far as any of them goes."""

    rows: list[ScoredRow]
    places: Mapping[tuple[object, ...], tuple[int, int]]  # of a key: its row, and the first token that this asks for
    share: bool

    def nll_of(self, nll: Sequence[np.ndarray], placed: _Placed) -> np.ndarray:
        row, first = self.places[placed.key(self.share)]
        return nll[row][placed.read.scored - first : placed.read.end - first]


def _passes(wanted: Sequence[_Placed], texts: _Texts, *, bos: int | None, share: bool) -> _Passes:
    spans: dict[tuple[object, ...], tuple[_Placed, int, int]] = {}
    for placed in wanted:
        key, read = placed.key(share), placed.read
        _, scored, end = spans.get(key, (placed, read.scored, read.end))
        spans[key] = (placed, min(scored, read.scored), max(end, read.end))
    rows, places = [], {}
    for number, (key, (placed, scored, end)) in enumerate(spans.items()):
        start = placed.read.start
        tokens = texts.sequences[placed.sequence][start:end]
        if placed.read.after_bos and bos is not None:
            rows.append(ScoredRow(inputs=np.concatenate([[bos], tokens[:-1]]), targets=tokens, first=scored - start))
        else:
            rows.append(ScoredRow(inputs=tokens[:-1], targets=tokens[1:], first=scored - start - 1))
        places[key] = (number, scored)
    return _Passes(rows, places, share)


# -- results ---------------------------------------------------------------------------------------------------------


def _result(
    definition: ProtocolDefinition,
    window: int,
    stride: int,
    bos: int | None,
    placed: Sequence[_Placed],
    nll: Sequence[np.ndarray],
    amount: _Amount,
) -> ProtocolResult:
    reads = [each.read for each in placed]
    sums = np.array([each.sum(dtype=np.float64) for each in nll])
    counts = np.array([len(each) for each in nll])
    weights = np.array([read.weight for read in reads])
    if not weights.any():
        raise ValueError(f"protocol {definition.name} gives every window of so short a text the weight 0")
    loss = float((sums / counts) @ weights / weights.sum())
    nats = float(sums.sum())
    contexts = np.array([(read.scored + read.end - 1) / 2 - read.start + read.after_bos for read in reads])
    bos_words = "nothing" if bos is None else f"token {bos}"
    return ProtocolResult(
        name=definition.name,
        source=definition.source,
        words=definition.words.format(window=f"{window:,}", stride=f"{stride:,}", bos=bos_words),
        window=window,
        stride=stride,
        loss=loss,
        perplexity=_exp(loss),
        bits_per_token=loss / math.log(2),
        bits_per_byte=_per(nats, amount.bytes),
        bits_per_character=_per(nats, amount.characters),
        word_perplexity=_exp(nats / amount.words) if amount.words else None,
        tokens=int(counts.sum()),
        distinct=_distinct(placed),
        windows=len(reads),
        read=sum(read.end - read.start - (not read.after_bos) for read in reads),
        mean_context=float(contexts @ weights / weights.sum()),
    )


def _distinct(placed: Sequence[_Placed]) -> int:
    """How many tokens are asked for at least once."""
    count, sequence, reached = 0, -1, 0
    for each in sorted(placed, key=lambda each: (each.sequence, each.read.scored)):
        if each.sequence != sequence:
            sequence, reached = each.sequence, 0
        count += max(0, each.read.end - max(reached, each.read.scored))
        reached = max(reached, each.read.end)
    return count


def _per(nats: float, units: int | None) -> float | None:
    return nats / math.log(2) / units if units else None


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _advance(definition: ProtocolDefinition, window: int, stride: int | None, strides: Mapping[str, int]) -> int:
    if definition.disjoint:
        return window
    advance = strides.get(definition.name, definition.stride or stride or max(1, window // 2))
    if not 1 <= advance <= window:
        raise ValueError(
            f"protocol {definition.name} advances by {advance:,} tokens, which does not fit window={window:,}: "
            "raise the window, or leave the protocol out"
        )
    return advance


def _check(definition: ProtocolDefinition, documents: Sequence[EvalDocument], bos: int | None) -> None:
    if definition.needs_bos and bos is None:
        raise ValueError(f"protocol {definition.name} puts a token before each document, and there is none: give bos")
    prompted = sum(document.prompt > 0 for document in documents)
    if prompted and definition.text != "documents":
        raise ValueError(
            f"protocol {definition.name} scores every token, but {prompted:,} documents have prompts, which are only "
            "read: leave the protocol out, or evaluate whole texts"
        )
