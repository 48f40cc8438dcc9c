"""From the configuration of labelled examples to what `data.example_build` reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longspan.data.example_build import BuiltIn, ExampleSettings
from longspan.data.example_records import ExampleColumns
from longspan.data.prepare import TokenizerSettings
from longspan.data.sources import SourceSpec, from_path
from longspan.data.stdlib_examples import BUILT_IN, HELD_OUT

from .schema_sections import DataConfig, ExamplesConfig


def example_settings(data: DataConfig, *, tokenizer: Path | None = None) -> ExampleSettings:
    """`tokenizer` replaces the configured one: the tokens that starting weights were trained on.

    Raises ValueError where there are no examples, SourceError where a source contradicts itself.
    """
    examples = data.examples
    if examples is None:
        raise ValueError("data.examples=null: there are no examples to read")
    asked = data.tokenizer
    chosen = TokenizerSettings(
        kind=asked.kind,
        vocab_size=asked.vocab_size,
        path=asked.path,
        train_bytes=asked.train_bytes,
        digits=asked.digits,
    )
    if tokenizer is not None:
        chosen = TokenizerSettings(kind="file", path=str(tokenizer))
    held_out = None
    if examples.made is not None and examples.made in HELD_OUT:
        held_out = replace(HELD_OUT[examples.made], limit=examples.validation_limit)
    if examples.validation_path is not None:
        held_out = replace(
            from_path(examples.validation_path), split=examples.validation_split, limit=examples.validation_limit
        )
    return ExampleSettings(
        name=examples.made or "examples",
        source=_source(examples),
        validation=held_out,
        columns=_columns(examples),
        tokenizer=chosen,
        validation_fraction=data.validation_fraction,
        tolerance=examples.tolerance,
        cache=data.cache,
    )


def _source(examples: ExamplesConfig) -> SourceSpec | BuiltIn:
    if examples.made is not None:
        return replace(BUILT_IN[examples.made], limit=examples.limit)
    return replace(from_path(examples.path or ""), split=examples.split, limit=examples.limit)


def _columns(examples: ExamplesConfig) -> ExampleColumns:
    if examples.kind == "classification":
        return ExampleColumns(
            texts=(("text", examples.text_field),), label=examples.label_field, group=examples.group_field
        )
    if examples.kind == "seq2seq":
        return ExampleColumns(
            texts=(("source", examples.source_field), ("target", examples.target_field)), group=examples.group_field
        )
    return ExampleColumns(
        texts=(("question", examples.question_field), ("context", examples.context_field)),
        answer=examples.answer_field,
        answer_start=examples.answer_start_field,
        group=examples.group_field,
    )
