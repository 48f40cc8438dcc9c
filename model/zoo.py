"""Named model sizes. Torch is imported only by `build`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from longspan.kernels.attention.spec import AttentionSpec, Window

from .config import (
    AttentionPlan,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    ModelConfigError,
    Seq2SeqConfig,
    StackConfig,
    from_dict,
)

if TYPE_CHECKING:
    from .build import Model


def _gpt2(n_layers: int, d_model: int, n_heads: int) -> DecoderConfig:
    """Radford et al. 2019, table 2: learned positions, LayerNorm, GELU (tanh), biases, tied head."""
    return DecoderConfig(n_layers=n_layers, d_model=d_model, n_heads=n_heads, d_ff=4 * d_model)


def _llama(n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, d_ff: int) -> DecoderConfig:
    """Touvron et al. 2023 (arXiv 2302.13971), §2.2: RoPE, RMSNorm, SwiGLU, no biases; GQA as in Llama 2 and 3. The head
    is tied as in Llama 3.2's small models: at these sizes an untied one would be a tenth to half of all parameters."""
    return DecoderConfig(
        vocab_size=50_304,  # GPT-2's 50,257, rounded up to a multiple of 128
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_ff=d_ff,
        max_positions=4096,
        positions="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias=False,
        tied_head=True,
    )


def _bert(
    n_layers: int, d_model: int, n_heads: int, *, spec: AttentionSpec | None = None, dropout: float = 0.1
) -> EncoderConfig:
    """Devlin et al. 2019 (arXiv 1810.04805), §3: post-norm, GELU, two token types, dropout everywhere."""
    spec = AttentionSpec(causal=False, dropout=dropout) if spec is None else spec
    return EncoderConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_ff=4 * d_model,
        dropout=dropout,
        attention=AttentionPlan(patterns={"layer": spec}, layers=("layer",)),
    )


def _roberta(base: EncoderConfig) -> EncoderConfig:
    """Liu et al. 2019 (arXiv 1907.11692): BERT with GPT-2's vocabulary and one token type; its position table begins at
    row 2."""
    return replace(base, vocab_size=50265, n_types=1, norm_eps=1e-5, position_offset=2)


def _longformer(each_side: int, *, dropout: float = 0.1) -> AttentionSpec:
    """Beltagy et al. 2020 (arXiv 2004.05150), §3: a window on either side, and global tokens."""
    return AttentionSpec(causal=False, window=Window.symmetric(each_side), global_tokens=True, dropout=dropout)


def _plan(spec: AttentionSpec) -> AttentionPlan:
    return AttentionPlan(patterns={"layer": spec}, layers=("layer",))


def _bart(n_layers: int, d_model: int, n_heads: int, *, dropout: float = 0.1) -> Seq2SeqConfig:
    """Lewis et al. 2019 (arXiv 1910.13461), §2.1, with the tables of fairseq, which begin at row 2."""
    stack = StackConfig(n_layers=n_layers, n_heads=n_heads, d_ff=4 * d_model)
    return Seq2SeqConfig(
        d_model=d_model,
        encoder=replace(stack, attention=_plan(AttentionSpec(causal=False, dropout=dropout))),
        decoder=replace(stack, attention=_plan(AttentionSpec(causal=True, dropout=dropout))),
        cross_attention=AttentionSpec(causal=False, dropout=dropout),
        dropout=dropout,
    )


def _led(base: Seq2SeqConfig, spec: AttentionSpec, *, max_positions: int) -> Seq2SeqConfig:
    """Beltagy et al. 2020 (arXiv 2004.05150), §7: BART with Longformer's encoder; its tables begin at row 0."""
    return replace(
        base,
        encoder=replace(base.encoder, max_positions=max_positions, attention=_plan(spec)),
        position_offset=0,
        global_projections=True,
    )


_TINY = DecoderConfig(vocab_size=256, n_layers=2, d_model=64, n_heads=4, d_ff=256, max_positions=128)

