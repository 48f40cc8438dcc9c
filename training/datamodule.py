"""The LightningDataModule: whole optimizer steps out of a stream of sequences, from any place in it.

The place is one number, the sequences consumed by all ranks together. Sequence k of the stream is a pure function of
what is stored and the seed, so nothing else is saved, and neither ranks nor loader processes nor the micro-batch size
change which sequences a step reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from longspan.data.batch import Batch, BatchSource
from longspan.data.loader import PackedDataset, PassSampler, StreamSampler
from longspan.data.masking import Masking, TokenMasker
from longspan.data.store import TokenStore

from .data_settings import check_mask_token
from .errors import UserError
from .schema import DataConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Sequences per step: `global_batch` over all ranks, in forward passes of `micro_batch` on each of them."""

    global_batch: int
    micro_batch: int
    world: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.global_batch % (self.micro_batch * self.world):
            raise UserError(
                f"trainer.global_batch={self.global_batch}: not a multiple of trainer.micro_batch={self.micro_batch} × "
                f"{self.world} devices"
            )

    @property
    def accumulate(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.global_batch // (self.micro_batch * self.world)


class StepSampler(Sampler[list[list[int]]]):
    """Endless optimizer steps of one rank: a list of micro-batches, each a list of places in the stream."""

    def __init__(self, plan: BatchPlan, start: int) -> None:
        self._accumulate = plan.accumulate
        self._stream = StreamSampler(micro_batch=plan.micro_batch, start=start, rank=plan.rank, world=plan.world)

    def __iter__(self) -> Iterator[list[list[int]]]:
        micro_batches = iter(self._stream)
        while True:
            yield [next(micro_batches) for _ in range(self._accumulate)]


class _Batches(Dataset[Batch]):
    """Builds the batch of each list of places that a sampler hands out."""

    def __init__(self, source: BatchSource[Batch]) -> None:
        self._source = source

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        return self._source.batch(indices)


class _Steps(Dataset[list[Batch]]):
    """Builds the micro-batches that a StepSampler names."""

    def __init__(self, source: BatchSource[Batch]) -> None:
        self._source = source

    def __getitem__(self, micro_batches: Sequence[Sequence[int]]) -> list[Batch]:
        return [self._source.batch(indices) for indices in micro_batches]


class StreamData(LightningDataModule):
    """Training steps and validation batches of two streams.

    validation   a single pass; None: nothing is held out
    fingerprint  everything that the training stream is a function of, by name, as plain data: a run resumes only where
                 it is the same
    val_batches  micro-batches that a validation reads at most, over all ranks
    workers      loader processes
    """

    def __init__(
        self,
        train: BatchSource[Batch],
        validation: BatchSource[Batch] | None,
        plan: BatchPlan,
        *,
        fingerprint: Mapping[str, object],
        val_batches: int = 20,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self.consumed = 0
        self.train, self.validation = train, validation
        self._plan = plan
        self._fingerprint = {**fingerprint, "global_batch": plan.global_batch}
        self._val_batches = val_batches
        self._workers = workers
        self._pin_memory = pin_memory

    @property
    def global_batch(self) -> int:
        """Sequences that one optimizer step consumes."""
        return self._plan.global_batch

    @property
    def has_validation(self) -> bool:
        return self.validation is not None

    def train_dataloader(self) -> DataLoader[list[Batch]]:
        return DataLoader(
            _Steps(self.train),
            sampler=StepSampler(self._plan, self.consumed),
            batch_size=None,
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            generator=_private_generator(),
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every rank reads the same number of batches, so that collectives inside a forward pass (FSDP) line up; where
        there are fewer batches than ranks each of them reads all, which leaves the token-weighted mean as it is."""
        if self.validation is None:
            raise ValueError("no documents are held out: data.validation_fraction=0")
        micro_batch, world, rank = self._plan.micro_batch, self._plan.world, self._plan.rank
        length = min(self.validation.n_sequences, self._val_batches * micro_batch)
        if world > 1:
            whole = length // (micro_batch * world) * micro_batch * world
            length, world, rank = (whole, world, rank) if whole else (length, 1, 0)
        return DataLoader(
            _Batches(self.validation),
            sampler=PassSampler(length=length, micro_batch=micro_batch, rank=rank, world=world),
            batch_size=None,
            pin_memory=self._pin_memory,
            generator=_private_generator(),
        )

    def state_dict(self) -> dict[str, object]:
        return {"consumed": self.consumed, "fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues after the sequences consumed. Raises UserError when the stream is not the one they came from."""
        saved = state_dict["fingerprint"]
        changed = [name for name, value in self._fingerprint.items() if saved.get(name) != value]
        if changed:
            described = ", ".join(
                f"{name}: {_short(saved.get(name))} → {_short(self._fingerprint[name])}" for name in changed
            )
            raise UserError(
                f"resume: the training data is not what the run was trained on ({described}); restore it, or start a "
                "new run from these weights with checkpoint="
            )
        self.consumed = int(state_dict["consumed"])


def packed_data(
    store: TokenStore,
    config: DataConfig,
    plan: BatchPlan,
    *,
    seed: int,
    weights: Mapping[str, float] | None = None,
    val_batches: int = 20,
    pin_memory: bool = False,
) -> StreamData:
    """Packed sequences of a token store, for decoders and for masked language modelling.

    weights  share of each source in the stream, by name; None: by what there is
    """
    masker = _masker(store, config, seed)
    build = partial(
        PackedDataset,
        store,
        context=config.context,
        packing=config.packing,
        document_mask=config.document_mask,
        reset_positions=config.reset_positions,
        boundary_loss=config.boundary_loss,
        masker=masker,
    )
    fingerprint: dict[str, object] = {
        "store": store.manifest["self_sha256"],
        "tokenizer": store.tokenizer_sha256,
        "seed": seed,
        "weights": dict(weights) if weights is not None else None,
        "context": config.context,
        "packing": config.packing,
        "shuffle": config.shuffle,
        "document_mask": config.document_mask,
        "reset_positions": config.reset_positions,
        "boundary_loss": config.boundary_loss,
        "masking": None if config.masking is None else asdict(config.masking),
    }
    return StreamData(
        build(split="train", weights=weights, seed=seed, shuffle=config.shuffle),
        build(split="validation", single_pass=True) if store.n_tokens("validation") else None,
        plan,
        fingerprint=fingerprint,
        val_batches=val_batches,
        workers=config.workers,
        pin_memory=pin_memory,
    )


def _masker(store: TokenStore, config: DataConfig, seed: int) -> TokenMasker | None:
    if config.masking is None:
        return None
    tokenizer = store.tokenizer()
    check_mask_token(tokenizer, "data.masking")
    masking = config.masking
    return TokenMasker(
        Masking(
            probability=masking.probability,
            masked=masking.masked,
            random=masking.random,
            whole_words=masking.whole_words,
        ),
        tokenizer,
        seed=seed,
    )


def _short(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 16 else str(value)


def _private_generator() -> torch.Generator:
    """Loaders draw seeds for workers; from the global generator that would change dropout where a run resumes."""
    return torch.Generator().manual_seed(0)
