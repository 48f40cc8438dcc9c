"""What a model costs, exactly: parameters, floating-point operations, bytes. (No torch here.)

Conventions
  * FLOPs are those of matrix products: a multiplication and an addition are two. Norms, softmax, rotation, embedding
    look-ups and the optimizer are not counted.
  * Attention counts the (query, key) pairs that the spec allows, each 4 * head_dim per head (scores and values).
    `causal_halved=False` counts what older reports count: every query is charged for the whole row (all keys, or
    the whole window), as in the MFU of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
  * Global tokens are a property of a batch, not of a config: they count where their number is given, as if they were
    the first tokens of each document.
  * Training is forward + 2 x forward; recomputation (activation checkpointing) is overhead, not work: MFU, not HFU.

Legend: D model width, F MLP width, H query heads, G key/value heads, K head dim, V vocabulary, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longspan.kernels.attention.spec import AttentionSpec

from .attention_pairs import attention_pairs, pairs_by_length
from .config import DecoderConfig, EncoderConfig, ModelConfig, Seq2SeqConfig

if TYPE_CHECKING:
    import torch

    DType = torch.dtype | str

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_PRECISION = {"fp32": "float32", "bf16-mixed": "bfloat16", "bf16-true": "bfloat16"}

# -- parameters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters by part.

    embedding   of tokens and of token types
    attention   of all layers, the projections of global tokens among it; likewise mlp, norms
    final_norm  a decoder's before its head; an encoder's over the embeddings, and its last where it is pre-norm; of an
                encoder–decoder, those over the embeddings of both sides
    head        0 for a tied head of a decoder; an encoder's pooler and head, without a tied matrix
    """

    embedding: int
    positions: int
    attention: int
    mlp: int
    norms: int
    final_norm: int
    head: int

    @property
    def blocks(self) -> int:
        return self.attention + self.mlp + self.norms

    @property
    def total(self) -> int:
        return self.embedding + self.positions + self.blocks + self.final_norm + self.head

    @property
    def non_embedding(self) -> int:
        """Without token and position tables (the N of Kaplan et al. 2020, arXiv 2001.08361)."""
        return self.total - self.embedding - self.positions


def parameters(config: ModelConfig) -> ParameterCount:
    if isinstance(config, Seq2SeqConfig):
        return _seq2seq_parameters(config)
    D, F, V = config.d_model, config.d_ff, config.vocab_size
    q_width, kv_width = config.n_heads * config.dim_per_head, config.kv_heads * config.dim_per_head
    bias = int(config.bias)
    decodes = isinstance(config, DecoderConfig)
    projections = (D + (config.has_qkv_bias if decodes else bias)) * (q_width + 2 * kv_width)
    attention = projections + (q_width + (config.has_out_bias if decodes else bias)) * D
    sinks = sum(
        group.heads
        for layer in range(config.n_layers)
        for group in config.head_groups(layer)
        if group.spec.learned_sink
    )
    mlp = 3 * D * F + bias * (2 * F + D) if config.mlp == "swiglu" else 2 * D * F + bias * (F + D)
    norm = D * (2 if config.norm == "layernorm" and config.bias else 1)
    if isinstance(config, EncoderConfig):
        of_globals = projections * sum(config.has_global_projections(layer) for layer in range(config.n_layers))
        return ParameterCount(
            embedding=(V + config.n_types) * D,
            positions=(config.max_positions + config.position_offset) * D if config.positions == "learned" else 0,
            attention=config.n_layers * attention + sinks + of_globals,
            mlp=config.n_layers * mlp,
            norms=config.n_layers * 2 * norm,
            final_norm=norm * (2 if config.norm_order == "pre" else 1),
            head=_encoder_head_parameters(config, norm),
        )
    attention += 2 * config.dim_per_head if config.qk_norm else 0
    return ParameterCount(
        embedding=V * D,
        positions=config.max_positions * D if config.positions == "learned" else 0,
        attention=config.n_layers * attention + sinks,
        mlp=config.n_layers * mlp,
        norms=config.n_layers * 2 * norm,
        final_norm=norm,
        head=0 if config.tied_head else V * D,
    )


