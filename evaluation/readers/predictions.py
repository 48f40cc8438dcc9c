"""What a fine-tuned encoder says of texts: classes, and answers that stand in a text.

`predict_classes` and `predict_answers` read texts and a checkpoint's tokenizer. The tallies read batches and logits one
by one, as a validation makes them, and end in the same scores.

Legend: B rows, T tokens, C classes, L tokens of an answer at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.data.labelled import (
    MOST_QUESTION,
    LabelledBatch,
    Row,
    TextItems,
    WindowItems,
    batch_of,
    default_overlap,
    framed,
    windows_of,
)
from longspan.data.tokenizer import Tokenizer
from longspan.kernels.attention import AttentionContext
from longspan.model.encoder import Encoder

from ..metrics.accuracy import score_answers, score_classes

MAX_ANSWER_TOKENS = 30


@dataclass(frozen=True, slots=True)
class ClassPrediction:
    """The likeliest class and the probability of each, by name."""

    label: str
    probabilities: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AnswerPrediction:
    """text   the answer as it stands in the text; empty where the model finds none
    start  its first character, `end` the one behind its last
    score  sum of the logits of its ends, less that of the first token: above 0, likelier than no answer
    """

    text: str
    start: int
    end: int
    score: float


def logits_of(model: Encoder, batch: LabelledBatch) -> Tensor:
    """[B, C] of a classifier, [B, T, 2] of a head for answers. The task's tokens are global where a layer has global
    tokens; token types are given where the model tells them apart."""
    config = model.config
    has_globals = any(group.spec.global_tokens for groups in config.pattern_groups().values() for group in groups)
    context = AttentionContext(
        is_global=batch.is_global_BT if has_globals else None,
        kv_lengths=batch.lengths_B,
    )
    types_BT = batch.types_BT if config.n_types > 1 else None
    return model(batch.tokens_BT, context, token_types_BT=types_BT)


# -- texts ------------------------------------------------------------------------------------------------------------


def predict_classes(
    model: Encoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    context: int | None = None,
    batch: int = 8,
) -> list[ClassPrediction]:
    """The class of each text; of a text longer than `context` tokens (None: the model's max_positions) its beginning.

    Raises ValueError for a model without a classification head.
    """
    _require(model, "classification")
    context = context or model.config.max_positions
    frame = tokenizer.frame
    room = context - len(frame.before) - len(frame.after)
    rows = [framed(frame, ids[:room]) for ids in tokenizer.encode_batch(texts)]
    found: list[ClassPrediction] = []
    owners = range(len(rows))
    for _, logits_BC in _passes(model, rows, owners, pad=tokenizer.eos_id, context=context, batch=batch):
        for shares in logits_BC.float().softmax(-1).tolist():
            named = dict(zip(model.config.labels, shares, strict=True))
            found.append(ClassPrediction(max(named, key=named.__getitem__), named))
    return found


def predict_answers(
    model: Encoder,
    tokenizer: Tokenizer,
    pairs: Iterable[tuple[str, str]],
    *,
    context: int | None = None,
    overlap: int | None = None,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    may_be_missing: bool = False,
    batch: int = 8,
) -> list[AnswerPrediction]:
    """The answer to each (question, text), as characters of the text.

    A text longer than `context` tokens (None: the model's max_positions) is read in windows that share `overlap` tokens
    (None: a quarter of the context, at most 128), a question in at most a third of the context.

    may_be_missing   where the first token scores higher than every answer, the answer is empty (SQuAD 2)
    Raises ValueError for a model without a head for answers, or an overlap that leaves no room.
    """
    _require(model, "qa")
    context = context or model.config.max_positions
    overlap = default_overlap(context) if overlap is None else overlap
    frame = tokenizer.frame
    rows: list[Row] = []
    owners: list[int] = []
    places: list[tuple[str, np.ndarray]] = []
    for owner, (question, text) in enumerate(pairs):
        ids, chars_T2 = tokenizer.encode_offsets([text])[0]
        asked = tokenizer.encode(question)[: context // MOST_QUESTION]
        room = context - len(asked) - len(frame.before) - len(frame.between) - len(frame.after)
        if room <= overlap:
            raise ValueError(f"overlap={overlap}: the question leaves {room} of {context} tokens to the text")
        for first, size in windows_of(len(ids), room, overlap):
            rows.append(framed(frame, ids[first : first + size].tolist(), asked, first))
            owners.append(owner)
        places.append((text, chars_T2))
    spans = [
        span
        for made, logits_BT2 in _passes(model, rows, owners, pad=tokenizer.eos_id, context=context, batch=batch)
        for span in best_spans(made, logits_BT2, max_answer_tokens)
    ]
    best = best_of_windows(spans)
    return [
        _answer(best[owner], text, chars_T2, may_be_missing=may_be_missing)
        for owner, (text, chars_T2) in enumerate(places)
    ]


def _require(model: Encoder, head: str) -> None:
    if model.config.head != head:
        raise ValueError(f"this needs an encoder with head={head}; this one has head={model.config.head}")


@torch.no_grad()
def _passes(
    model: Encoder, rows: Sequence[Row], owners: Sequence[int], *, pad: int, context: int, batch: int
) -> Iterator[tuple[LabelledBatch, Tensor]]:
    device = model.embedding.weight.device
    for start in range(0, len(rows), batch):
        part = range(start, min(start + batch, len(rows)))
        made = batch_of(
            [rows[row] for row in part],
            pad=pad,
            limit=context,
            records=[owners[row] for row in part],
            indices=list(part),
        )
        yield made, logits_of(model, made.to(device))


# -- spans ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpanGuess:
    """The best answer in one window: tokens `start` to `last` of record `record`'s text; `first`: where the window
    begins in it. `score` as of AnswerPrediction."""

    record: int
    first: int
    start: int
    last: int
    score: float


def best_spans(batch: LabelledBatch, logits_BT2: Tensor, max_tokens: int) -> list[SpanGuess]:
    """Of each row the span of at most `max_tokens` tokens of its text with the highest sum of its ends' logits. A row
    without text gives its first token, with the score -inf."""
    start_BT, end_BT = logits_BT2.float().cpu().unbind(-1)
    first_B = start_BT[:, 0] + end_BT[:, 0]
    begins_B, sizes_B = batch.begins_B.cpu(), batch.sizes_B.cpu()
    place_T = torch.arange(start_BT.shape[1])
    outside_BT = (place_T < begins_B[:, None]) | (place_T >= (begins_B + sizes_B)[:, None])
    start_BT, end_BT = start_BT.masked_fill(outside_BT, -math.inf), end_BT.masked_fill(outside_BT, -math.inf)
    # [b, t, l] is the logit of an end l tokens behind t.
    end_BTL = F.pad(end_BT, (0, max_tokens - 1), value=-math.inf).unfold(1, max_tokens, 1)
    score_B, flat_B = (start_BT[:, :, None] + end_BTL).flatten(1).max(1)
    guesses: list[SpanGuess] = []
    rows = zip(batch.records_B.tolist(), batch.firsts_B.tolist(), begins_B.tolist(), flat_B.tolist(), strict=True)
    for (record, first, begin, flat), score in zip(rows, (score_B - first_B).tolist(), strict=True):
        place, more = divmod(flat, max_tokens)
        start = first + max(0, place - begin)
        guesses.append(SpanGuess(record, first, start, start + more, score))
    return guesses


def best_of_windows(guesses: Iterable[SpanGuess]) -> dict[int, SpanGuess]:
    """For each record the guess of the highest score, the earliest among equals."""
    best: dict[int, SpanGuess] = {}
    for guess in sorted(guesses, key=lambda each: (-each.score, each.first)):
        best.setdefault(guess.record, guess)
    return best


def _answer(guess: SpanGuess, text: str, chars_T2: np.ndarray, *, may_be_missing: bool) -> AnswerPrediction:
    if guess.score == -math.inf or (may_be_missing and guess.score < 0):
        return AnswerPrediction("", 0, 0, guess.score)
    start, end = int(chars_T2[guess.start, 0]), int(chars_T2[guess.last, 1])
    found = text[start:end]
    start += len(found) - len(found.lstrip())  # byte-level tokens hold the space before a word
    return AnswerPrediction(found.strip(), start, start + len(found.strip()), guess.score)


# -- tallies ----------------------------------------------------------------------------------------------------------


class Tally(Protocol):
    """Collects what a model says of batches; several processes' parts together make the scores."""

    def add(self, batch: LabelledBatch, logits: Tensor) -> None: ...

    def parts(self) -> list[tuple[float, ...]]:
        """What was collected, as plain data."""
        ...

    def scores(self, parts: Iterable[tuple[float, ...]]) -> dict[str, float]:
        """By name; empty where no record is complete. What came twice counts once."""
        ...


class ClassTally:
    """Classes of texts."""

    def __init__(self, items: TextItems) -> None:
        self._n_classes = len(items.classes)
        self._found: list[tuple[float, ...]] = []

    def add(self, batch: LabelledBatch, logits: Tensor) -> None:
        guesses = logits.argmax(-1).tolist()
        truths = batch.targets_BN[:, 0].tolist()
        self._found += list(zip(batch.records_B.tolist(), truths, guesses, strict=True))

    def parts(self) -> list[tuple[float, ...]]:
        return self._found

    def scores(self, parts: Iterable[tuple[float, ...]]) -> dict[str, float]:
        once = {int(record): (int(truth), int(guess)) for record, truth, guess in parts}
        if not once:
            return {}
        truths, guesses = zip(*once.values(), strict=True)
        return asdict(score_classes(truths, guesses, n_classes=self._n_classes))


class AnswerTally:
    """Answers in texts. A record counts when all its windows were seen.

    may_be_missing  as of `predict_answers`
    """

    def __init__(
        self, items: WindowItems, *, max_answer_tokens: int = MAX_ANSWER_TOKENS, may_be_missing: bool = False
    ) -> None:
        self._items, self._most, self._may_be_missing = items, max_answer_tokens, may_be_missing
        self._found: list[tuple[float, ...]] = []

    def add(self, batch: LabelledBatch, logits: Tensor) -> None:
        self._found += [astuple(guess) for guess in best_spans(batch, logits, self._most)]

    def parts(self) -> list[tuple[float, ...]]:
        return self._found

    def scores(self, parts: Iterable[tuple[float, ...]]) -> dict[str, float]:
        windows: dict[int, dict[int, SpanGuess]] = {}
        for record, first, start, last, score in parts:
            guess = SpanGuess(int(record), int(first), int(start), int(last), score)
            windows.setdefault(guess.record, {})[guess.first] = guess
        store = self._items.store
        guesses: list[str] = []
        accepted: list[tuple[str, ...]] = []
        for record, seen in windows.items():
            if len(seen) == self._items.n_windows[record]:
                best = best_of_windows(seen.values())[record]
                text, chars_T2 = store.answered_text(record), store.chars(record)
                guesses.append(_answer(best, text, chars_T2, may_be_missing=self._may_be_missing).text)
                accepted.append(store.answers(record))
        return asdict(score_answers(guesses, accepted)) if guesses else {}


@torch.no_grad()
def score_examples(
    model: Encoder, items: TextItems | WindowItems, tally: Tally, *, batch: int = 8, autocast: torch.dtype | None = None
) -> dict[str, float]:
    """The scores of all items, longest first (what does not fit in memory fails at once)."""
    device = model.embedding.weight.device
    order = np.argsort(-items.lengths, kind="stable").tolist()
    for start in range(0, len(order), batch):
        made = items.batch(order[start : start + batch], range(start, min(start + batch, len(order)))).to(device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            logits = logits_of(model, made)
        tally.add(made, logits)
    return tally.scores(tally.parts())
