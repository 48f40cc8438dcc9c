"""RoBERTa (Liu et al. 2019) as transformers spells it: BERT whose position 0 lies at row pad_token_id + 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.model.config import EncoderConfig

from . import encoders
from .bert import CLASSIFIER_DROPOUT, full_attention, full_attention_fields
from .decoders import refuse
from .translate import Family, translated

PAD_TOKEN = translated(
    "pad_token_id", int, 1, "`position_offset` is one more: positions count on from the padding's row"
)

# The pooler of the bare model stands in files of models with a head that never read it.
UNREAD_POOLER = "the pooler of the bare model, which a head for classification replaces by its own"

_LM_HEAD, _POOLED_HEAD = encoders.ROBERTA_LIKE
_NAMES = encoders.Names(classes="Roberta", prefix="roberta.", lm_head=_LM_HEAD, pooled_head=_POOLED_HEAD)


def _to_ours(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**encoders.to_ours(values, _NAMES, padding_offset=True), "attention": full_attention(values)}


def _to_theirs(config: EncoderConfig) -> dict[str, Any]:
    fields, problems = encoders.to_theirs(config, _NAMES)
    attention, unsaid = full_attention_fields(config)
    refuse("roberta", [*problems, *unsaid, *offset_problems(config)])
    return {
        **fields,
        **attention,
        "classifier_dropout": config.head_dropout,
        "pad_token_id": config.position_offset - 1,
    }


def offset_problems(config: EncoderConfig) -> list[str]:
    found = [] if config.position_offset else ["position_offset=0"]
    if config.head == "mlm" and config.mlp != "gelu":
        found.append(f"mlp={config.mlp} with head=mlm, whose GELU is exact")
    return found


ROBERTA = Family(
    model_type="roberta",
    config=EncoderConfig,
    fields=(*encoders.FIELDS, translated("vocab_size", int, 50265, "`vocab_size`"), CLASSIFIER_DROPOUT, PAD_TOKEN),
    to_ours=_to_ours,
    to_theirs=_to_theirs,
    tensors=lambda config: encoders.tensors(config, _NAMES),
    settle=lambda config, found: encoders.settle(config, found, _NAMES),
    prefix="roberta.",
    buffers=encoders.BUFFERS,
    unread={r"roberta\.pooler\.dense\.(weight|bias)": UNREAD_POOLER},
    copies=lambda config: encoders.copies(config, _NAMES),
)