def _seq2seq_parameters(config: Seq2SeqConfig) -> ParameterCount:
    """Both halves, of which one has the embedding, and cross-attention with its norm in every decoder layer."""
    half = config.decoder_half
    source, target = parameters(config.encoder_half), parameters(half)
    D, norm = config.d_model, 2 * config.d_model
    q_width, kv_width = half.n_heads * half.dim_per_head, config.cross_heads * half.dim_per_head
    crossing = (D + 1) * (q_width + 2 * kv_width) + (q_width + 1) * D
    return ParameterCount(
        embedding=source.embedding,
        positions=source.positions + target.positions + config.position_offset * D,
        attention=source.attention + target.attention + half.n_layers * crossing,
        mlp=source.mlp + target.mlp,
        norms=source.norms + target.norms + half.n_layers * norm,
        final_norm=source.final_norm + target.final_norm,
        head=0,
    )


def _encoder_head_parameters(config: EncoderConfig, norm: int) -> int:
    D, V, bias = config.d_model, config.vocab_size, int(config.bias)
    pooler = (D + bias) * D if config.pooler else 0
    head = {
        "none": 0,
        "mlm": (D + bias) * D + norm + V * bias + (0 if config.tied_head else V * D),
        "classification": (D + 1) * len(config.labels),
        "qa": (D + 1) * 2,
    }
    return pooler + head[config.head]


# -- floating-point operations ----------------------------------------------------------------------------------------


def forward_flops(
    config: DecoderConfig | EncoderConfig,
    *,
    length: int,
    documents: Sequence[int] | None = None,
    n_global: int = 0,
    causal_halved: bool = True,
) -> int:
    """FLOPs of one forward pass over one sequence of `length` tokens, head included.

    documents  the lengths of the documents packed into it; only layers whose spec separates documents care
    n_global   the first so many tokens of each document are global; only layers whose spec has global tokens care.
               Projections of their own cost over all tokens, and a second attention for the global rows alone

    Raises ValueError when documents do not add up to `length`.
    """
    if documents is not None and sum(documents) != length:
        raise ValueError(f"documents of {list(documents)} tokens add up to {sum(documents)}, not to length={length}")
    flops = round(_matrix_flops(config, length))
    for layer in range(config.n_layers):
        for group in config.head_groups(layer):
            pairs = attention_pairs(
                group.spec, length, documents=documents, n_global=n_global, causal_halved=causal_halved
            )
            flops += 4 * config.dim_per_head * group.heads * pairs
        if n_global and isinstance(config, EncoderConfig) and config.has_global_projections(layer):
            flops += _global_flops(config, config.head_groups(layer)[0].spec, length, documents, n_global)
    return flops


def seq2seq_forward_flops(config: Seq2SeqConfig, *, source: int, target: int, n_global: int = 0) -> int:
    """FLOPs of one forward pass over a source of `source` tokens and a target of `target`, head included. The first
    `n_global` tokens of the source are global, where the encoder has global tokens."""
    half = config.decoder_half
    q_width, kv_width = half.n_heads * half.dim_per_head, config.cross_heads * half.dim_per_head
    crossing = 2 * config.d_model * (2 * target * q_width + 2 * source * kv_width) + 4 * q_width * source * target
    encoder = forward_flops(config.encoder_half, length=source, n_global=n_global)
    return encoder + forward_flops(half, length=target) + half.n_layers * crossing


def _global_flops(
    config: EncoderConfig, spec: AttentionSpec, length: int, documents: Sequence[int] | None, n_global: int
) -> int:
    """What one layer's global tokens cost beside the usual attention: k and v of all tokens, q of theirs, and theirs
    over every key of their documents."""
    kv_width, q_width = config.kv_heads * config.dim_per_head, config.n_heads * config.dim_per_head
    counts = (length,) if documents is None or not spec.documents else documents
    rows = sum(min(n_global, count) for count in counts)
    pairs = sum(min(n_global, count) * count for count in counts)
    return 2 * config.d_model * (2 * length * kv_width + rows * q_width) + 4 * q_width * pairs


def _matrix_flops(config: DecoderConfig | EncoderConfig, length: int, predicted: float = 1.0) -> float:
    """All products with weights, of one forward pass over `length` tokens; the head on the share that is predicted."""
    D, F = config.d_model, config.d_ff
    q_width, kv_width = config.n_heads * config.dim_per_head, config.kv_heads * config.dim_per_head
    matrices = D * (q_width + 2 * kv_width) + q_width * D + (3 if config.mlp == "swiglu" else 2) * D * F
    blocks = 2 * length * config.n_layers * matrices
    if isinstance(config, DecoderConfig):
        return blocks + 2 * length * predicted * D * config.vocab_size
    pooled = D * (D + len(config.labels)) if config.head == "classification" else 0  # one token of the sequence
    per_token = {"none": 0, "mlm": D * (D + config.vocab_size), "classification": 0, "qa": 2 * D}
    return blocks + 2 * (length * predicted * per_token[config.head] + pooled)


