"""Sources and targets in batches, for encoder–decoders.

Legend: B pairs, S source tokens, T target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .batch import IGNORE
from .examples import ExampleStore
from .lengths import padded_length, padded_lengths
from .tokenizer import Tokenizer
from .writer import Split


@dataclass(slots=True, kw_only=True)
class Seq2SeqBatch:
    """Pairs of a source and a target, padded on the right.

    source_BS         int64 token ids
    source_lengths_B  int64: how many of them are real
    decoder_input_BT  int64: what the decoder reads, the targets shifted right behind the model's start token
    targets_BT        int64: the token after `decoder_input_BT[b, t]`; IGNORE in padding
    indices_B         int64: which pairs of the stream these are
    is_global_BS      bool: source tokens that see, and are seen by, all; None: the encoder has no such thing
    """

    source_BS: Tensor
    source_lengths_B: Tensor
    decoder_input_BT: Tensor
    targets_BT: Tensor
    indices_B: Tensor
    is_global_BS: Tensor | None = None

    @property
    def n_loss_tokens(self) -> Tensor:
        """How many targets carry loss: int64 scalar."""
        return (self.targets_BT != IGNORE).sum()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Seq2SeqBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Seq2SeqBatch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Seq2SeqBatch:
        return Seq2SeqBatch(
            source_BS=change(self.source_BS),
            source_lengths_B=change(self.source_lengths_B),
            decoder_input_BT=change(self.decoder_input_BT),
            targets_BT=change(self.targets_BT),
            indices_B=change(self.indices_B),
            is_global_BS=None if self.is_global_BS is None else change(self.is_global_BS),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFrame:
    """The special tokens around what a model reads and writes: BART's `<s> source </s>` and `<s> target </s>`.

    before          stands before a source; its first token is LED's global one
    after           stands behind a source
    begin           stands before a target; () where the tokenizer has no token that begins a text
    end             stands behind a target, and fills what is free
    start           what the decoder reads before a target
    is_global       whether the first token of a source is global
    source_context  tokens of a source at most, special ones included: no batch is wider
    target_context  the same of a target
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    begin: tuple[int, ...]
    end: int
    start: int
    is_global: bool
    source_context: int
    target_context: int

    @property
    def source_room(self) -> int:
        """Tokens of text that a source has room for."""
        return self.source_context - len(self.before) - len(self.after)

    @property
    def target_room(self) -> int:
        """Tokens of text that a target has room for."""
        return self.target_context - len(self.begin) - 1

    def source(self, text: np.ndarray) -> np.ndarray:
        return np.array([*self.before, *text.tolist(), *self.after], dtype=np.int64)

    def target(self, text: np.ndarray) -> np.ndarray:
        return np.array([*self.begin, *text.tolist(), self.end], dtype=np.int64)

    def batch(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], indices: Sequence[int]) -> Seq2SeqBatch:
        """The texts of some sources and their targets, framed, shifted and padded."""
        sources = [self.source(source) for source, _ in pairs]
        targets = [self.target(target) for _, target in pairs]
        source_BS = np.full((len(pairs), _padded(sources, self.source_context)), self.end, dtype=np.int64)
        targets_BT = np.full((len(pairs), _padded(targets, self.target_context)), IGNORE, dtype=np.int64)
        decoder_input_BT = np.full_like(targets_BT, self.end)
        decoder_input_BT[:, 0] = self.start
        for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
            source_BS[row, : len(source)] = source
            targets_BT[row, : len(target)] = target
            decoder_input_BT[row, 1 : len(target)] = target[:-1]
        is_global_BS = torch.zeros(source_BS.shape, dtype=torch.bool)
        is_global_BS[:, 0] = True
        return Seq2SeqBatch(
            source_BS=torch.from_numpy(source_BS),
            source_lengths_B=torch.tensor([len(source) for source in sources]),
            decoder_input_BT=torch.from_numpy(decoder_input_BT),
            targets_BT=torch.from_numpy(targets_BT),
            indices_B=torch.tensor(list(indices), dtype=torch.int64),
            is_global_BS=is_global_BS if self.is_global else None,
        )


class PairItems:
    """The records of a split as pairs of their `source` and `target`. Of a text that is too long the beginning is
    taken; of a target, what ends it still follows.

    n_cut    how many texts of each name are longer than the frame has room for
    lengths  tokens of each pair, special ones included
    bucket_keys  of each pair, a number that those have in common which alone would be padded alike
    """

    def __init__(self, store: ExampleStore, *, split: Split, frame: PairFrame) -> None:
        self.store, self.records, self.frame = store, store.records(split), frame
        self._rooms = {"source": frame.source_room, "target": frame.target_room}
        whole = {name: store.lengths(name)[self.records] for name in self._rooms}
        self.n_cut = {name: int((whole[name] > room).sum()) for name, room in self._rooms.items()}
        mosts = {"source": frame.source_context, "target": frame.target_context}
        framed = {name: np.minimum(whole[name], room) + mosts[name] - room for name, room in self._rooms.items()}
        self.lengths = framed["source"] + framed["target"]
        padded = {name: padded_lengths(framed[name], most) for name, most in mosts.items()}
        self.bucket_keys = padded["source"] * (frame.target_context + 1) + padded["target"]

    def pair(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a source and its target, unframed."""
        record = int(self.records[item])
        source, target = (self.store.tokens(name, record)[:room] for name, room in self._rooms.items())
        return source, target

    def batch(self, items: Sequence[int], indices: Sequence[int]) -> Seq2SeqBatch:
        return self.frame.batch([self.pair(item) for item in items], indices)


def pair_frame(
    tokenizer: Tokenizer, *, start: int, is_global: bool, source_context: int, target_context: int
) -> PairFrame:
    """The tokenizer's own way to frame a text (`Tokenizer.frame`). A tokenizer that has no token to begin texts with
    begins a target with its text, so that the token that ends it stands nowhere else."""
    frame = tokenizer.frame
    return PairFrame(
        before=frame.before,
        after=frame.after,
        begin=tokenizer.start_ids,
        end=tokenizer.eos_id,
        start=start,
        is_global=is_global,
        source_context=source_context,
        target_context=target_context,
    )


def _padded(rows: Sequence[np.ndarray], most: int) -> int:
    return padded_length(max(len(row) for row in rows), most)
