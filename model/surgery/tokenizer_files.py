"""What a tokenizer's files say about the model's length, kept true when that changes."""

from __future__ import annotations

import json
from pathlib import Path

from longspan.model.config import ModelConfig, Seq2SeqConfig

TOKENIZER_CONFIG = "tokenizer_config.json"
_LENGTHS = ("model_max_length", "max_len")


def tell_length(directory: Path, before: ModelConfig, after: ModelConfig) -> None:
    """Puts the new length where tokenizer_config.json has one (transformers warns of, and truncates, longer texts).

    tokenizer.json stays as it is, byte for byte: token stores know a tokenizer by its hash.
    """
    path, new = directory / TOKENIZER_CONFIG, longest_input(after)
    if new == longest_input(before) or not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    told = [name for name in _LENGTHS if isinstance(settings.get(name), int)]
    if told:
        settings |= dict.fromkeys(told, new)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def longest_input(config: ModelConfig) -> int:
    """In tokens; of an encoder–decoder, its source."""
    return config.encoder.max_positions if isinstance(config, Seq2SeqConfig) else config.max_positions
