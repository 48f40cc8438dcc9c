"""Padded batches of labelled examples: whole texts with a class, or windows of texts with the place of an answer.

Sequence k of a stream is a pure function of (store, settings, seed, k), as with packed sequences. A stream of examples
is bucketed by length (`order.BucketedStream`), so that the rows of a batch need little padding.

Legend: B rows of a batch, T tokens of the longest of them, N targets of a row (its class; the two ends of its answer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol

import numpy as np
import torch
from torch import Tensor

from .batch import BatchT_co
from .examples import ExampleStore
from .lengths import padded_length, padded_lengths
from .order import BucketedStream, hash_ints, permute
from .shards import StoreError
from .tokenizer import Frame
from .writer import Split

MOST_QUESTION = 3  # a question has at most one part in so many of the context


@dataclass(slots=True, kw_only=True)
class LabelledBatch:
    """Texts with what is asked of them.

    tokens_BT     int64 token ids, padded on the right
    lengths_B     int64: real tokens of each row
    indices_B     int64: which sequences of the stream these are (named when a step fails)
    is_global_BT  bool: the task's own tokens, which models with global attention give it: the first, or the question
    types_BT      int64: 0 for the question, 1 for the text that it is asked of; None: one text alone
    targets_BN    int64: [B, 1] the class; [B, 2] the first and the last token of the answer
    records_B     int64: the record that each row is (a part) of
    begins_B      int64: where the text begins in the row
    firsts_B      int64: which of the text's tokens is the first in the row
    sizes_B       int64: how many of the text's tokens are in the row
    """

    tokens_BT: Tensor
    lengths_B: Tensor
    indices_B: Tensor
    is_global_BT: Tensor
    types_BT: Tensor | None = None
    targets_BN: Tensor
    records_B: Tensor
    begins_B: Tensor
    firsts_B: Tensor
    sizes_B: Tensor

    @property
    def n_loss_tokens(self) -> Tensor:
        """Rows, each with one loss: int64 scalar."""
        return torch.ones_like(self.indices_B).sum()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabelledBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> LabelledBatch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> LabelledBatch:
        return LabelledBatch(
            tokens_BT=change(self.tokens_BT),
            lengths_B=change(self.lengths_B),
            indices_B=change(self.indices_B),
            is_global_BT=change(self.is_global_BT),
            types_BT=None if self.types_BT is None else change(self.types_BT),
            targets_BN=change(self.targets_BN),
            records_B=change(self.records_B),
            begins_B=change(self.begins_B),
            firsts_B=change(self.firsts_B),
            sizes_B=change(self.sizes_B),
        )


class Items(Protocol[BatchT_co]):
    """A fixed number of sequences, each a row of some batch."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64."""
        ...

    @property
    def bucket_keys(self) -> np.ndarray:
        """Of each, an int64 that those have in common which alone would be padded alike."""
        ...

    def batch(self, items: Sequence[int], indices: Sequence[int]) -> BatchT_co:
        """Those items as a batch; `indices` are their places in the stream."""
        ...


class ItemStream(Generic[BatchT_co]):
    """An endless stream over items, bucketed by length and shuffled anew in every pass.

    bucket   rows that are of like length: those of an optimizer step
    shuffle  False: stored order
    """

    def __init__(self, items: Items[BatchT_co], *, bucket: int, seed: int, shuffle: bool = True) -> None:
        self.items = items
        # What is padded to one length is of one length: the more of chance.
        self._order = BucketedStream(items.bucket_keys, bucket=bucket, seed=seed if shuffle else None)

    @property
    def n_sequences(self) -> int:
        """Sequences in one pass."""
        return len(self.items.lengths)

    def batch(self, indices: Sequence[int]) -> BatchT_co:
        return self.items.batch([self._order.address(k).index for k in indices], indices)


class ItemPass(Generic[BatchT_co]):
    """Each item once, in a fixed order, of which any beginning is a fair sample: for validation.

    order  of the items; None: shuffled, and bucketed by length
    """

    def __init__(self, items: Items[BatchT_co], *, bucket: int, order: np.ndarray | None = None) -> None:
        self.items = items
        self._order = order
        self._stream = ItemStream(items, bucket=bucket, seed=0)

    @property
    def n_sequences(self) -> int:
        return self._stream.n_sequences

    def batch(self, indices: Sequence[int]) -> BatchT_co:
        if self._order is None:
            return self._stream.batch(indices)
        return self.items.batch([int(self._order[k]) for k in indices], indices)


