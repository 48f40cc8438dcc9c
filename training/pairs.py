"""Sources and targets for encoder–decoders, as training data: denoised texts of a token store, or pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

from longspan.data.denoising import DenoisedDataset, Denoiser
from longspan.data.examples import ExampleStore
from longspan.data.labelled import ItemPass, ItemStream
from longspan.data.lengths import PADDING
from longspan.data.loader import PackedDataset
from longspan.data.seq2seq import PairFrame, PairItems, pair_frame
from longspan.data.store import TokenStore
from longspan.data.tokenizer import Tokenizer
from longspan.model.config import Seq2SeqConfig

from .config_checks import target_context
from .data_settings import check_mask_token, denoising_of
from .datamodule import BatchPlan, StreamData
from .errors import UserError
from .schema import DataConfig, RunConfig


def denoising_data(
    store: TokenStore,
    config: DataConfig,
    model: Seq2SeqConfig,
    plan: BatchPlan,
    *,
    seed: int,
    weights: Mapping[str, float] | None = None,
    val_batches: int = 20,
    pin_memory: bool = False,
) -> StreamData:
    """Packed sequences of a token store that are read damaged and written whole; arguments as of `packed_data`. A
    source or target has at most `config.context` tokens, its special ones included.

    Raises UserError for a tokenizer without a mask token, and as `frame_for`.
    """
    chosen = denoising_of(config)
    if chosen is None:
        raise ValueError("data.denoising=null: there is nothing to write whole")
    tokenizer = store.tokenizer()
    check_mask_token(tokenizer, "data.denoising")
    frame = frame_for(tokenizer, model, config)
    text = min(frame.source_room, frame.target_room)
    packed = partial(PackedDataset, store, context=text, packing=config.packing)
    train = packed(split="train", weights=weights, seed=seed, shuffle=config.shuffle)
    validation = packed(split="validation", single_pass=True) if store.n_tokens("validation") else None
    damaged = partial(DenoisedDataset, denoiser=Denoiser(chosen, tokenizer, seed=seed), frame=frame)
    return StreamData(
        damaged(train),
        None if validation is None else damaged(validation),
        plan,
        fingerprint={
            "store": store.manifest["self_sha256"],
            "tokenizer": store.tokenizer_sha256,
            "seed": seed,
            "weights": dict(weights) if weights is not None else None,
            "context": config.context,
            "packing": config.packing,
            "shuffle": config.shuffle,
            "denoising": asdict(chosen),
            "frame": asdict(frame),
        },
        val_batches=val_batches,
        workers=config.workers,
        pin_memory=pin_memory,
    )


def pairs_data(
    store: ExampleStore, config: RunConfig, model: Seq2SeqConfig, plan: BatchPlan, *, pin_memory: bool = False
) -> StreamData:
    """Pairs of like length in each step, another order in every pass. A source has at most `data.context` tokens and a
    target `target_context`, special ones included; of longer ones the beginning is taken.

    Raises UserError as `frame_for`.
    """
    data = config.data
    frame = frame_for(store.tokenizer(), model, data)
    items = partial(PairItems, store, frame=frame)
    held_out = None
    if len(store.records("validation")):
        held_out = ItemPass(items(split="validation"), bucket=plan.micro_batch)
    return StreamData(
        ItemStream(items(split="train"), bucket=plan.global_batch, seed=config.seed, shuffle=data.shuffle),
        held_out,
        plan,
        fingerprint={
            "store": store.manifest["self_sha256"],
            "tokenizer": store.tokenizer_sha256,
            "seed": config.seed,
            "shuffle": data.shuffle,
            "frame": asdict(frame),
            "padding": PADDING,
        },
        val_batches=config.trainer.val_batches,
        workers=data.workers,
        pin_memory=pin_memory,
    )


def frame_for(tokenizer: Tokenizer, model: Seq2SeqConfig, data: DataConfig) -> PairFrame:
    """How this tokenizer's texts are framed for this model. Raises UserError for a start token that is text to the
    tokenizer, and lengths that special tokens fill."""
    start = model.decoder_start_token
    if start not in tokenizer.special_ids:
        raise UserError(
            f"model.decoder_start_token={start}: is a piece of text in this tokenizer ({tokenizer.decode([start])!r}); "
            f"set model.decoder_start_token={tokenizer.eos_id}, the token that ends its texts"
        )
    most = target_context(data, model)
    frame = pair_frame(
        tokenizer, start=start, is_global=has_globals(model), source_context=data.context, target_context=most
    )
    asked = {
        f"data.context={data.context}": frame.source_room,
        f"data.examples.target_context={most}": frame.target_room,
    }
    for words, room in asked.items():
        if room < 1:
            raise UserError(f"{words}: special tokens fill it; raise it")
    return frame


def has_globals(model: Seq2SeqConfig) -> bool:
    """Whether some layer of the encoder has global tokens."""
    specs = model.encoder_half.attention.specs().values()
    return any(spec.global_tokens for of_pattern in specs for spec in of_pattern)
