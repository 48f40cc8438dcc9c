"""Labelled examples as training data: rows of a store in optimizer steps, and how they are scored."""

from __future__ import annotations

from longspan.data.examples import ExampleStore
from longspan.data.labelled import ItemPass, ItemStream, TextItems, WindowItems, default_overlap
from longspan.data.writer import Split
from longspan.evaluation.predictions import AnswerTally, ClassTally, Tally
from longspan.model.config import EncoderConfig

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


def _overlap(config: RunConfig) -> int:
    examples = config.data.examples
    overlap = examples.overlap if examples is not None else None
    return default_overlap(config.data.context) if overlap is None else overlap


def _encoder(config: RunConfig) -> EncoderConfig:
    if not isinstance(config.model, EncoderConfig):
        raise TypeError(f"labelled examples train an encoder, not a {config.model.architecture}")
    return config.model
