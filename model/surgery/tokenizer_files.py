"""What a tokenizer's files say about the model's length, kept true when that changes."""

from __future__ import annotations

import json
from pathlib import Path

from longspan.model.config import ModelConfig, Seq2SeqConfig
from longspan.model.conversion.hf import read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
_LENGTHS = ("model_max_length", "max_len")
_UNLIMITED = 10**12  # transformers writes 10^30 for a tokenizer that knows no limit


def tell_length(directory: Path, before: ModelConfig, after: ModelConfig) -> None:
    """Puts the new length where tokenizer_config.json has one (transformers warns of, and truncates, longer texts).

    tokenizer.json stays as it is, byte for byte: token stores know a tokenizer by its hash. Raises ConversionError for
    a tokenizer_config.json that is damaged.
    """
    path, new = directory / TOKENIZER_CONFIG, longest_input(after)
    if new == longest_input(before) or not path.is_file():
        return
    settings = read_json(path)
    told = [name for name in _LENGTHS if isinstance(settings.get(name), int) and settings[name] < _UNLIMITED]
    if told:
        settings |= dict.fromkeys(told, new)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def longest_input(config: ModelConfig) -> int:
    """In tokens; of an encoder–decoder, its source."""
    return config.encoder.max_positions if isinstance(config, Seq2SeqConfig) else config.max_positions
