"""Which stream of batches a run trains on: the one place that knows every kind of training data."""

from __future__ import annotations

from pathlib import Path

from longspan.data.example_build import PreparedExamples, prepare_examples
from longspan.data.prepare import Prepared, Progress, prepare
from longspan.model.config import Seq2SeqConfig

from .data_settings import prepare_settings, source_specs
from .datamodule import BatchPlan, StreamData, packed_data
from .example_settings import example_settings
from .labelled import labelled_data
from .pairs import denoising_data, pairs_data
from .schema import DataConfig, RunConfig

AnyPrepared = Prepared | PreparedExamples


def prepared_data(data: DataConfig, *, tokenizer: Path | None, progress: Progress | None) -> AnyPrepared:
    """What the stream is made of: a store of documents or of labelled examples, from the cache where it is there.

    `tokenizer` replaces the configured one: the tokens that starting weights were trained on.
    """
    if data.examples is None:
        return prepare(prepare_settings(data, tokenizer=tokenizer), progress=progress)
    store = prepare_examples(example_settings(data, tokenizer=tokenizer), progress=progress)
    return PreparedExamples(store, store.tokenizer(), store.directory)


def training_data(config: RunConfig, prepared: AnyPrepared, plan: BatchPlan, *, pin_memory: bool = False) -> StreamData:
    """Steps and validation batches of a settled run, for its model. Raises UserError where data and model don't fit."""
    if isinstance(prepared, PreparedExamples) and isinstance(config.model, Seq2SeqConfig):
        return pairs_data(prepared.store, config, config.model, plan, pin_memory=pin_memory)
    if isinstance(prepared, PreparedExamples):
        return labelled_data(prepared.store, config, plan, pin_memory=pin_memory)
    store = prepared.store
    weights = dict(zip(store.sources, (spec.weight for spec in source_specs(config.data)), strict=True))
    if isinstance(config.model, Seq2SeqConfig):
        return denoising_data(
            store,
            config.data,
            config.model,
            plan,
            seed=config.seed,
            weights=weights,
            val_batches=config.trainer.val_batches,
            pin_memory=pin_memory,
        )
    return packed_data(
        store,
        config.data,
        plan,
        seed=config.seed,
        weights=weights,
        val_batches=config.trainer.val_batches,
        pin_memory=pin_memory,
    )
