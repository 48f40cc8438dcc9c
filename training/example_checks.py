"""What keys of labelled examples must agree on with each other and with the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from longspan.model.config import EncoderConfig, Seq2SeqConfig

from .config_errors import Problem, assignment

if TYPE_CHECKING:
    from .schema import RunConfig
    from .schema_sections import DataConfig, ExamplesConfig

MADE: Mapping[str, str] = {
    "packages": "classification",
    "parameters": "qa",
    "outlines": "seq2seq",
    "same_document": "classification",
    "listops": "classification",
    "main_points": "seq2seq",
}
HELD_OUT = ("same_document", "listops", "main_points")  # made with held-out examples of their own
HEADS: Mapping[str, str] = {"classification": "classification", "qa": "qa"}

_COLUMNS_OF: Mapping[str, tuple[str, ...]] = {
    "classification": ("text_field", "label_field"),
    "qa": ("question_field", "context_field", "answer_field", "answer_start_field"),
    "seq2seq": ("source_field", "target_field"),
}
_SETTINGS_OF: Mapping[str, tuple[str, ...]] = {
    "classification": (),
    "qa": ("overlap", "max_answer_tokens"),
    "seq2seq": ("target_context",),
}


def check_examples(data: DataConfig) -> Iterator[Problem]:
    """Keys of `data.examples` and what else `data` says."""
    examples = data.examples
    if examples is None:
        return
    yield from _check_source(examples)
    plain = type(examples)(kind=examples.kind)
    names = [field.name for field in fields(examples)]
    written = {name: getattr(examples, name) for name in names if getattr(examples, name) != getattr(plain, name)}
    for other in MADE.values():
        for name in (*_COLUMNS_OF[other], *_SETTINGS_OF[other]) if other != examples.kind else ():
            if name in written:
                yield _problem(
                    f"data.examples.{name}", written[name], f"belongs to kind={other}; kind={examples.kind} here"
                )
    if examples.made is not None:
        for name in (*_COLUMNS_OF[examples.kind], "group_field"):
            if name in written:
                yield _problem(
                    f"data.examples.{name}", written[name], f"made={examples.made} has no columns; leave it out"
                )
    if examples.overlap is not None and examples.overlap >= data.context:
        yield _problem(
            "data.examples.overlap", examples.overlap, f"windows of data.context={data.context} tokens would never end"
        )
    for name in ("masking", "denoising", "prompt_field", "path"):
        if getattr(data, name) is not None:
            yield Problem(
                (f"data.{name}", "data.examples"),
                f"data.{name}: is for documents, and data.examples are read instead; give one of them",
            )
    for name in ("document_mask", "reset_positions"):
        if getattr(data, name):
            yield _problem(f"data.{name}", True, "is for packed documents; with data.examples each row is one text")


def check_labelled_model(config: RunConfig, *, fixed_by: str | None = None) -> Iterator[Problem]:
    """Whether the model can learn from the examples. `fixed_by` names the checkpoint that brings it."""
    examples, model = config.data.examples, config.model
    if examples is None:
        return
    if config.stages:
        yield Problem(
            ("stages", "data.examples"), "stages: change what a stream of documents is cut into; leave them out"
        )
    if (examples.kind == "seq2seq") != isinstance(model, Seq2SeqConfig):
        wanted = "an encoder–decoder" if examples.kind == "seq2seq" else "an encoder"
        whose = f"name {wanted} as model" if fixed_by is None else f"{fixed_by} is a {model.architecture}"
        yield Problem(
            ("data.examples", "model.name"), f"data.examples.kind={examples.kind}: fine-tunes {wanted}; {whose}"
        )
    elif isinstance(model, Seq2SeqConfig):
        return
    elif not isinstance(model, EncoderConfig):
        whose = "name an encoder as model" if fixed_by is None else f"{fixed_by} is a {model.architecture}"
        yield Problem(
            ("data.examples", "model.name"), f"data.examples.kind={examples.kind}: fine-tunes an encoder; {whose}"
        )
    elif model.head != HEADS[examples.kind]:
        pooler = ", model.pooler=true and model.labels=[…]" if examples.kind == "classification" else ""
        yield _problem(
            "model.head",
            model.head,
            f"data.examples.kind={examples.kind} trains another head; set model.head={HEADS[examples.kind]}{pooler}",
            "data.examples.kind",
        )


def _check_source(examples: ExamplesConfig) -> Iterator[Problem]:
    if (examples.path is None) == (examples.made is None):
        given = "names no records" if examples.path is None else "and data.examples.made are two sources"
        yield _problem("data.examples.path", examples.path, f"{given}; give data.examples.path or data.examples.made")
    if examples.made is not None and MADE[examples.made] != examples.kind:
        yield _problem(
            "data.examples.made",
            examples.made,
            f"makes examples of kind={MADE[examples.made]}, and data.examples.kind={examples.kind}",
            "data.examples.kind",
        )
    if examples.validation_limit is not None and examples.validation_path is None and examples.made not in HELD_OUT:
        yield _problem(
            "data.examples.validation_limit",
            examples.validation_limit,
            "belongs to data.examples.validation_path, which is not given",
        )


def _problem(key: str, value: object, rest: str, *others: str) -> Problem:
    return Problem((key, *others), f"{assignment(key, value)}: {rest}")
