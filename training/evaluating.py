"""A checkpoint made ready for evaluation (weights, tokenizer, arithmetic, the documents that it is asked about), and
everything measured that a configuration asks of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from longspan.data.files import SourceError
from longspan.data.sources import from_path
from longspan.data.store import Documents
from longspan.data.synthetic import TooShortError, TooSmallError
from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.context.effective import (
    TARGETS,
    ContextCurve,
    doubling_lengths,
    effective_context,
    measure_context_curve,
)
from longspan.evaluation.context.recall import fitting_lengths
from longspan.evaluation.context.records import by_retrieval
from longspan.evaluation.harness.run import run_harness
from longspan.evaluation.names import LongTextRule
from longspan.evaluation.passes import Precision, dtype_name, widen_for_autocast
from longspan.evaluation.perplexity.documents import StoredDocuments, documents_from, text_documents
from longspan.evaluation.perplexity.evaluate import Evaluation, evaluate_documents
from longspan.evaluation.readers.build import reader_of, strategy_reader
from longspan.evaluation.readers.prompts import TooLong
from longspan.evaluation.readers.reader import Reader
from longspan.evaluation.readers.run import AskedModel, CannotAsk, as_truncation, run_task, way_of_asking
from longspan.evaluation.results.directory import CONTEXT, HARNESS, CheckpointResults, read_perplexity, write_documents
from longspan.evaluation.results.evaluation_files import write_evaluation
from longspan.evaluation.tasks.registry import gather
from longspan.evaluation.tasks.task import Asked, Task
from longspan.model.checkpoint import load_model, resolve_checkpoint
from longspan.model.checkpoint_files import fingerprint
from longspan.model.decoder import Decoder
from longspan.model.encoder import Encoder
from longspan.model.seq2seq import Seq2Seq

from .errors import UserError
from .evaluate_checks import check_strategy, harness_refused, material_of
from .held_out import start_token, trained_with, training_store
from .precision import choose_device, inference_precision
from .schema import EvaluateConfig, EvaluationDataConfig

_BLOCKS = 8  # of targets in a document, for its effective context


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A checkpoint that is evaluated.

    context     tokens that it reads at a time: evaluation.window, else what it was trained with
    start       token that a text begins with; None: the end-of-text token, as in our own training
    precision   of matrix products
    """

    checkpoint: Path
    model: Decoder | Encoder | Seq2Seq
    tokenizer: Tokenizer
    context: int
    start: int | None
    precision: Precision
    device: torch.device

    @property
    def facts(self) -> dict[str, object]:
        """What results say of it."""
        return {
            "path": str(self.checkpoint),
            "weights_sha256": fingerprint(self.checkpoint),
            "tokenizer_sha256": self.tokenizer.sha256,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "context": self.context,
            "device": str(self.device),
            "precision": self.precision,
        }


class Shown(Protocol):
    """Shows a part of the work, by its label, for as long as it lasts."""

    def __call__(self, label: str, /) -> AbstractContextManager[Callable[[int, int], None]]:
        """Gives a function to call with (done, in all)."""
        ...


def load_subject(config: EvaluateConfig, checkpoint: str) -> Subject:
    """Raises CheckpointError, in one line, for what cannot be loaded; UserError for a device that is not there."""
    device = choose_device(config.accelerator, key="accelerator")
    directory = resolve_checkpoint(checkpoint)
    trained = trained_with(directory)
    precision = inference_precision(config.precision, device, trained_in=trained.precision)
    # Asked for fp32, weights that are stored narrower are widened; else they are computed with as they are.
    model = load_model(directory, device=device, dtype=torch.float32 if config.precision == "fp32" else None)
    widen_for_autocast(model, precision)
    tokenizer = Tokenizer.load(directory)
    longest = model.config.encoder_half.max_positions if isinstance(model, Seq2Seq) else model.config.max_positions
    return Subject(
        checkpoint=directory,
        model=model,
        tokenizer=tokenizer,
        context=config.evaluation.window or trained.context or longest,
        start=start_token(directory, tokenizer),
        precision=precision,
        device=device,
    )


