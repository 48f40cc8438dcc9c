"""What becomes of a text that is longer than a model reads: named strategies, from leaving tokens out to reading parts.

    keep_head, keep_tail, cut_middle   the beginning, the end, or both ends are read
    bm25, word_overlap                 the parts that have most in common with the question are read, in their order
    best_chunk                         overlapping parts are asked one by one; the answer the model is surest of counts
    map_reduce                         parts are answered (summarised) one by one, then the answers, until they fit

Everything here works on token ids and knows which tokens of the text it reads; what answers a prompt is a `Writer`.
Reading parts apart and answering once, over all of them, is an encoder–decoder's (`fusion`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from longspan.data.questions import Question

from ..tasks.task import Truncation

_WORD = re.compile(r"\w+")
_K1, _B = 1.2, 0.75  # BM25: how fast a repeated word saturates, and how much longer parts are held back

Scores = Callable[[str, Sequence[str]], list[float]]


class NoRoom(ValueError):  # noqa: N818  # says what is the matter, as its users read it
    """A model that reads too little for any of a text beside instructions and question."""


# -- tokens -----------------------------------------------------------------------------------------------------------


def kept_spans(n_tokens: int, room: int, rule: Truncation) -> tuple[range, ...]:
    """Which of `n_tokens` tokens are left where `room` fit. cut_middle leaves an odd one to the beginning.

    Raises ValueError for a text that does not fit under "refuse", and for a negative room.
    """
    if room < 0:
        raise ValueError(f"room={room}: a number of tokens is 0 or more")
    if n_tokens <= room:
        return (range(n_tokens),)
    if rule == "keep_head":
        return (range(room),)
    if rule == "keep_tail":
        return (range(n_tokens - room, n_tokens),)
    if rule == "cut_middle":
        return (range((room + 1) // 2), range(n_tokens - room // 2, n_tokens))
    raise ValueError(f"a text of {n_tokens:,} tokens where {room:,} fit, and the rule '{rule}' leaves nothing out")


def truncate(tokens: Sequence[int], room: int, rule: Truncation) -> list[int]:
    """The tokens that `kept_spans` leaves."""
    return _taken(tokens, kept_spans(len(tokens), room, rule))


def chunk_spans(n_tokens: int, size: int, overlap: int = 0) -> tuple[range, ...]:
    """Parts of `size` tokens, each beginning with the last `overlap` tokens of the one before; the last may be shorter.

    Every token is in at least one of them, and none is part of another. Raises ValueError where overlap reaches size.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"overlap={overlap} with size={size}: a part overlaps the next by fewer tokens than it has")
    step = size - overlap
    starts = range(0, max(n_tokens - overlap, min(n_tokens, 1)), step)
    return tuple(range(start, min(start + size, n_tokens)) for start in starts)


def context_span(question: Question, chars_T2: np.ndarray) -> tuple[int, int]:
    """The tokens [first, last) of a whole prompt that stand for characters of the context and of nothing else: a token
    that reaches beyond it stays whatever is cut.

    chars_T2   characters [start, end) of the prompt that each token stands for
    """
    begin, end = len(question.before), len(question.before) + len(question.context)
    inside = np.flatnonzero((chars_T2[:, 0] >= begin) & (chars_T2[:, 1] <= end))
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)


def _taken(tokens: Sequence[int], spans: Sequence[range]) -> list[int]:
    return [token for span in spans for token in tokens[span.start : span.stop]]


# -- selection --------------------------------------------------------------------------------------------------------


def bm25(query: str, parts: Sequence[str]) -> list[float]:
    """How well each part answers the words of the query, by the words' rarity among the parts (Robertson and Zaragoza
    2009, §3.2; k1 = 1.2, b = 0.75). Words are runs of letters and digits, in lower case."""
    counts = [Counter(_words(part)) for part in parts]
    sizes = [sum(count.values()) for count in counts]
    mean = sum(sizes) / max(1, len(sizes)) or 1.0
    scores = [0.0] * len(parts)
    for word in set(_words(query)):
        having = sum(word in count for count in counts)
        rarity = math.log(1 + (len(parts) - having + 0.5) / (having + 0.5))
        for part, (count, size) in enumerate(zip(counts, sizes)):
            often = count[word]
            scores[part] += rarity * often * (_K1 + 1) / (often + _K1 * (1 - _B + _B * size / mean))
    return scores


def word_overlap(query: str, parts: Sequence[str]) -> list[float]:
    """Share of the query's different words that each part has."""
    wanted = set(_words(query))
    return [len(wanted & set(_words(part))) / max(1, len(wanted)) for part in parts]


def best_in_order(scores: Sequence[float], sizes: Sequence[int], room: int) -> list[int]:
    """The parts of highest score that fit together, as they stand in the text; of equals the earlier is taken first."""
    chosen: list[int] = []
    for part in sorted(range(len(scores)), key=lambda each: (-scores[each], each)):
        if sizes[part] <= room:
            chosen.append(part)
            room -= sizes[part]
    return sorted(chosen)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


# -- strategies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote behind a prompt. `logprobs` are its tokens', natural."""

    text: str
    logprobs: tuple[float, ...] = ()

    @property
    def confidence(self) -> float:
        """Mean log-probability of a token; of nothing, -inf."""
        return sum(self.logprobs) / len(self.logprobs) if self.text and self.logprobs else -math.inf


