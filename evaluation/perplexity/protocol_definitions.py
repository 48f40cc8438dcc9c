"""How other people's scripts cut a text into windows, what they score in each and what they average.

A protocol is a list of windows over some text, what is asked for in each, and the weight of each window's mean in the
average. Five questions tell them apart (docs/evaluation.md has the answers as a table): is the text one document at a
time or a stream of all; what precedes a window; how far does it advance; which of its tokens count; what is averaged?

What the scripts do besides, and the definitions don't: arithmetic in half precision, and 2.71828 for e in LongLoRA's,
which is 7e-7 of the loss.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from .sliding_window import windows_of

Text = Literal["documents", "texts", "stored stream", "text stream", "joined text"]
"""documents      each alone, as it is stored: with the separator at its end
texts          each alone, without it
stored stream  the documents as they are stored, one after the other
text stream    the texts one after the other, each after the tokens that the tokenizer's own template puts before a text
joined text    the texts with two line ends between them, tokenised as one"""


@dataclass(frozen=True, slots=True)
class Read:
    """One window over a text: the tokens [start, end) are read, those of [scored, end) are asked for.

    after_bos  whether `bos` is put before the first of them, which can then be asked for too
    weight     of the mean of this window's nll in the average
    """

    start: int
    scored: int
    end: int
    after_bos: bool
    weight: float


Windows = Callable[[int, int, int, int, bool], Iterator[Read]]
"""(tokens of the text, how many of them are a prompt, window, stride, whether there is a bos) -> its windows"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolDefinition:
    """A way to count, complete but for the length of a window.

    source      whose script or paper
    text        what is read
    stride      tokens that windows advance by, where the script fixes it; None: half a window, or what is asked for
    disjoint    windows advance by their own length, whatever is asked for
    needs_bos   cannot be computed without a token that precedes a text
    full        only windows that a document fills are read, and only the last `stride` tokens of each are asked for
    sums        every token counts once and the same, so that bits per byte and per character are sums over the text
    by_word     perplexity per word is part of it
    words       the definition, with {window}, {stride} and {bos}
    """

    name: str
    source: str
    text: Text
    windows: Windows
    words: str
    stride: int | None = None
    disjoint: bool = False
    needs_bos: bool = False
    full: bool = False
    sums: bool = False
    by_word: bool = False


def _ours(n: int, prompt: int, window: int, stride: int, bos: bool) -> Iterator[Read]:
    """`sliding_window.windows_of`, whose windows are over predictions: without a bos none asks for the first token."""
    first = 0 if bos else 1
    for piece in windows_of(n - first, window=window, stride=stride, unscored=max(0, prompt - first)):
        starts = bos and piece.start == 0
        read_from = piece.start if starts or not bos else piece.start - 1
        yield Read(read_from, piece.scored + first, piece.end + first, starts, piece.end - piece.scored)


def _yarn(n: int, prompt: int, window: int, stride: int, bos: bool) -> Iterator[Read]:
    """bos takes a place in every window; the last one ends with the text and isn't full; a window's mean weighs 1."""
    reads = window - bos
    done = 0
    for start in range(0, n, stride):
        end = min(start + reads, n)
        scored = max(done, start if bos else start + 1)
        if scored < end:
            yield Read(start, scored, end, bos, 1.0)
        done = end
        if end == n:
            return


def _yarn_truncate(n: int, prompt: int, window: int, stride: int, bos: bool) -> Iterator[Read]:
    """The beginning of each document that fits, alone."""
    yield from _yarn(min(n, window - bos), 0, window, stride, bos)


def _longlora(n: int, prompt: int, window: int, stride: int, bos: bool) -> Iterator[Read]:
    """Every prediction of every window; the script drops the last window that would fit."""
    for start in range(0, n - window, stride)[:-1]:
        yield Read(start, start + 1, start + window, False, 1.0)


def _hf_docs(n: int, prompt: int, window: int, stride: int, bos: bool) -> Iterator[Read]:
    """The weight is one less than the tokens of a window that are new, also where each of them is predicted."""
    done = 0
    for start in range(0, n, stride):
        end = min(start + window, n)
        scored = max(done, start + 1)
        if scored < end:
            yield Read(start, scored, end, False, end - done - 1)
        done = end
        if end == n:
            return