DECODERS: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        # The GPT-2 family: parameters as published.
        "gpt2-small": _gpt2(12, 768, 12),  # 124,439,808
        "gpt2-medium": _gpt2(24, 1024, 16),  # 354,823,168
        "gpt2-large": _gpt2(36, 1280, 20),  # 774,030,080
        "gpt2-xl": _gpt2(48, 1600, 25),  # 1,557,611,200
        # A Llama-like ladder.
        "llama-20m": _llama(8, 256, 4, 2, 1024),  # 20,746,496
        "llama-60m": _llama(8, 512, 8, 4, 2048),  # 57,221,632
        "llama-150m": _llama(16, 768, 12, 4, 2304),  # 148,759,296
        "llama-300m": _llama(20, 1024, 16, 4, 3072),  # 292,725,760
        "llama-600m": _llama(24, 1280, 20, 4, 4864),  # 607,089,920
        "llama-1b": _llama(16, 2048, 16, 4, 7168),  # 975,505,408
        "llama-1.3b": _llama(20, 2048, 16, 4, 8192),  # 1,319,454,720
        # For tests.
        "gpt-tiny": _TINY,  # 124,672
        "llama-tiny": replace(
            _TINY, n_kv_heads=2, d_ff=160, positions="rope", norm="rmsnorm", mlp="swiglu", bias=False, tied_head=False
        ),  # 119,104
        # For two CPU cores and a few minutes (`make quickstart`).
        "quickstart": DecoderConfig(
            vocab_size=8192,
            n_layers=4,
            d_model=256,
            n_heads=4,
            d_ff=1024,
            max_positions=512,
        ),  # 5,387,776
    }
)

_TINY_BERT = replace(_bert(2, 64, 4, dropout=0.0), vocab_size=256, max_positions=128)

ENCODERS: Mapping[str, EncoderConfig] = MappingProxyType(
    {
        # With the masked-LM head and without pooler; parameters as published.
        "bert-base": _bert(12, 768, 12),
        "bert-large": _bert(24, 1024, 16),
        "roberta-base": _roberta(_bert(12, 768, 12)),
        "roberta-large": _roberta(_bert(24, 1024, 16)),
        "longformer-base": replace(
            _roberta(_bert(12, 768, 12, spec=_longformer(256))), max_positions=4096, global_projections=True
        ),
        # For tests.
        "bert-tiny": _TINY_BERT,
        "longformer-tiny": replace(
            _TINY_BERT,
            n_types=1,
            position_offset=2,
            attention=AttentionPlan(patterns={"layer": _longformer(8, dropout=0.0)}, layers=("layer",)),
            global_projections=True,
        ),
    }
)

_TINY_STACK = StackConfig(n_layers=2, n_heads=4, d_ff=256, max_positions=128)
_TINY_BART = Seq2SeqConfig(vocab_size=256, d_model=64, encoder=_TINY_STACK, decoder=_TINY_STACK)

SEQ2SEQS: Mapping[str, Seq2SeqConfig] = MappingProxyType(
    {
        # Parameters as published; head and source share one embedding with the target.
        "bart-base": _bart(6, 768, 12),
        "bart-large": _bart(12, 1024, 16),
        "led-base": _led(_bart(6, 768, 12), _longformer(512), max_positions=16384),
        "led-large": _led(_bart(12, 1024, 16), _longformer(512), max_positions=16384),
        # For tests.
        "bart-tiny": _TINY_BART,
        "led-tiny": _led(_TINY_BART, _longformer(8, dropout=0.0), max_positions=256),
    }
)

CONFIGS: Mapping[str, ModelConfig] = MappingProxyType({**DECODERS, **ENCODERS, **SEQ2SEQS})


def configure(name: str, overrides: Mapping[str, object] | None = None) -> ModelConfig:
    """The named config with some fields replaced (`attention` as an AttentionPlan or as plain dicts; of `encoder` and
    `decoder` some fields will do).

    Raises ValueError for an unknown name, ModelConfigError for unknown fields and impossible values, each with the
    nearest known one.
    """
    if name not in CONFIGS:
        close = difflib.get_close_matches(name, CONFIGS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ModelConfigError([f"no model is named '{name}'; {hint}known: {', '.join(CONFIGS)}"])
    base = CONFIGS[name]
    changed = dict(overrides or {})
    for name, value in changed.items():
        stack = getattr(base, name, None)
        if isinstance(stack, StackConfig) and isinstance(value, Mapping):
            changed[name] = {**_fields(stack), **value}
    return from_dict({**_fields(base), **changed})


def _fields(config: ModelConfig | StackConfig) -> dict[str, object]:
    return {item.name: getattr(config, item.name) for item in fields(config)}


def build(name: str, overrides: Mapping[str, object] | None = None, *, seed: int | None = None) -> Model:
    """A freshly initialised model of a named size; `seed=None` draws one from torch's generator."""
    from .build import build_from

    return build_from(configure(name, overrides), seed=seed)