class TextItems:
    """Texts with a class each: a record is a row. Of a text that is too long the beginning is read.

    classes  in the order of the model's logits
    context  tokens of a row at most, special ones included
    Raises StoreError for a class in the store that is not among them, and a context without room for a token.
    """

    def __init__(
        self, store: ExampleStore, split: Split, *, classes: Sequence[str], context: int, text: str = "text"
    ) -> None:
        self.store, self.records = store, store.records(split)
        self.classes = tuple(classes)
        if unknown := [name for name in store.labels if name not in self.classes]:
            raise StoreError(
                f"model.labels={list(self.classes)}: the examples also have {', '.join(unknown)}; name every class, in "
                "the order that the model is to have them"
            )
        self._classes = [self.classes.index(name) for name in store.labels]
        self._text, self._context = text, context
        self._frame = store.tokenizer().frame
        self._room = context - len(self._frame.before) - len(self._frame.after)
        if self._room < 1:
            raise StoreError(f"data.context={context}: special tokens fill it")
        lengths = store.lengths(text)[self.records]
        self.n_cut = int((lengths > self._room).sum())
        self.lengths = np.minimum(lengths, self._room) + context - self._room
        self.bucket_keys = padded_lengths(self.lengths, context)

    def batch(self, items: Sequence[int], indices: Sequence[int]) -> LabelledBatch:
        records = [int(self.records[item]) for item in items]
        rows = [framed(self._frame, self.store.tokens(self._text, record)[: self._room].tolist()) for record in records]
        targets = [[self._classes[self.store.label(record)]] for record in records]
        return batch_of(
            rows, pad=self.store.eos_id, limit=self._context, targets=targets, records=records, indices=indices
        )


class WindowItems:
    """Questions with the text that holds the answer: a text that is too long becomes several rows, windows that share
    `overlap` tokens, each with the question. Where the answer is not whole in a window, its place is the first token
    of the row (Devlin et al. 2019, arXiv 1810.04805, §4.3).

    context  tokens of a row at most; a question takes a third of that at most, the rest of it is cut off
    Raises StoreError for an overlap that leaves windows no way to go on.
    """

    def __init__(self, store: ExampleStore, split: Split, *, context: int, overlap: int) -> None:
        if store.answered is None:
            raise ValueError(f"the records of {store.directory} have no answers")
        self.store, self.records = store, store.records(split)
        self._answered, self._context = store.answered, context
        self._frame = store.tokenizer().frame
        self._most = context // MOST_QUESTION
        special = len(self._frame.before) + len(self._frame.between) + len(self._frame.after)
        questions = np.minimum(store.lengths("question")[self.records], self._most)
        rooms = context - special - questions
        if int(rooms.min()) <= overlap:
            raise StoreError(
                f"data.examples.overlap={overlap}: the longest question leaves {rooms.min()} of data.context={context} "
                "tokens to the text, and windows that share all of them never end; lower it, or raise data.context"
            )
        texts = store.lengths(self._answered)[self.records]
        windows = [
            (item, first, length)
            for item, (text, room) in enumerate(zip(texts.tolist(), rooms.tolist(), strict=True))
            for first, length in windows_of(text, room, overlap)
        ]
        self._items, self._firsts, sizes = (np.array(column) for column in zip(*windows, strict=True))
        self._sizes = sizes
        self.lengths = sizes + special + questions[self._items]
        self.bucket_keys = padded_lengths(self.lengths, context)
        self.n_windows = dict(zip(self.records.tolist(), np.bincount(self._items).tolist(), strict=True))
        self.n_cut = int((store.lengths("question")[self.records] > self._most).sum())

    @property
    def n_answered(self) -> int:
        """Windows that hold their answer whole."""
        spans = [self.store.span(int(record)) or (-1, -1) for record in self.records]
        first, last = np.array(spans)[self._items].T
        whole = (first >= self._firsts) & (last < self._firsts + self._sizes)
        return int(whole.sum())

    def by_record(self) -> np.ndarray:
        """The items in an order that shuffles the records and keeps the windows of each together."""
        n = len(self.records)
        place = np.array([permute(item, n, key=hash_ints(0)) for item in range(n)])
        return np.argsort(place[self._items], kind="stable")

    def batch(self, items: Sequence[int], indices: Sequence[int]) -> LabelledBatch:
        records = [int(self.records[self._items[item]]) for item in items]
        rows, targets = [], []
        for item, record in zip(items, records, strict=True):
            first, size = int(self._firsts[item]), int(self._sizes[item])
            question = self.store.tokens("question", record)[: self._most].tolist()
            row = framed(
                self._frame, self.store.tokens(self._answered, record)[first : first + size].tolist(), question, first
            )
            rows.append(row)
            targets.append(_target(row, self.store.span(record)))
        return batch_of(
            rows, pad=self.store.eos_id, limit=self._context, targets=targets, records=records, indices=indices
        )


