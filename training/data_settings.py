"""From the configuration of data to what `data.prepare` reads. (`longspan prepare` needs no Lightning.)"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longspan.data.denoising import Denoising
from longspan.data.prepare import PrepareSettings, Stage, TokenizerSettings
from longspan.data.sources import SourceSpec, from_path
from longspan.data.store import TokenStore
from longspan.data.tokenizer import Tokenizer

from .errors import UserError
from .schema import DataConfig, SourceConfig

STAGE_WORDS: dict[Stage, str] = {
    "waiting": "waiting for another process that prepares the same data",
    "tokenizer": "training the tokenizer",
    "tokens": "tokenizing",
}


def skipped_files(store: TokenStore) -> dict[str, str]:
    """By source, in words: how many files of its directory were left out because text is not read from their kind."""
    return {
        name: f"skipped {count:,} {'file' if count == 1 else 'files'} of other kinds"
        for name, count in store.skipped_files.items()
    }


def check_mask_token(tokenizer: Tokenizer, key: str) -> None:
    """Raises UserError for a tokenizer without a mask token, which `key` asks for."""
    if tokenizer.mask_id is None:
        raise UserError(
            f"{key}: the tokenizer has no mask token (looked for <|mask|>, [MASK], <mask>); use one that has, or let "
            "data.tokenizer.kind=bpe make one"
        )


def prepare_settings(data: DataConfig, *, tokenizer: Path | None = None) -> PrepareSettings:
    """`tokenizer` replaces the configured one: the tokens that starting weights were trained on.

    Raises SourceError where a source contradicts itself.
    """
    chosen = TokenizerSettings(
        kind=data.tokenizer.kind,
        vocab_size=data.tokenizer.vocab_size,
        path=data.tokenizer.path,
        train_bytes=data.tokenizer.train_bytes,
        digits=data.tokenizer.digits,
        mask=(data.masking is not None or data.denoising is not None) and data.tokenizer.kind != "file",
    )
    if tokenizer is not None:
        chosen = TokenizerSettings(kind="file", path=str(tokenizer))
    return PrepareSettings(
        # The stdlib group's label does not describe a path given beside it.
        name="data" if data.path is not None and data.name == "stdlib" else data.name,
        sources=source_specs(data),
        tokenizer=chosen,
        cache=data.cache,
        validation_fraction=data.validation_fraction,
        workers=data.tokenize_workers,
    )


def denoising_of(data: DataConfig) -> Denoising | None:
    """How texts are damaged; None: not at all."""
    asked = data.denoising
    if asked is None:
        return None
    return Denoising(
        probability=asked.probability, mean_span=asked.mean_span, permute_sentences=asked.permute_sentences
    )


def source_specs(data: DataConfig) -> tuple[SourceSpec, ...]:
    """The mixture; `data.path` replaces it, read as the first source says (its text_field, limit, split …)."""
    if data.path is not None:
        where = from_path(data.path)
        specs = (_spec(replace(data.sources[0], kind=where.kind, path=where.path, name=where.name)),)
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