def training_flops_per_token(
    config: DecoderConfig | EncoderConfig,
    *,
    length: int,
    documents: Sequence[int] | None = None,
    n_global: int = 0,
    predicted: float = 1.0,
    causal_halved: bool = True,
) -> float:
    """FLOPs of forward and backward per token of a sequence: three forward passes, two of them for the gradients.

    `predicted` is the share of tokens that the head is applied to: masked language modelling skips the others.
    """
    flops = forward_flops(config, length=length, documents=documents, n_global=n_global, causal_halved=causal_halved)
    skipped = _matrix_flops(config, length) - _matrix_flops(config, length, predicted)
    return 3 * (flops - skipped) / length


def packed_training_flops_per_token(
    config: DecoderConfig | EncoderConfig, *, length: int, documents: Mapping[int, float], predicted: float = 1.0
) -> float:
    """As `training_flops_per_token`, the mean over packed sequences: `documents` says how many documents of each length
    a sequence holds on average.

    Raises ValueError when they do not add up to `length`, and for a model that is not `countable_when_packed`.
    """
    held = sum(count * number for count, number in documents.items())
    if not math.isclose(held, length, rel_tol=1e-9):
        raise ValueError(f"documents add up to {held:g} tokens a sequence, not to length={length}")
    if not countable_when_packed(config):
        raise ValueError("block_sparse with documents: the pairs depend on where each document starts, not on lengths")
    flops = _matrix_flops(config, length, predicted)
    for layer in range(config.n_layers):
        for group in config.head_groups(layer):
            if group.spec.documents:
                pairs_of = pairs_by_length(group.spec, documents)
                pairs = sum(number * pairs_of[count] for count, number in documents.items())
            else:
                pairs = attention_pairs(group.spec, length)
            flops += 4 * config.dim_per_head * group.heads * pairs
    return 3 * flops / length


def countable_when_packed(config: DecoderConfig | EncoderConfig) -> bool:
    """Whether the lengths of documents decide how many pairs each layer computes over them."""
    specs = [spec for specs in config.attention.specs().values() for spec in specs]
    return not any(spec.documents and spec.block_sparse is not None for spec in specs)


# -- bytes ------------------------------------------------------------------------------------------------------------


def kv_bytes_per_token(config: DecoderConfig, dtype: DType = "bfloat16") -> int:
    """Cache bytes per token and sequence: 2 (keys, values) * layers * G * K * bytes."""
    return 2 * config.n_layers * config.kv_heads * config.dim_per_head * bytes_of(dtype)