def _target(row: Row, span: tuple[int, int] | None) -> list[int]:
    """First and last token of the answer in the row; its first token twice where the answer is not whole in it."""
    if span is None or span[0] < row.first or span[1] >= row.first + row.size:
        return [0, 0]
    return [row.begin + span[0] - row.first, row.begin + span[1] - row.first]


def default_overlap(context: int) -> int:
    """Tokens that windows share where nobody says how many."""
    return min(128, context // 4)


def windows_of(n_tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """(first token, number of tokens) of windows over a text: each as long as there is room, the last as long as it
    must be, neighbours sharing `overlap` tokens. One, of no tokens, for an empty text."""
    firsts = range(0, max(1, n_tokens - overlap), room - overlap)
    return [(first, min(room, n_tokens - first)) for first in firsts]


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """A text in its frame. `n_task`: tokens before the text that belong to the task ([CLS], the question); `begin`:
    where the text begins in the row; `first`: which of its tokens is the first there; `size`: how many there are."""

    tokens: list[int]
    n_task: int
    begin: int
    first: int
    size: int
    is_pair: bool


def framed(frame: Frame, text: list[int], question: list[int] | None = None, first: int = 0) -> Row:
    """[CLS] text [SEP], or [CLS] question [SEP] text [SEP], in the tokenizer's own way."""
    head = [*frame.before] if question is None else [*frame.before, *question, *frame.between]
    return Row(
        tokens=[*head, *text, *frame.after],
        n_task=1 if question is None else len(frame.before) + len(question),
        begin=len(head),
        first=first,
        size=len(text),
        is_pair=question is not None,
    )


def batch_of(
    rows: Sequence[Row],
    *,
    pad: int,
    limit: int,
    records: Sequence[int],
    indices: Sequence[int],
    targets: Sequence[Sequence[int]] | None = None,
) -> LabelledBatch:
    """Rows side by side, padded on the right, to `limit` tokens at most. Without targets, as for a question that nobody
    has answered yet, they are [B, 0]."""
    shape = (len(rows), padded_length(max(len(row.tokens) for row in rows), limit))
    tokens_BT = np.full(shape, pad, dtype=np.int64)
    types_BT = np.zeros(shape, dtype=np.int64)
    is_global_BT = np.zeros(shape, dtype=bool)
    for place, row in enumerate(rows):
        tokens_BT[place, : len(row.tokens)] = row.tokens
        is_global_BT[place, : row.n_task] = True
        types_BT[place, row.begin : len(row.tokens)] = 1
    column = partial(torch.tensor, dtype=torch.int64)
    return LabelledBatch(
        tokens_BT=torch.from_numpy(tokens_BT),
        lengths_B=column([len(row.tokens) for row in rows]),
        indices_B=column(list(indices)),
        is_global_BT=torch.from_numpy(is_global_BT),
        types_BT=torch.from_numpy(types_BT) if rows[0].is_pair else None,
        targets_BN=column(targets) if targets is not None else torch.empty(len(rows), 0, dtype=torch.int64),
        records_B=column(list(records)),
        begins_B=column([row.begin for row in rows]),
        firsts_B=column([row.first for row in rows]),
        sizes_B=column([row.size for row in rows]),
    )
