"""From the configuration of data to what `data.prepare` reads. (`longspan prepare` needs no Lightning.)"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longspan.data.prepare import PrepareSettings, TokenizerSettings
from longspan.data.sources import SourceSpec, from_path

from .schema import DataConfig, SourceConfig


def prepare_settings(data: DataConfig, *, tokenizer: Path | None = None) -> PrepareSettings:
    """`tokenizer` replaces the configured one: the tokens that starting weights were trained on.

    Raises SourceError where a source contradicts itself.
    """
    chosen = TokenizerSettings(
        kind=data.tokenizer.kind,
        vocab_size=data.tokenizer.vocab_size,
        path=data.tokenizer.path,
        train_bytes=data.tokenizer.train_bytes,
    )
    if tokenizer is not None:
        chosen = TokenizerSettings(kind="file", path=str(tokenizer))
    return PrepareSettings(
        name=data.name,
        sources=source_specs(data),
        tokenizer=chosen,
        cache=data.cache,
        validation_fraction=data.validation_fraction,
        workers=data.tokenize_workers,
    )


def source_specs(data: DataConfig) -> tuple[SourceSpec, ...]:
    """The mixture; `data.path` replaces it."""
    if data.path is not None:
        specs = (from_path(data.path),)
    else:
        specs = tuple(_spec(source) for source in data.sources)
    if data.response_field is None:
        return specs
    return tuple(replace(spec, prompt_field=data.prompt_field, response_field=data.response_field) for spec in specs)


def _spec(source: SourceConfig) -> SourceSpec:
    return SourceSpec(
        kind=source.kind,
        path=source.path,
        name=source.name,
        weight=source.weight,
        split=source.split,
        config=source.config,
        revision=source.revision,
        streaming=source.streaming,
        text_field=source.text_field,
        limit=source.limit,
    )