def bytes_of(dtype: DType) -> int:
    """Bytes of one element; `torch.bfloat16` or "bfloat16". Raises ValueError for a dtype that no model uses."""
    name = str(dtype).removeprefix("torch.")
    if name not in _BYTES:
        raise ValueError(f"dtype={name}: it is one of {', '.join(_BYTES)}")
    return _BYTES[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a training step; see `training_memory` for the terms."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def training_memory(
    config: DecoderConfig | EncoderConfig,
    *,
    micro_batch: int,
    length: int,
    precision: Literal["fp32", "bf16-mixed", "bf16-true"],
    optimizer: Literal["adamw"] = "adamw",
    activation_checkpointing: bool = False,
    loss_logits: int = 2**26,
) -> MemoryEstimate:
    """What one device holds at the peak of a training step, without the allocator's overhead and dense masks. Compiled
    blocks recompute some cheap results and need up to a fifth less.

    With P parameters, N = micro_batch * length tokens, c bytes of the compute dtype, r bytes of a weight and of the
    residual stream (bf16-mixed: c = 2, r = 4):

    weights      P * r, under bf16-mixed also autocast's copies of the matrices, P * 2
    gradients    P * r
    optimizer    adamw: two moments, P * 2r
    activations  what backward reads, per token and layer:
                   2 D * (r + c)                   inputs and outputs of the two norms
                   (2 HK + 2 GK) * c + 4 H         rotated q and k, v, attention's output, its lse
                   (HK + GK) * c                   q and k before qk_norm, if there is one
                   2 F * c (GELU), 4 F * c (SwiGLU)
                   2 D                             dropout masks, if there is dropout
                 plus D * (r + c) per token for the final norm
                 with activation checkpointing: r * D per token and layer, plus one layer in full
    logits       the chunked loss: min(N * V, loss_logits) * 2c, logits and their gradient; what it keeps for backward:
                 V * D * (4 + c), the head's gradient in fp32 and the head in the compute dtype; N * D * c, the gradient
                 of the hidden states
    """
    r, c = precision_bytes(precision)
    D = config.d_model
    n_tokens, n_parameters = micro_batch * length, parameters(config).total
    layer = layer_activations(config, r, c)
    stack = config.n_layers * r * D + layer if activation_checkpointing else config.n_layers * layer
    return MemoryEstimate(
        weights=n_parameters * (r + 2 if precision == "bf16-mixed" else r),
        gradients=n_parameters * r,
        optimizer=n_parameters * 2 * r if optimizer == "adamw" else 0,
        activations=n_tokens * (stack + D * (r + c)),
        logits=min(n_tokens * config.vocab_size, loss_logits) * 2 * c
        + config.vocab_size * D * (4 + c)
        + n_tokens * D * c,
    )


def precision_bytes(precision: str) -> tuple[int, int]:
    """(r, c): bytes of a weight and of the residual stream, and of the dtype that products are computed in."""
    if precision not in _PRECISION:
        raise ValueError(f"precision={precision!r}: it is one of {', '.join(_PRECISION)}")
    return (2 if precision == "bf16-true" else 4), bytes_of(_PRECISION[precision])


def layer_activations(config: DecoderConfig | EncoderConfig, r: int, c: int) -> int:
    """Bytes that backward reads, per token of one layer; see `training_memory`."""
    D, F, H = config.d_model, config.d_ff, config.n_heads
    q_width, kv_width = H * config.dim_per_head, config.kv_heads * config.dim_per_head
    layer = 2 * D * (r + c) + (2 * q_width + 2 * kv_width) * c + 4 * H
    layer += (q_width + kv_width) * c if isinstance(config, DecoderConfig) and config.qk_norm else 0
    layer += (4 if config.mlp == "swiglu" else 2) * F * c
    return layer + (2 * D if config.dropout else 0)


# -- peak rates -------------------------------------------------------------------------------------------------------

# Dense matrix-product FLOP/s without sparsity, from the makers' data sheets. The first key that occurs in the device's
# name decides, so the more special names stand first.
PEAK_FLOPS: dict[str, dict[str, float]] = {
    "B200": {"bfloat16": 2250e12, "float16": 2250e12},
    "H200": {"bfloat16": 989.4e12, "float16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    "H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "tf32": 378e12, "float32": 51.2e12},
    "H100 NVL": {"bfloat16": 835e12, "float16": 835e12, "tf32": 417.5e12, "float32": 60e12},
    "H100": {"bfloat16": 989.4e12, "float16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},  # SXM5
    "A100": {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12},
    "L40S": {"bfloat16": 362e12, "float16": 362e12, "tf32": 183e12, "float32": 91.6e12},
    "L4": {"bfloat16": 121e12, "float16": 121e12, "tf32": 60e12, "float32": 30.3e12},
    "RTX 4090": {"bfloat16": 165.2e12, "float16": 165.2e12, "tf32": 82.6e12, "float32": 82.6e12},
    "RTX 3090": {"bfloat16": 71e12, "float16": 71e12, "tf32": 35.6e12, "float32": 35.6e12},
    "V100": {"float16": 125e12, "float32": 15.7e12},
    "T4": {"float16": 65e12, "float32": 8.1e12},
}


def peak_flops(device_name: str, dtype: DType) -> float | None:
    """FLOP/s that a device (`torch.cuda.get_device_name()`) could reach in matrix products of `dtype` ("tf32" too);
    None where the table does not say, CPUs among them: then there is no MFU."""
    dtype = str(dtype).removeprefix("torch.")
    words = device_name.replace("-", " ").split()
    for name, rates in PEAK_FLOPS.items():
        if all(word in words for word in name.split()):
            return rates.get(dtype)
    return None
