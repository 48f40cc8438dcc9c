"""BERT (Devlin et al. 2019) as transformers spells it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.kernels.attention.spec import AttentionSpec
from longspan.model.config import EncoderConfig

from . import encoders
from .decoders import refuse
from .translate import Family, translated

CLASSIFIER_DROPOUT = translated("classifier_dropout", float, None, "`head_dropout`; null: `hidden_dropout_prob`")

_NAMES = encoders.Names(
    classes="Bert",
    prefix="bert.",
    lm_head=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    pooled_head=("bert.pooler.dense", "classifier"),
)


def full_attention(values: Mapping[str, Any]) -> dict[str, Any]:
    """`attention` of a config whose every layer sees everything."""
    spec = AttentionSpec(causal=False, dropout=values["attention_probs_dropout_prob"])
    return {"patterns": {"full": spec}, "layers": ["full"]}


def full_attention_fields(config: EncoderConfig) -> tuple[dict[str, Any], list[str]]:
    """`full_attention` backwards, and what it cannot say. `documents` goes unsaid on purpose: a sequence that is one
    document is the same with and without it; so does `global_tokens`, where every token sees every other anyway."""
    problems: list[str] = []
    dropouts: set[float] = set()
    for name, groups in config.pattern_groups().items():
        for group in groups:
            spec, plain = group.spec, AttentionSpec(causal=False)
            words = [
                word
                for word in ("alibi", "softcap", "learned_sink", "block_sparse", "window")
                if getattr(spec, word) != getattr(plain, word)
            ]
            if spec.scale not in (None, config.dim_per_head**-0.5):
                words.append("scale")
            problems += [f"{word} in attention.patterns.{name}" for word in words]
            dropouts.add(spec.dropout)
    if len(dropouts) > 1:
        problems.append("attention dropout that differs between layers")
    if config.global_projections:
        problems.append("global_projections=True")
    return {"attention_probs_dropout_prob": min(dropouts)}, problems


def _to_ours(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**encoders.to_ours(values, _NAMES, padding_offset=False), "attention": full_attention(values)}


def _to_theirs(config: EncoderConfig) -> dict[str, Any]:
    fields, problems = encoders.to_theirs(config, _NAMES)
    attention, unsaid = full_attention_fields(config)
    if config.position_offset:
        unsaid.append(f"position_offset={config.position_offset}")
    refuse("bert", [*problems, *unsaid])
    return {**fields, **attention, "classifier_dropout": config.head_dropout}


BERT = Family(
    model_type="bert",
    config=EncoderConfig,
    fields=(*encoders.FIELDS, translated("vocab_size", int, 30522, "`vocab_size`"), CLASSIFIER_DROPOUT),
    to_ours=_to_ours,
    to_theirs=_to_theirs,
    tensors=lambda config: encoders.tensors(config, _NAMES),
    settle=lambda config, found: encoders.settle(config, found, _NAMES),
    prefix="bert.",
    buffers=encoders.BUFFERS,
    spellings=encoders.SPELLINGS,
    unread={
        r"cls\.seq_relationship\.(weight|bias)": "the head for next-sentence prediction, of which there is none here"
    },
    copies=lambda config: encoders.copies(config, _NAMES),
)
