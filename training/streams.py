"""Which stream of batches a run trains on: the one place that knows every kind of training data."""

from __future__ import annotations

from longspan.data.store import TokenStore
from longspan.model.config import Seq2SeqConfig

from .data_settings import source_specs
from .datamodule import BatchPlan, StreamData, packed_data
from .pairs import denoising_data
from .schema import RunConfig


def training_data(config: RunConfig, store: TokenStore, plan: BatchPlan, *, pin_memory: bool = False) -> StreamData:
    """Steps and validation batches of a settled run, for its model. Raises UserError where data and model don't fit."""
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
