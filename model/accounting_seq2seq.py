"""What training an encoder–decoder costs: floating-point operations and bytes. (No torch here; conventions as in
accounting.py, where its parameters and its forward pass are counted.)

Legend: B pairs, S source and T target tokens of each, D model width, F MLP width, H query heads, G key/value heads, K
head dim, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

from .accounting import MemoryEstimate, bytes_of, layer_activations, parameters, precision_bytes, seq2seq_forward_flops
from .cache_plan import cache_bytes, cross_cache_bytes
from .config import Seq2SeqConfig


def seq2seq_training_flops(config: Seq2SeqConfig, *, source: int, target: int, n_global: int = 0) -> int:
    """FLOPs of forward and backward over one pair: three forward passes, two of them for the gradients."""
    return 3 * seq2seq_forward_flops(config, source=source, target=target, n_global=n_global)


def seq2seq_cache_bytes(config: Seq2SeqConfig, *, source: int, target: int) -> int:
    """What generation keeps of one pair, in bf16: every decoder layer's keys and values of source and target."""
    crossing = cross_cache_bytes(config, 1, source, "bfloat16").total
    return crossing + cache_bytes(config.decoder_half, 1, target, "bfloat16").total


def seq2seq_training_memory(
    config: Seq2SeqConfig,
    *,
    micro_batch: int,
    source: int,
    target: int,
    precision: Literal["fp32", "bf16-mixed", "bf16-true"],
    optimizer: Literal["adamw"] = "adamw",
    activation_checkpointing: bool = False,
    loss_logits: int = 2**26,
) -> MemoryEstimate:
    """What one device holds at the peak of a training step; terms as in `accounting.training_memory`, with

    activations  both stacks over their own tokens, and of cross-attention in every decoder layer
                   per target token   D * (r + c) its norm, 2 HK * c queries and output, 4 H its lse, D dropout's mask
                   per source token   2 GK * c keys and values
                 per source token and encoder layer with global projections: 2 GK * c keys and values of theirs
                 with activation checkpointing: the inputs of every layer, plus the largest layer in full
    """
    r, c = precision_bytes(precision)
    encoder, decoder = config.encoder_half, config.decoder_half
    D, V = config.d_model, config.vocab_size
    q_width, cross_width = decoder.n_heads * decoder.dim_per_head, config.cross_heads * decoder.dim_per_head
    n_source, n_target, n_parameters = micro_batch * source, micro_batch * target, parameters(config).total
    of_globals = 2 * encoder.kv_heads * encoder.dim_per_head * c
    reading = [
        n_source * (layer_activations(encoder, r, c) + of_globals * encoder.has_global_projections(layer))
        for layer in range(encoder.n_layers)
    ]
    crossing = D * (r + c) + 2 * q_width * c + 4 * decoder.n_heads + (D if config.dropout else 0)
    writing = n_target * (layer_activations(decoder, r, c) + crossing) + n_source * 2 * cross_width * c
    if activation_checkpointing:
        inputs = r * D * (n_source * encoder.n_layers + n_target * decoder.n_layers)
        stacks = inputs + max(*reading, writing)
    else:
        stacks = sum(reading) + decoder.n_layers * writing
    return MemoryEstimate(
        weights=n_parameters * (r + bytes_of("bfloat16") if precision == "bf16-mixed" else r),
        gradients=n_parameters * r,
        optimizer=n_parameters * 2 * r if optimizer == "adamw" else 0,
        activations=stacks + (n_source + n_target) * D * (r + c),  # the norms over the embeddings of both sides
        logits=min(n_target * V, loss_logits) * 2 * c + V * D * (4 + c) + n_target * D * c,
    )