def measure(
    subject: Subject,
    config: EvaluateConfig,
    tasks: Sequence[Task],
    *,
    read: Mapping[str, Asked],
    name: str,
    directory: Path,
    shown: Shown,
) -> CheckpointResults:
    """Everything that was asked for; what this model cannot be asked is refused, with the reason: the rest goes on.

    read        task → its questions, of those that were read from files (`evaluate_checks.check_evaluation`)
    directory   what is there already of an unfinished evaluation is kept
    shown       shows how far each part is
    """
    measured = CheckpointResults(name=name, facts=subject.facts)
    refused: dict[str, str] = {}
    if "perplexity" in config.tasks:
        try:
            measured = _with_perplexity(measured, config, subject, directory, shown)
        except CannotAsk as error:
            refused["perplexity"] = str(error)
    if "effective_context" in config.tasks:
        try:
            with shown("effective context") as advance:
                curve = measure_context(subject, config, advance, kept=directory / CONTEXT)
            measured = replace(measured, curve=curve, effective=effective_context(curve, seed=config.seed))
        except CannotAsk as error:
            refused["effective_context"] = str(error)
    if config.harness:
        try:
            with shown("lm-evaluation-harness") as advance:
                found = measure_harness(subject, config, advance, kept=directory / HARNESS)
            measured = replace(measured, harness=found)
        except CannotAsk as error:
            refused["harness"] = str(error)
    model = asked_model(subject, batch=config.evaluation.batch, long_texts=config.long_texts)
    for task in (_limited(each, config.answer_tokens) for each in tasks):
        try:
            way_of_asking(task, model.reader, config.long_texts)
            asked = read[task.name] if task.name in read else _made(task, config, subject)
            with shown(task.name) as advance:
                result, scores = run_task(
                    task,
                    model,
                    asked,
                    samples=directory / "samples" / f"{task.name}.jsonl",
                    long_texts=config.long_texts,
                    progress=advance,
                )
        except (CannotAsk, TooLong) as error:
            refused[task.name] = str(error)
            continue
        measured = replace(
            measured,
            tasks={**measured.tasks, task.name: result},
            samples={**measured.samples, task.name: scores},
        )
    return replace(
        measured, refused=refused, retrieves=by_retrieval(measured.tasks, measured.samples, seed=config.seed)
    )


def _limited(task: Task, answer_tokens: int | None) -> Task:
    return task if answer_tokens is None else replace(task, max_new_tokens=min(task.max_new_tokens, answer_tokens))


def _with_perplexity(
    measured: CheckpointResults, config: EvaluateConfig, subject: Subject, directory: Path, shown: Shown
) -> CheckpointResults:
    found = read_perplexity(directory)
    if found is None:
        others = shown("perplexity by protocol") if config.evaluation.protocols else nullcontext()
        with shown("perplexity") as advance, others as of_others:
            evaluation = measure_perplexity(subject, config, advance, of_others)
        title = f"Perplexity of {subject.checkpoint}"
        write_documents(directory, evaluation.documents)
        write_evaluation(
            evaluation.result, directory, baseline=evaluation.baseline, protocols=evaluation.protocols, title=title
        )
        found = evaluation.record(), evaluation.documents
    record, documents = found
    return replace(measured, perplexity=record, documents=documents)


def _made(task: Task, config: EvaluateConfig, subject: Subject) -> Asked:
    """The questions of a task that makes them. Raises CannotAsk where they cannot be made."""
    material = material_of(config, subject.tokenizer, config.lengths or fitting_lengths(subject.context))
    try:
        return gather(task, material, shorten=config.lengths is None)
    except (TooShortError, TooSmallError, SourceError) as error:  # lengths without room, or more than can be filled
        by = "" if config.lengths is not None else f"by a context of {subject.context:,} tokens: "
        raise CannotAsk(f"{by}{error}") from error


