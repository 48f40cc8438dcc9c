"""Labelled examples as training data: rows of a store in optimizer steps, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from longspan.data.examples import ExampleStore
from longspan.data.labelled import ItemPass, ItemStream, TextItems, WindowItems, default_overlap
from longspan.data.lengths import PADDING
from longspan.data.seq2seq import PairItems
from longspan.data.writer import SPLITS, Split
from longspan.evaluation.readers.predictions import AnswerTally, ClassTally, Tally, score_examples
from longspan.model.build import Model
from longspan.model.config import EncoderConfig
from longspan.model.encoder import Encoder

from .datamodule import BatchPlan, StreamData
from .schema import RunConfig

Items = TextItems | WindowItems


def labelled_data(store: ExampleStore, config: RunConfig, plan: BatchPlan, *, pin_memory: bool = False) -> StreamData:
    """Rows of like length in each step, another order in every pass. Raises StoreError where rows don't fit."""
    data = config.data
    if data.examples is None:
        raise ValueError("data.examples=null: there are no examples to train on")
    train = items_of(store, "train", config)
    stream = ItemStream(train, bucket=plan.global_batch, seed=config.seed, shuffle=data.shuffle)
    held_out = None
    if len(store.records("validation")):
        validation = items_of(store, "validation", config)
        order = validation.by_record() if isinstance(validation, WindowItems) else None
        held_out = ItemPass(validation, bucket=plan.micro_batch, order=order)
    return StreamData(
        stream,
        held_out,
        plan,
        fingerprint={
            "store": store.manifest["self_sha256"],
            "tokenizer": store.tokenizer_sha256,
            "seed": config.seed,
            "context": data.context,
            "shuffle": data.shuffle,
            "examples": {"kind": data.examples.kind, "overlap": _overlap(config)},
            "padding": PADDING,
            "labels": list(_encoder(config).labels),
        },
        val_batches=config.trainer.val_batches,
        workers=data.workers,
        pin_memory=pin_memory,
    )


def items_of(store: ExampleStore, split: Split, config: RunConfig) -> Items:
    """The rows of a split."""
    examples, context = config.data.examples, config.data.context
    if examples is not None and examples.kind == "qa":
        return WindowItems(store, split, context=context, overlap=_overlap(config))
    return TextItems(store, split, classes=_encoder(config).labels, context=context)


def tally_of(items: Items, config: RunConfig) -> Tally:
    """What scores the model on those rows. Where some record has no answer, the model may say so."""
    if isinstance(items, TextItems):
        return ClassTally(items)
    examples = config.data.examples
    return AnswerTally(
        items,
        max_answer_tokens=examples.max_answer_tokens if examples is not None else 30,
        may_be_missing=items.store.has_unanswered,
    )


def tally_maker(data: StreamData, config: RunConfig) -> Callable[[], Tally] | None:
    """What makes a fresh tally for each validation; None where there is nothing to score."""
    if not isinstance(data.validation, ItemPass):
        return None
    items = data.validation.items
    return partial(tally_of, items, config) if isinstance(items, TextItems | WindowItems) else None


def mean_row(data: StreamData) -> float | None:
    """Tokens of a training row on average; None where all rows are alike."""
    return float(data.train.items.lengths.mean()) if isinstance(data.train, ItemStream) else None


def described(store: ExampleStore, data: StreamData) -> Iterator[str]:
    """What a person wants to know of the examples before they are trained on."""
    counts = {split: len(store.records(split)) for split in SPLITS}
    yield f"{counts['train']:,} examples to train on, {counts['validation']:,} held out"
    if store.refused:
        first = store.manifest["refused"]["first"]
        yield f"{store.refused:,} records cannot be used and are left out, the first: {first[0]}"
    items = data.train.items if isinstance(data.train, ItemStream) else None
    if isinstance(items, TextItems) and items.n_cut:
        yield f"{items.n_cut:,} training texts are longer than data.context; their beginning is read"
    if isinstance(items, PairItems):
        most = {"source": items.frame.source_context, "target": items.frame.target_context}
        for name, count in items.n_cut.items():
            if count:
                yield f"{count:,} training {name}s are longer than {most[name]:,} tokens; they are cut there"
    if isinstance(items, WindowItems):
        yield f"{len(items.lengths):,} training windows; the answer is whole in {items.n_answered:,} of them"
        if items.n_cut:
            yield f"{items.n_cut:,} training questions are longer than a third of data.context; their beginning is read"


@dataclass(frozen=True, slots=True)
class Scored:
    """What a fine-tuned encoder scores on all held-out examples.

    protocol  how it was asked, as plain data
    """

    kind: str
    scores: Mapping[str, float]
    protocol: Mapping[str, object]

    def record(self) -> dict[str, object]:
        """Plain data for evaluation.json."""
        return {"examples": {"kind": self.kind, **self.scores, "protocol": dict(self.protocol)}}

    def headline(self) -> dict[str, float | None]:
        """For summary.json."""
        return {name: value for name, value in self.scores.items() if name != "n"}

    def words(self) -> str:
        """One line for a log."""
        named = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in self.scores.items() if name != "n")
        return f"{named} ({self.scores['n']:,.0f} held-out examples)"


def score_checkpoint(model: Model, store: ExampleStore, config: RunConfig, *, autocast: torch.dtype | None) -> Scored:
    """Of all held-out examples, whatever `trainer.val_batches` lets a validation read."""
    if not isinstance(model, Encoder) or config.data.examples is None:
        raise TypeError("labelled examples score an encoder")
    items = items_of(store, "validation", config)
    batch = config.trainer.micro_batch
    scores = score_examples(model, items, tally_of(items, config), batch=batch, autocast=autocast)
    protocol: dict[str, object] = {"context": config.data.context, "store": store.manifest["self_sha256"]}
    if isinstance(items, WindowItems):
        protocol |= {
            "overlap": _overlap(config),
            "max_answer_tokens": config.data.examples.max_answer_tokens,
            "may_be_missing": store.has_unanswered,
            "normalisation": "SQuAD 1.1: lower case, no punctuation, no English articles",
        }
    else:
        protocol |= {"classes": list(items.classes), "cut": items.n_cut, "truncation": "the beginning of longer texts"}
    return Scored(config.data.examples.kind, scores, protocol)


def _overlap(config: RunConfig) -> int:
    examples = config.data.examples
    overlap = examples.overlap if examples is not None else None
    return default_overlap(config.data.context) if overlap is None else overlap


def _encoder(config: RunConfig) -> EncoderConfig:
    if not isinstance(config.model, EncoderConfig):
        raise TypeError(f"labelled examples train an encoder, not a {config.model.architecture}")
    return config.model
