"""LED (Beltagy et al. 2020, §7) as transformers spells it: BART with Longformer's encoder, its tables from row 0 on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.model.config import Seq2SeqConfig

from . import bart
from .decoders import refuse
from .longformer import from_windows, to_windows
from .translate import Family, only, translated

_SELF = "self_attn.longformer_self_attn"
_ENCODER_ATTENTION = {
    f"{_SELF}.query": "attention.q_proj",
    f"{_SELF}.key": "attention.k_proj",
    f"{_SELF}.value": "attention.v_proj",
    f"{_SELF}.query_global": "global_attention.q_proj",
    f"{_SELF}.key_global": "global_attention.k_proj",
    f"{_SELF}.value_global": "global_attention.v_proj",
    "self_attn.output": "attention.o_proj",
}


def _to_ours(values: Mapping[str, Any]) -> dict[str, Any]:
    dropout, n_layers = values["attention_dropout"], values["encoder_layers"]
    attention = from_windows(values["attention_window"], n_layers=n_layers, dropout=dropout)
    longest = values["max_encoder_position_embeddings"], values["max_decoder_position_embeddings"]
    return {**bart.to_ours(values, attention, longest), "position_offset": 0, "global_projections": True}


def _to_theirs(config: Seq2SeqConfig) -> dict[str, Any]:
    fields, problems = bart.to_theirs(config)
    windows, unsaid = to_windows(config.encoder_half, dropout=config.cross_attention.dropout)
    problems += [f"in the encoder {words}" for words in unsaid]
    wanted = {"position_offset": 0, "scale_embedding": False}
    problems += [f"{name}={getattr(config, name)}" for name, value in wanted.items() if getattr(config, name) != value]
    refuse("led", problems)
    return {
        **fields,
        "architectures": ["LEDForConditionalGeneration"],
        "attention_window": windows,
        "max_encoder_position_embeddings": config.encoder.max_positions,
        "max_decoder_position_embeddings": config.decoder.max_positions,
    }


LED = Family(
    model_type="led",
    config=Seq2SeqConfig,
    fields=(
        *bart.FIELDS,
        translated("max_encoder_position_embeddings", int, 16384, "`encoder.max_positions`"),
        translated("max_decoder_position_embeddings", int, 1024, "`decoder.max_positions`"),
        translated(
            "attention_window", (int, list), 512, "`window` of each encoder layer's pattern: half of it on either side"
        ),
        only("scale_embedding", False, meaning="LED never scales"),
    ),
    to_ours=_to_ours,
    to_theirs=_to_theirs,
    tensors=lambda config: bart.tensors(config, "led.", _ENCODER_ATTENTION),
    prefix="led.",
    copies=lambda _config: bart.copies("led."),
    zero=(bart.BIAS,),
    generation=bart.GENERATION_FIELDS,
    buffers=(r".*\.version",),
    tokens=bart.PADDING,
)