class Writer(Protocol):
    """What strategies ask. `max_prompt` is how many tokens a prompt may have."""

    @property
    def max_prompt(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def write(self, prompts: Sequence[Sequence[int]]) -> Sequence[Written]:
        """A text for each prompt."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LongText:
    """A prompt in tokens, and the question in words, that parts of the text are compared with."""

    before: Sequence[int] = ()
    context: Sequence[int]
    after: Sequence[int] = ()
    query: str = ""

    def room(self, max_prompt: int) -> int:
        """Tokens of the text that fit. Raises NoRoom where none does."""
        room = max_prompt - len(self.before) - len(self.after)
        if room < 1:
            raise NoRoom(
                f"the model reads {max_prompt:,} tokens, of which instructions and question alone take "
                f"{max_prompt - room:,}: no text fits between them"
            )
        return room

    def prompt(self, spans: Sequence[range]) -> list[int]:
        """With these parts of the text alone, side by side."""
        return [*self.before, *_taken(self.context, spans), *self.after]


@dataclass(frozen=True, slots=True)
class Processed:
    """text     the answer
    read     which tokens of the text the model was shown, one span a part; they may overlap
    prompts  how often the model was asked
    """

    text: str
    read: tuple[range, ...]
    prompts: int


class Strategy(Protocol):
    def __call__(self, text: LongText, writer: Writer) -> Processed:
        """Raises NoRoom where instructions and question leave too little of it for the text."""
        ...


@dataclass(frozen=True, slots=True)
class Truncated:
    """One prompt, with what a rule leaves of the text."""

    rule: Truncation

    def __call__(self, text: LongText, writer: Writer) -> Processed:
        return _at_once(text, kept_spans(len(text.context), text.room(writer.max_prompt), self.rule), writer)


@dataclass(frozen=True, slots=True)
class Selected:
    """One prompt, with the parts of `size` tokens that score highest for the question, as many as fit."""

    scores: Scores
    size: int = 256

    def __call__(self, text: LongText, writer: Writer) -> Processed:
        return _at_once(text, self.spans(text, writer.max_prompt, writer.decode), writer)

    def spans(self, text: LongText, max_prompt: int, decode: Callable[[Sequence[int]], str]) -> tuple[range, ...]:
        """The parts of the text that are read, where a prompt has so many tokens. Raises NoRoom where none fits."""
        room = text.room(max_prompt)
        if len(text.context) <= room:
            return (range(len(text.context)),)
        spans = chunk_spans(len(text.context), min(self.size, room))
        parts = [decode(_taken(text.context, (span,))) for span in spans]
        chosen = best_in_order(self.scores(text.query, parts), [len(span) for span in spans], room)
        return tuple(spans[part] for part in chosen)


@dataclass(frozen=True, slots=True)
class BestChunk:
    """A prompt for each part, as long as fits; neighbours share `overlap` tokens (at most half of a part), so that what
    stands at a cut is read whole once. Of the answers, the one with the highest mean log-probability of a token."""

    overlap: int = 128

    def __call__(self, text: LongText, writer: Writer) -> Processed:
        room = text.room(writer.max_prompt)
        spans = chunk_spans(len(text.context), room, min(self.overlap, room // 2)) or (range(0),)
        written = writer.write([text.prompt((span,)) for span in spans])
        best = max(written, key=lambda each: each.confidence)  # the first of equals
        return Processed(best.text, spans, len(spans))


@dataclass(frozen=True, slots=True)
class MapReduce:
    """A prompt for each part, then for the answers in their order, and again, until one prompt holds them all. Of each
    answer at most half of what fits is kept, so every round halves the text."""

    separator: str = "\n"

    def __call__(self, text: LongText, writer: Writer) -> Processed:
        room = text.room(writer.max_prompt)
        between = writer.encode(self.separator)
        most = room // 2 - len(between)
        context, read, prompts = list(text.context), (range(len(text.context)),), 0
        while len(context) > room:
            if most < 1:
                raise NoRoom(f"there is room for {room} tokens of text, too few to hold two answers to parts of it")
            spans = chunk_spans(len(context), room)
            read = spans if prompts == 0 else read
            written = writer.write([[*text.before, *_taken(context, (span,)), *text.after] for span in spans])
            prompts += len(spans)
            context = [token for each in written for token in [*writer.encode(each.text)[:most], *between]]
            context = context[: len(context) - len(between)]
        (last,) = writer.write([[*text.before, *context, *text.after]])
        return Processed(last.text, read, prompts + 1)


def _at_once(text: LongText, spans: tuple[range, ...], writer: Writer) -> Processed:
    (written,) = writer.write([text.prompt(spans)])
    return Processed(written.text, spans, 1)


STRATEGIES: Mapping[str, Strategy] = {
    "keep_head": Truncated("keep_head"),
    "keep_tail": Truncated("keep_tail"),
    "cut_middle": Truncated("cut_middle"),
    "bm25": Selected(bm25),
    "word_overlap": Selected(word_overlap),
    "best_chunk": BestChunk(),
    "map_reduce": MapReduce(),
}
"""By name, with the sizes that they have unless one says otherwise."""
