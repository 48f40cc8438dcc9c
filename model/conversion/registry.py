"""The families there are, and the config translations that need nothing but them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.model.config import ModelConfig, ModelConfigError, from_dict

from .bart import BART
from .bert import BERT
from .gpt2 import GPT2
from .hf import ConversionError
from .led import LED
from .llama import LLAMA, MISTRAL, QWEN2, QWEN3
from .longformer import LONGFORMER
from .roberta import ROBERTA
from .translate import CONFIG, Family, read_fields

FAMILIES: Mapping[str, Family[Any]] = {
    family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, BERT, ROBERTA, LONGFORMER, BART, LED)
}


def family_of(raw: Mapping[str, Any]) -> Family[Any]:
    """The family of a Hugging Face config. Raises ConversionError for one that there is not."""
    model_type = raw.get("model_type")
    known = ", ".join(FAMILIES)
    if model_type is None:
        raise ConversionError(f"{CONFIG} names no model_type; supported are {known}")
    if model_type not in FAMILIES:
        raise ConversionError(f"{CONFIG}: model_type={model_type!r} is not supported; supported are {known}")
    return FAMILIES[model_type]


def config_from(raw: Mapping[str, Any]) -> ModelConfig:
    """Our config from a Hugging Face config. Raises ConversionError with a line for each field in the way."""
    family = family_of(raw)
    ours = family.to_ours(read_fields(raw, family.fields))
    try:
        return from_dict(ours)
    except ModelConfigError as error:
        raise ConversionError(f"{CONFIG} translates to a model that cannot be: {error}") from error


def config_to(config: ModelConfig, model_type: str | None = None) -> tuple[Family[Any], Mapping[str, Any]]:
    """The family that says a config of ours (the first that can; `model_type`: that one) and its config.json.

    Raises ConversionError with the reasons of every family that was asked.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise ConversionError(f"model_type={model_type}: is not supported; supported are {', '.join(FAMILIES)}")
    asked = [
        family
        for family in (FAMILIES.values() if model_type is None else [FAMILIES[model_type]])
        if isinstance(config, family.config)
    ]
    reasons: list[str] = []
    for family in asked:
        try:
            return family, family.to_theirs(config)
        except ConversionError as error:
            reasons.extend(error.problems)
    raise ConversionError("no Hugging Face model type is this model: " + "; ".join(reasons))
