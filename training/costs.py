"""What a sequence of a run costs, by the kind of model and data: FLOPs, memory, cache. (`plan` makes a run of it.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from longspan.model import accounting
from longspan.model.accounting import MemoryEstimate
from longspan.model.accounting_seq2seq import seq2seq_cache_bytes, seq2seq_training_flops, seq2seq_training_memory
from longspan.model.cache_plan import cache_bytes
from longspan.model.config import DecoderConfig, Seq2SeqConfig

from .config_checks import target_context
from .data_settings import denoising_of
from .schema import RunConfig

# With data.document_mask attention skips what lies in other documents. Their lengths are known once the data is there.
UPPER_BOUND = "an upper bound: attention is counted as if each sequence were one document"
PACKED = "the mean over the packed sequences of the training stream, attention counted inside documents"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceCosts:
    """Of one training sequence of `data.context` tokens.

    flops_per_token     forward and backward
    note                how sequences were counted, in words; empty: each as the whole context
    memory              at the peak of a step, on one device
    kv_cache_bytes      what generation keeps of one sequence, in bf16; None: the model generates nothing
    kv_bytes_per_token  of that, for each token written, in layers that keep all
    """

    flops_per_token: float
    note: str
    memory: MemoryEstimate
    kv_cache_bytes: int | None
    kv_bytes_per_token: int | None


def sequence_costs(
    config: RunConfig,
    precision: Literal["fp32", "bf16-mixed", "bf16-true"],
    documents: Mapping[int, float] | None = None,
) -> SequenceCosts:
    """`documents`: how many documents of each length a training sequence holds on average, where that is known."""
    model, trainer, context = config.model, config.trainer, config.data.context
    if isinstance(model, Seq2SeqConfig):
        return _of_pairs(config, model, precision)
    decodes = isinstance(model, DecoderConfig)
    flops, note = _packed_flops(config, documents)
    return SequenceCosts(
        flops_per_token=flops,
        note=note,
        memory=accounting.training_memory(
            model,
            micro_batch=trainer.micro_batch,
            length=context,
            precision=precision,
            optimizer=config.optimizer.name,
            activation_checkpointing=trainer.activation_checkpointing,
        ),
        kv_cache_bytes=cache_bytes(model, 1, context, "bfloat16").total if decodes else None,
        kv_bytes_per_token=accounting.kv_bytes_per_token(model) if decodes else None,
    )


def _packed_flops(config: RunConfig, documents: Mapping[int, float] | None) -> tuple[float, str]:
    model, context, masking = config.model, config.data.context, config.data.masking
    if isinstance(model, Seq2SeqConfig):
        raise TypeError("an encoder–decoder's sequences are pairs")
    predicted = 1.0 if masking is None else masking.probability
    if not config.data.document_mask:
        return accounting.training_flops_per_token(model, length=context, predicted=predicted), ""
    if documents is None or not accounting.countable_when_packed(model):
        return accounting.training_flops_per_token(model, length=context, predicted=predicted), UPPER_BOUND
    flops = accounting.packed_training_flops_per_token(model, length=context, documents=documents, predicted=predicted)
    return flops, PACKED


def _of_pairs(
    config: RunConfig, model: Seq2SeqConfig, precision: Literal["fp32", "bf16-mixed", "bf16-true"]
) -> SequenceCosts:
    """A token of such a run is one of a text to be written whole, or of a source that a target belongs to."""
    trainer, context = config.trainer, config.data.context
    source, target = context, target_context(config.data, model)
    note = "" if config.data.examples is None else "an upper bound: every source and target at its greatest length"
    if (denoising := denoising_of(config.data)) is not None:
        source = min(context, denoising.expected_length(context))
        note = f"for each target of {context:,} tokens a source of about {source:,}"
    return SequenceCosts(
        flops_per_token=seq2seq_training_flops(model, source=source, target=target, n_global=1) / context,
        note=note,
        memory=seq2seq_training_memory(
            model,
            micro_batch=trainer.micro_batch,
            source=source,
            target=target,
            precision=precision,
            optimizer=config.optimizer.name,
            activation_checkpointing=trainer.activation_checkpointing,
        ),
        kv_cache_bytes=seq2seq_cache_bytes(model, source=source, target=target),
        kv_bytes_per_token=accounting.kv_bytes_per_token(model.decoder_half),
    )
