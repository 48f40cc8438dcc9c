"""What can be known of an evaluation before any checkpoint is measured is found out then: a refusal costs seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.harness.run import check_names
from longspan.evaluation.names import LongTextRule
from longspan.evaluation.readers.run import as_truncation
from longspan.evaluation.tasks.documents import FromFile
from longspan.evaluation.tasks.registry import gather
from longspan.evaluation.tasks.room import objections
from longspan.evaluation.tasks.task import Asked, Material, Task
from longspan.model.checkpoint_files import load_config, resolve_checkpoint
from longspan.model.config import DecoderConfig, EncoderConfig, ModelConfig, Seq2SeqConfig

from .errors import UserError
from .held_out import training_store
from .schema import EvaluateConfig


def check_evaluation(config: EvaluateConfig, tasks: Sequence[Task]) -> Mapping[str, Asked]:
    """The questions of tasks that read files, by the task's name: they are the same for every checkpoint.

    Raises UserError for lengths that tasks or effective context cannot be measured at, a strategy that a model cannot
    do, and held-out text that is gone; SourceError for files that cannot be used; CheckpointError.
    """
    _check_windows(config)
    _check_harness(config)
    for task in tasks:
        if task.made_to_length and task.files is not None:
            task.questions(_material(config, (), len))  # reads the file
    short: dict[str, str] = {}  # tokenizer → what it has no room for
    for named in config.subjects:
        directory = resolve_checkpoint(named)
        model, tokenizer = load_config(directory), Tokenizer.load(directory)
        if config.long_texts is not None:
            check_strategy(config.long_texts, model, directory)
        if config.data.path is None and isinstance(model, DecoderConfig) and _reads_documents(config):
            training_store(directory, tokenizer)
        if config.lengths is None or isinstance(model, EncoderConfig) or tokenizer.sha256 in short:
            continue  # an encoder is asked nothing that is made to length
        found = "; ".join(objections(tasks, material_of(config, tokenizer, config.lengths)))
        short[tokenizer.sha256] = f"{named}: {found}" if found and len(config.subjects) > 1 else found
    if any(short.values()):
        raise UserError(
            f"lengths={list(config.lengths or ())}: not every task can be made to each of them, prompt and answer "
            f"together: {'; '.join(filter(None, short.values()))}; ask for other lengths, or leave these tasks out"
        )
    material = _material(config, (), len)
    return {task.name: gather(task, material) for task in tasks if isinstance(task.questions, FromFile)}


def _reads_documents(config: EvaluateConfig) -> bool:
    return "perplexity" in config.tasks or "effective_context" in config.tasks


def _check_windows(config: EvaluateConfig) -> None:
    if "effective_context" in config.tasks and config.lengths is not None:
        if len(config.lengths) < 2:
            raise UserError(f"lengths={list(config.lengths)}: effective_context compares at least two lengths")
        if min(config.lengths) < 2:
            raise UserError(f"lengths={list(config.lengths)}: effective_context reads at least 2 tokens")


def _check_harness(config: EvaluateConfig) -> None:
    if config.harness:
        try:
            check_names(config.harness, None if config.harness_files is None else Path(config.harness_files))
        except (ImportError, ValueError) as error:
            raise harness_refused(config, error) from error


def harness_refused(config: EvaluateConfig, error: Exception) -> UserError:
    """As the command line calls it."""
    said = str(error).replace("include_path", "harness_files")
    return UserError(f"harness={list(config.harness)}: {said}")


def check_strategy(long_texts: LongTextRule, model: ModelConfig, directory: Path) -> None:
    """Raises UserError for a strategy that a model of this kind cannot do."""
    if as_truncation(long_texts) is not None:
        return
    if isinstance(model, EncoderConfig):
        raise UserError(f"long_texts={long_texts}: is for models that write answers; {directory} is an encoder")
    if long_texts == "fused" and not isinstance(model, Seq2SeqConfig):
        raise UserError("long_texts=fused: fuses what an encoder made of each part, and this model is a decoder")


def material_of(config: EvaluateConfig, tokenizer: Tokenizer, lengths: tuple[int, ...]) -> Material:
    """What questions are made of, for models with this tokenizer."""
    return _material(config, lengths, lambda text: len(tokenizer.encode(text)))


def _material(config: EvaluateConfig, lengths: tuple[int, ...], count: Callable[[str], int]) -> Material:
    return Material(
        lengths=lengths,
        depths=config.depths,
        samples=config.samples,
        seed=config.seed,
        files=None if config.files is None else Path(config.files),
        count=count,
        hub=config.hub,
    )