def measure_perplexity(
    subject: Subject,
    config: EvaluateConfig,
    progress: Callable[[int, int], None] | None = None,
    protocol_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity as `evaluation.*` asks for it, of `data.path` or of what the run held out. `protocol_progress` is of
    the other protocols."""
    model = _decoder(subject, "perplexity")
    stored, train = documents_of(config.data, subject)
    return evaluate_documents(
        model,
        subject.tokenizer,
        stored,
        config.evaluation,
        context=subject.context,
        device=subject.device,
        precision=subject.precision,
        train=train,
        limit=config.data.limit,
        start=subject.start,
        receptive_field=model.config.receptive_field,
        progress=progress,
        protocol_progress=protocol_progress,
    )


def measure_context(
    subject: Subject,
    config: EvaluateConfig,
    progress: Callable[[int, int], None] | None = None,
    *,
    kept: Path | None = None,
) -> ContextCurve:
    """Losses of the same tokens with more and more context, of the documents that perplexity is of: what effective
    context is decided by.

    kept   file that a measurement which was stopped goes on from
    Raises as perplexity does, and CannotAsk where no document is longer than the context, or positions end before it.
    """
    model = _decoder(subject, "effective context")
    stored, _ = documents_of(config.data, subject)
    longest = max(config.lengths) if config.lengths is not None else subject.context
    known = model.config.max_positions
    if model.config.positions == "learned" and longest > known:
        raise CannotAsk(f"effective context by {longest:,} tokens: the model has learned {known:,} positions")
    documents = documents_from(stored, limit=config.data.limit, decode=subject.tokenizer.decode)
    if not any(len(document.tokens) > longest and not document.prompt for document in documents):
        raise CannotAsk(f"effective context by {longest:,} tokens: no document without a prompt is longer than that")
    return measure_context_curve(
        model,
        documents,
        lengths=config.lengths or doubling_lengths(longest, shortest=min(256, longest // 4)),
        batch=config.evaluation.batch,
        device=subject.device,
        precision=subject.precision,
        targets=max(1, min(TARGETS, min(config.lengths or (256, longest // 4)) // 2)),
        blocks=_BLOCKS,
        tokenizer_sha256=subject.tokenizer.sha256,
        kept=kept,
        progress=progress,
    )


def measure_harness(
    subject: Subject,
    config: EvaluateConfig,
    progress: Callable[[int, int], None] | None = None,
    *,
    kept: Path | None = None,
) -> dict[str, object]:
    """What lm-evaluation-harness says of it. Raises UserError where that is not installed or has no such task.

    kept   file that a measurement which was stopped goes on from, task by task
    """
    model = _decoder(subject, "lm-evaluation-harness")
    try:
        return run_harness(
            model,
            subject.tokenizer,
            config.harness,
            include_path=None if config.harness_files is None else Path(config.harness_files),
            limit=config.samples,
            max_length=subject.context,
            batch=config.evaluation.batch,
            precision=subject.precision,
            starts=subject.start is not None,
            seed=config.seed,
            kept=kept,
            progress=progress,
        )
    except (ImportError, ValueError) as error:
        raise harness_refused(config, error) from error


def _decoder(subject: Subject, what: str) -> Decoder:
    if not isinstance(subject.model, Decoder):
        raise CannotAsk(f"{subject.checkpoint} holds no decoder, and {what} is of models that predict the next token")
    return subject.model


def documents_of(data: EvaluationDataConfig, subject: Subject) -> tuple[StoredDocuments, Documents | None]:
    """What to score, and the training documents for the baseline: a text of the user's own can do without."""
    if data.path is None:
        store = training_store(subject.checkpoint, subject.tokenizer)
        return store.documents("validation"), store.documents("train")
    source = replace(from_path(data.path), text_field=data.text_field, limit=data.limit)
    stored = text_documents(source, subject.tokenizer)
    try:
        return stored, training_store(subject.checkpoint, subject.tokenizer).documents("train")
    except UserError:
        print(
            f"longspan evaluate: no n-gram baseline, which is fitted on training text: that of {subject.checkpoint} is "
            "not known here",
            file=sys.stderr,
        )
        return stored, None


def asked_model(subject: Subject, *, batch: int, long_texts: LongTextRule | None = None) -> AskedModel:
    """The subject as tasks ask it. Caches hold what the weights compute, so in bf16 the weights themselves become bf16:
    whoever measures perplexity under autocast does it before.

    long_texts   what becomes of texts that it cannot read whole; strategies beyond truncation take a reader of theirs
    Raises UserError for a strategy that the model cannot do.
    """
    start = subject.tokenizer.eos_id if subject.start is None else subject.start
    if subject.precision == "bf16":
        subject.model.to(torch.bfloat16)
    model = subject.model
    reader: Reader
    if long_texts is not None:
        check_strategy(long_texts, model.config, subject.checkpoint)
    if isinstance(model, Encoder) or long_texts is None or as_truncation(long_texts) is not None:
        reader = reader_of(model, subject.tokenizer, start=(start,), max_tokens=subject.context, batch=batch)
    else:
        reader = strategy_reader(
            model, subject.tokenizer, long_texts, start=(start,), max_tokens=subject.context, batch=batch
        )
    return AskedModel(
        reader=reader,
        tokenizer=subject.tokenizer,
        precision=_weights(torch.bfloat16 if subject.precision == "bf16" else next(model.parameters()).dtype),
    )


def _weights(dtype: torch.dtype) -> str:
    """What tasks state of the arithmetic: weights of less than 32 bits are said to be that."""
    return "fp32" if dtype == torch.float32 else f"{dtype_name(dtype)} weights"
