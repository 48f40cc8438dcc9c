"""Packed, shuffled, mixed batches out of a token store.

Sequence k of the stream is a pure function of (store, settings, seed, k). A sampler hands out lists of k, a dataset
turns a list into a `TokenBatch`; neither keeps state, so worker processes, ranks and micro-batch sizes change who
builds a sequence, never which one it is.

Legend: B sequences, T tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .batch import IGNORE, TokenBatch
from .masking import TokenMasker
from .order import Address, MixedStream, SinglePass
from .packing import Packing, PackingMethod, Span, pack
from .store import Split, StoreError, TokenStore


class PackedDataset(Dataset[TokenBatch]):
    """Sequences of `context` tokens with their targets.

    weights           share of the stream for each source by name; None: all alike
    seed              of the order; shuffle=False: stored order
    single_pass       each sequence once, in a fixed order, what does not fill one padded: for validation. Weights and
                      seed then play no part
    document_mask     fill `documents_BT`, so that attention can stay inside documents
    reset_positions   fill `positions_BT`: 0, 1, … from the start of each document's part of the sequence
    boundary_loss     False: a document's last token is not asked for the first token of the next document
    masker            asks for hidden tokens instead of next ones

    The three switches are independent. The target of a sequence's last token is the token that follows it in the
    stream, so that no prediction is lost between sequences.
    Raises StoreError when there are not enough tokens for one sequence.
    """

    def __init__(
        self,
        store: TokenStore,
        split: Split,
        *,
        context: int,
        packing: PackingMethod = "concat",
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        single_pass: bool = False,
        document_mask: bool = False,
        reset_positions: bool = False,
        boundary_loss: bool = True,
        masker: TokenMasker | None = None,
    ) -> None:
        self.store, self.split, self.context = store, split, context
        # What pickling keeps: a loader process maps the store and packs again rather than receive arrays.
        self._recipe = partial(
            PackedDataset,
            store,
            split,
            context=context,
            packing=packing,
            weights=weights,
            seed=seed,
            shuffle=shuffle,
            single_pass=single_pass,
            document_mask=document_mask,
            reset_positions=reset_positions,
            boundary_loss=boundary_loss,
            masker=masker,
        )
        self._masker = masker
        self._document_mask, self._reset_positions, self._boundary_loss = document_mask, reset_positions, boundary_loss
        self._documents = store.documents(split)
        self._packings = _pack_sources(store, split, context, packing, keep_tail=single_pass)
        self.sources = tuple(self._packings)
        sizes = [len(packed) for packed in self._packings.values()]
        if single_pass:
            self._order: MixedStream | SinglePass = SinglePass(sizes)
        else:
            shares = _shares(self._packings, weights, store, split, context)
            self._order = MixedStream(sizes, shares, seed if shuffle else None)
        self._by_number = list(self._packings.values())

    def __reduce__(self) -> tuple[partial[PackedDataset], tuple[()]]:
        return self._recipe, ()

    @property
    def n_sequences(self) -> int:
        """Sequences in one pass over every source."""
        return sum(len(packed) for packed in self._by_number)

    def sequences_of(self, source: str) -> int:
        return len(self._packings[source])

    def address(self, k: int) -> Address:
        """Which sequence of which source is the k-th, and in which pass over that source."""
        return self._order.address(k)

    def epoch_of(self, k: int) -> int:
        """How often the source of sequence k was gone through before it."""
        return self._order.address(k).epoch

    def spans(self, k: int) -> list[Span]:
        """Which parts of which documents sequence k is made of."""
        address = self._order.address(k)
        return self._by_number[address.source].spans(address.index)

    def documents_per_sequence(self) -> dict[int, float]:
        """How many documents (or parts of them) of each length a sequence of the stream holds on average: over one pass
        of every source, weighted by its share of the stream. Padding counts as a document of its own, as the document
        mask has it. Numbers times lengths add up to `context`."""
        found = np.zeros(self.context + 1)
        for packing, share in zip(self._by_number, self._order.shares, strict=True):
            found += float(share) / len(packing) * np.bincount(packing.lengths(), minlength=self.context + 1)
        return {int(length): float(found[length]) for length in np.flatnonzero(found)}

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        """Sequences `indices` of the stream as one batch [B, context]."""
        shape = (len(indices), self.context)
        tokens_BT = np.full(shape, self.store.eos_id, dtype=np.int64)
        targets_BT = np.full(shape, IGNORE, dtype=np.int64)
        positions_BT = np.zeros(shape, dtype=np.int64)
        documents_BT = np.full(shape, -1, dtype=np.int64)
        for row, k in enumerate(indices):
            self._fill(k, tokens_BT[row], targets_BT[row], positions_BT[row], documents_BT[row])
        batch = TokenBatch(
            tokens_BT=torch.from_numpy(tokens_BT),
            targets_BT=torch.from_numpy(targets_BT),
            indices_B=torch.tensor(list(indices), dtype=torch.int64),
            positions_BT=torch.from_numpy(positions_BT) if self._reset_positions else None,
            documents_BT=torch.from_numpy(documents_BT) if self._document_mask else None,
        )
        return batch if self._masker is None else self._masker(batch)

    def tokens(self, k: int) -> np.ndarray:
        """The token ids of sequence k alone, int64, without padding."""
        spans = ((self._documents.tokens(span.document), span) for span in self.spans(k))
        return np.concatenate([tokens[span.start : span.start + span.length] for tokens, span in spans]).astype(
            np.int64
        )

    def sequence(self, k: int) -> TokenBatch:
        """Sequence k alone: a batch of one."""
        return self.batch([k])

    def __getitem__(self, index: int) -> TokenBatch:
        return self.batch([index])

    def __getitems__(self, indices: Sequence[int]) -> TokenBatch:
        """What a DataLoader calls with a list of the sampler; its `collate_fn` is then `collate`."""
        return self.batch(indices)

    def _fill(
        self, k: int, tokens_T: np.ndarray, targets_T: np.ndarray, positions_T: np.ndarray, documents_T: np.ndarray
    ) -> None:
        address = self._order.address(k)
        packing = self._by_number[address.source]
        spans = packing.spans(address.index)
        place = 0
        for number, span in enumerate(spans):
            stop = place + span.length
            tokens = self._documents.tokens(span.document)
            mask = self._documents.loss_mask(span.document)
            tokens_T[place:stop] = tokens[span.start : span.start + span.length]
            positions_T[place:stop] = np.arange(span.length)
            documents_T[place:stop] = span.document
            # Targets inside the document, the one after the span included where the document goes on.
            follows = tokens[span.start + 1 : span.start + span.length + 1]
            targets_T[place : place + len(follows)] = follows
            if mask is not None:
                silent = mask[span.start + 1 : span.start + span.length + 1] == 0
                targets_T[place : place + len(follows)][silent] = IGNORE
            if len(follows) < span.length and self._boundary_loss:
                targets_T[stop - 1] = self._first_token_after(packing, address.index, spans, number)
            place = stop

    def _first_token_after(self, packing: Packing, sequence: int, spans: list[Span], number: int) -> int:
        """The first token of the document that follows span `number` in the stream; IGNORE where none does."""
        if number + 1 < len(spans):
            following = spans[number + 1].document
        elif sum(span.length for span in spans) == self.context:
            following = packing.document_after(sequence)
        else:
            following = None
        if following is None:
            return IGNORE
        mask = self._documents.loss_mask(following)
        return IGNORE if mask is not None and not mask[0] else int(self._documents.tokens(following)[0])


def collate(batch: TokenBatch) -> TokenBatch:
    """`collate_fn` of a DataLoader over a PackedDataset, which builds whole batches itself."""
    return batch


class StreamSampler(Sampler[list[int]]):
    """Endless lists of `micro_batch` places in the stream for one rank.

    Micro-step m of rank r takes the places start + (m·world + r)·micro_batch …, so that as long as the global batch is
    the same number of sequences, every optimizer step reads the same sequences whatever the micro-batch and the number
    of ranks. `start`: sequences that all ranks together have consumed.
    """

    def __init__(self, *, micro_batch: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        if micro_batch < 1 or start < 0 or not 0 <= rank < world:
            raise ValueError(
                f"micro_batch={micro_batch}, start={start}, rank={rank} of {world} is not a place to sample"
            )
        self.micro_batch, self.start, self.rank, self.world = micro_batch, start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.micro_batch
        while True:
            yield list(range(first, first + self.micro_batch))
            first += self.world * self.micro_batch


class PassSampler(Sampler[list[int]]):
    """The first `length` places of a single pass, for one rank: lists of at most `micro_batch`, the same number on
    every rank only when `length` divides so; a rank that runs out stops."""

    def __init__(self, *, length: int, micro_batch: int, rank: int = 0, world: int = 1) -> None:
        if length < 1 or micro_batch < 1 or not 0 <= rank < world:
            raise ValueError(
                f"length={length}, micro_batch={micro_batch}, rank={rank} of {world} is not a pass to sample"
            )
        self.length, self.micro_batch, self.rank, self.world = length, micro_batch, rank, world

    def __len__(self) -> int:
        step = self.micro_batch * self.world
        return max(0, -(-(self.length - self.rank * self.micro_batch) // step))

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.rank * self.micro_batch, self.length, self.micro_batch * self.world):
            yield list(range(first, min(first + self.micro_batch, self.length)))


def _pack_sources(
    store: TokenStore, split: Split, context: int, method: PackingMethod, keep_tail: bool
) -> dict[str, Packing]:
    """A packing for each source of the split that fills at least one sequence."""
    documents = store.documents(split)
    lengths = np.diff(documents.offsets.astype(np.int64))
    packings: dict[str, Packing] = {}
    for number, name in enumerate(store.sources):
        mine = np.flatnonzero(documents.source_ids == number)
        packed = pack(lengths[mine], context, method, documents=mine, keep_tail=keep_tail)
        if len(packed):
            packings[name] = packed
    if not packings:
        raise StoreError(
            f"the {split} split of {store.directory} has {store.n_tokens(split):,} tokens, too few for one sequence of "
            f"{context} (and the token after it): give more text, or a smaller data.context"
        )
    return packings


def _shares(
    packings: Mapping[str, Packing], weights: Mapping[str, float] | None, store: TokenStore, split: Split, context: int
) -> list[float]:
    if weights is None:
        weights = dict.fromkeys(packings, 1.0)
    for name in weights:
        if name not in store.sources:
            raise StoreError(f"a weight names the source '{name}', but the store has {', '.join(store.sources)}")
        if name not in packings:
            tokens = store.counts[split][name].tokens
            raise StoreError(
                f"source '{name}' has {tokens:,} tokens in the {split} split, too few for one sequence of {context}: "
                "give more text, a smaller data.context, or leave the source out"
            )
    missing = [name for name in packings if name not in weights]
    if missing:
        raise StoreError(f"no weight for the source {', '.join(missing)}: give one for each, or none at all")
    return [weights[name] for name in packings]