def _fla(n: int, prompt: int, window: int, stride: int, bos: bool) -> Iterator[Read]:
    """Whole blocks; the loss of each is a mean over its predictions, and weighs the same."""
    for start in range(0, n - window + 1, window):
        yield Read(start, start + 1, start + window, False, 1.0)


PROTOCOLS: Mapping[str, ProtocolDefinition] = MappingProxyType(
    {
        definition.name: definition
        for definition in (
            ProtocolDefinition(
                name="token_strided",
                source="Longspan",
                text="documents",
                windows=_ours,
                sums=True,
                words="each document alone, its separator scored, {bos} before it once; windows of {window} that "
                "advance by {stride}, the last one full; each token once; mean over tokens",
            ),
            ProtocolDefinition(
                name="disjoint",
                source="Longspan, stride = window",
                text="documents",
                windows=_ours,
                disjoint=True,
                sums=True,
                words="each document alone, its separator scored, {bos} before it once; disjoint windows of {window}, "
                "the last one full; each token once; mean over tokens",
            ),
            ProtocolDefinition(
                name="yarn",
                source="YaRN eval/perplexity.py, EasyContext eval_ppl.py",
                text="texts",
                windows=_yarn,
                stride=256,
                words="each document alone, {bos} before every window; windows of {window} with it that advance by "
                "{stride}, the last one shorter; new tokens of each; mean over windows of their means",
            ),
            ProtocolDefinition(
                name="yarn_truncate",
                source="YaRN eval/perplexity.py --truncate",
                text="texts",
                windows=_yarn_truncate,
                disjoint=True,
                words="the first {window} tokens of each document, {bos} among them; mean over documents of their "
                "means",
            ),
            ProtocolDefinition(
                name="longlora",
                source="LongLoRA eval.py, one window in a batch",
                text="stored stream",
                windows=_longlora,
                stride=256,
                words="all documents as one stream, separators between them; a window of {window} every {stride} "
                "tokens but the last that fits; every token of it but the first, as often as it is in a window; "
                "mean over windows",
            ),
            ProtocolDefinition(
                name="hf_docs",
                source="Hugging Face Transformers documentation, perplexity",
                text="joined text",
                windows=_hf_docs,
                stride=512,
                words="all documents as one text with two line ends between them; windows of {window} that advance by "
                "{stride}, the last one shorter; each token but the first once; mean over windows of their means, "
                "weighted by one less than the tokens that are new in each",
            ),
            ProtocolDefinition(
                name="lm_eval_rolling",
                source="lm-evaluation-harness loglikelihood_rolling",
                text="texts",
                windows=_ours,
                disjoint=True,
                needs_bos=True,
                sums=True,
                by_word=True,
                words="each document alone without a separator, {bos} before it once; disjoint windows of {window}, "
                "the last one full; each token once; sum over tokens",
            ),
            ProtocolDefinition(
                name="fla",
                source="flash-linear-attention evals/ppl.py, one block in a batch",
                text="text stream",
                windows=_fla,
                disjoint=True,
                words="all documents as one stream without separators; disjoint blocks of {window}, what is left over "
                "not read; every token of a block but its first; mean over tokens",
            ),
            ProtocolDefinition(
                name="longformer",
                source="Beltagy et al. 2020, §4.2.2 (there windows of 32,256 that advance by 512)",
                text="documents",
                windows=_ours,
                full=True,
                sums=True,
                words="each document alone, its separator scored, {bos} before it once; full windows of {window} that "
                "advance by {stride}; the last {stride} of each; mean over tokens",
            ),
        )
    }
)


def protocol_names() -> tuple[str, ...]:
    return tuple(PROTOCOLS)


def definition_of(name: str) -> ProtocolDefinition:
    """Raises ValueError that names the nearest ones."""
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PROTOCOLS)}"
        raise ValueError(f"there is no perplexity protocol '{name}'; {hint}")
    return PROTOCOLS[name]
