"""`train`: a run from its config, from the first check to the report."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from longspan.data.example_build import PreparedExamples
from longspan.data.loader import PackedDataset
from longspan.data.prepare import Prepared
from longspan.data.prepare import Stage as PreparationStage
from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.perplexity.evaluate import Evaluation
from longspan.evaluation.reporting.run_report import write_report
from longspan.model import checkpoint as model_checkpoint
from longspan.model.build import Model, build_from
from longspan.model.config import DecoderConfig, EncoderConfig, ModelConfig, Seq2SeqConfig
from longspan.model.encoder import Encoder
from longspan.model.seq2seq import Seq2Seq

from . import run_directory as files
from .callbacks import RunLoop
from .checkpointing import Checkpoints, load_state
from .data_settings import STAGE_WORDS, skipped_files
from .datamodule import BatchPlan, StreamData
from .errors import RunFailed, Terminated, UserError
from .finish import answer, evaluate, sample
from .fit import Given, Session, fit
from .labelled import Scored, described, mean_row, score_checkpoint
from .module import checkpoint_activations, compile_blocks
from .new_head import HeadChange, fit_weights, has_new_head
from .objectives import objective_for
from .optim import stage_schedule
from .plan import find_peak, plan, plan_for
from .precision import Arithmetic, choose_arithmetic, choose_device
from .progress import logging_to
from .records import RunResult, closing_words, open_directory, result_of, summary_of
from .schema import RunConfig
from .signals import SignalFlag
from .stages import Stage, stage_at, stages_of
from .start import (
    Origin,
    check_every_stage,
    find_directory,
    find_origin,
    set_backends,
    settle,
    tokenizer_of,
    with_tokenizer,
)
from .streams import AnyPrepared, prepared_data, training_data

__all__ = ["Given", "RunResult", "plan", "train"]

logger = logging.getLogger("longspan.training")


def train(config: RunConfig, *, given: Given | None = None) -> RunResult:
    """Trains, evaluates, samples and reports; returns when all of it is done.

    Raises UserError (and the data, model and attention errors that mean the same) for a wrong request, before anything
    is written to the run directory; RunFailed where the run itself cannot go on; Terminated when a signal stopped it
    after saving.
    """
    device = choose_device(config.trainer.accelerator, config.trainer.devices)
    arithmetic = choose_arithmetic(config.trainer.precision, device)
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
        os.environ["OMP_NUM_THREADS"] = str(config.trainer.threads)  # for the other processes of this run
    try:
        for stage in stages_of(config):
            stage_schedule(stage)
    except ValueError as error:
        raise UserError(str(error)) from error

    directory = find_directory(config)
    is_main = process_rank(config) == 0
    console = Console(soft_wrap=True) if is_main and config.callbacks.progress != "off" else None
    with ExitStack() as stack:
        if is_main:
            stack.enter_context(files.locked(directory))
            files.check_output(directory, resume=config.resume is not None, overwrite=config.overwrite)
        stack.enter_context(logging_to(None, console))
        try:
            return _train(config, directory, device, arithmetic, console, given or Given(), is_main=is_main)
        except (RunFailed, Terminated):
            if not is_main:  # the main process speaks for all; a second exit code would make the launcher kill it
                raise SystemExit(0) from None
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk is nobody's wrong request
                raise
            raise _refused_by_system(error, directory) from error


def _train(
    config: RunConfig,
    directory: Path,
    device: torch.device,
    arithmetic: Arithmetic,
    console: Console | None,
    given: Given,
    *,
    is_main: bool,
) -> RunResult:
    origin = find_origin(config, directory)
    config = settle(config, origin, directory, own_objective=given.objective is not None)
    stages = stages_of(config)
    check_every_stage(config, device, arithmetic)
    prepared = given.prepared or prepared_data(
        config.data, tokenizer=tokenizer_of(config, origin), progress=_Stages() if is_main else None
    )
    _check_vocabulary(prepared.tokenizer, config.model)
    streams = [_stream(stage.config, prepared, pin_memory=device.type == "cuda") for stage in stages]
    state = load_state(origin.checkpoint) if origin.resumes and origin.checkpoint is not None else None
    if state is not None:
        if state["step"] > config.trainer.steps:
            raise UserError(
                f"trainer.steps={config.trainer.steps}: the run in {directory} is at step {state['step']} already; "
                f"give more steps, or start another run from its weights (checkpoint={directory}, with its own output)"
            )
        streams[stage_at(stages, state["step"]).number - 1].load_state_dict(state["data"])
    peak = find_peak(device, arithmetic, world=config.trainer.devices * config.trainer.nodes)
    session = Session(
        config=with_tokenizer(config, origin, directory),
        directory=directory,
        device=device,
        arithmetic=arithmetic,
        costs=plan_for(config, device, arithmetic, peak, documents=[_documents(data, config) for data in streams]),
        peak=peak,
        state=state,
        console=console,
        is_main=is_main,
        objective=given.objective or partial(objective_for, label_smoothing=config.trainer.label_smoothing),
    )
    model, new_head = _model(stage_at(stages, session.step).config, origin, arithmetic)

    # From here on the request is known to be sound, and the run directory is written.
    lineage: dict[str, object] = {}
    with ExitStack() as stack:
        stack.enter_context(_running(directory))
        if is_main:
            lineage = open_directory(session, origin, prepared, new_head)
        stack.enter_context(logging_to(directory / files.LOG if is_main else None, None))
        _log_start(session, origin, prepared, streams)
        if new_head is not None:
            logger.info("%s", new_head.words)
        loop = _take(session, list(zip(stages, streams)), model, prepared.tokenizer, lineage)
        return _finish(session, loop, prepared, streams[-1]) if is_main else result_of(session, loop, None)


def _take(
    session: Session,
    stages: Sequence[tuple[Stage, StreamData]],
    model: Model,
    tokenizer: Tokenizer,
    lineage: Mapping[str, object],
) -> RunLoop:
    """The stages that are left. Each but the first begins as a run does that was killed where the one before ended, so
    a run that is killed there has nothing to make up for."""
    config = session.config
    first = stage_at([stage for stage, _ in stages], session.step)

    def checkpoints(stage: Stage) -> Checkpoints:
        of_stage = lineage if stage.name is None else {**lineage, "stage": stage.to_dict()}
        return Checkpoints(session.directory, keep=config.trainer.keep, tokenizer=tokenizer, lineage=of_stage)

    with SignalFlag().installed() as signals:
        if first.name is not None and session.step < first.end:
            logger.info("%s", first.words)
        loop = fit(session, first, model, stages[first.number - 1][1], checkpoints(first), signals)
        for stage, data in stages[first.number :]:
            logger.info("%s", stage.words)
            before = checkpoints(stage).path(stage.start)
            state = load_state(before)
            state |= {"best": None, "optimizer": state["optimizer"] if stage.optimizer == "kept" else None}
            data.consumed = stage.place
            if config.trainer.compile:
                torch.compiler.reset()  # what was compiled knows the windows of the stage before
            model, _ = _model(stage.config, Origin(checkpoint=before, resumes=True), session.arithmetic)
            loop = fit(replace(session, state=state), stage, model, data, checkpoints(stage), signals)
    return loop


def _stream(config: RunConfig, prepared: AnyPrepared, *, pin_memory: bool) -> StreamData:
    """What a stage reads."""
    trainer = config.trainer
    return training_data(
        config,
        prepared,
        BatchPlan(
            global_batch=trainer.global_batch,
            micro_batch=trainer.micro_batch,
            world=trainer.devices * trainer.nodes,
            rank=process_rank(config),
        ),
        pin_memory=pin_memory,
    )


def _documents(data: StreamData, config: RunConfig) -> dict[int, float] | None:
    if config.data.document_mask and isinstance(data.train, PackedDataset):
        return data.train.documents_per_sequence()
    return None


def _log_start(session: Session, origin: Origin, prepared: AnyPrepared, streams: Sequence[StreamData]) -> None:
    logger.info("%s on %s; %s", session.arithmetic.precision, session.device, session.arithmetic.reason)
    if isinstance(prepared, Prepared):
        for name, words in skipped_files(prepared.store).items():
            logger.warning("data: %s: %s", name, words)
    else:
        for words in described(prepared.store, streams[0]):
            logger.info("data: %s", words)
    if session.peak.flops is not None and mean_row(streams[0]) is None:
        note = f"; {session.costs.flops_note}" if session.costs.flops_note else ""
        logger.info("mfu is the share of %.3g TFLOP/s, %s%s", session.peak.flops / 1e12, session.peak.basis, note)
    if session.step:
        logger.info("continuing at step %d from %s", session.step, origin.checkpoint)


@contextmanager
def _running(directory: Path) -> Iterator[None]:
    """What the system refuses a run that goes on (disk, quota, permissions, network) ends it with RunFailed."""
    try:
        yield
    except BrokenPipeError:  # whoever read the progress has gone
        raise
    except OSError as error:
        raise _refused_by_system(error, directory) from error


def _refused_by_system(error: OSError, directory: Path) -> RunFailed:
    what = " ".join((error.strerror or str(error)).split())
    where = f"{error.filename}: " if error.filename else ""
    return RunFailed(f"{where}{what or type(error).__name__}; {Checkpoints(directory, keep=1).last_good()}")


def _finish(session: Session, loop: RunLoop, prepared: AnyPrepared, data: StreamData) -> RunResult:
    """Evaluation and sample of the best checkpoint, summary and report."""
    config, directory = session.config, session.directory
    chosen = model_checkpoint.resolve_checkpoint(directory)
    evaluation: Evaluation | Scored | None = None
    if isinstance(config.model, Seq2SeqConfig):
        _answer(session, data, prepared.tokenizer, chosen)
    elif isinstance(prepared, PreparedExamples):
        evaluation = _score(session, prepared, chosen)
    elif isinstance(config.model, DecoderConfig):
        evaluation = _evaluate(session, prepared, chosen)
    else:
        logger.info("no perplexity and no sample: an encoder does not predict what follows")
    result = result_of(session, loop, evaluation)
    files.write_json(directory / files.SUMMARY, summary_of(session, result, chosen, loop, evaluation))
    if config.callbacks.report:
        write_report(directory)
    logger.info("finished: %s", closing_words(result, evaluation))
    return result


def _score(session: Session, prepared: PreparedExamples, chosen: Path) -> Scored | None:
    """A fine-tuned encoder on all held-out examples, where that is asked for."""
    config, directory = session.config, session.directory
    if not config.evaluation.enabled or not len(prepared.store.records("validation")):
        return None
    model = model_checkpoint.load_model(chosen, device=session.device)
    set_backends(model, config)
    scored = score_checkpoint(model, prepared.store, config, autocast=session.arithmetic.autocast)
    files.write_json(directory / files.EVALUATION, {"checkpoint": chosen.name, **scored.record()})
    return scored


def _evaluate(session: Session, prepared: Prepared, chosen: Path) -> Evaluation | None:
    """A decoder's perplexity, where that is asked for, and its sample."""
    config, directory = session.config, session.directory
    model = model_checkpoint.load_decoder(chosen, device=session.device)
    set_backends(model, config)
    evaluation: Evaluation | None = None
    if config.evaluation.enabled and len(prepared.store.documents("validation")):
        evaluation = evaluate(
            model,
            prepared,
            config.evaluation,
            context=stages_of(config)[-1].config.data.context,
            arithmetic=session.arithmetic,
            device=session.device,
        )
        files.write_json(directory / files.EVALUATION, {"checkpoint": chosen.name, **evaluation.record()})
    sample(model, prepared.tokenizer, config.sample, seed=config.seed, directory=directory)
    return evaluation


def _answer(session: Session, data: StreamData, tokenizer: Tokenizer, chosen: Path) -> None:
    """What an encoder–decoder makes of a held-out source; of a training one where nothing is held out."""
    model = model_checkpoint.load_model(chosen, device=session.device)
    source = data.train if data.validation is None else data.validation
    if not isinstance(model, Seq2Seq):
        raise TypeError(f"a {type(model).__name__} answers no source")
    set_backends(model, session.config)
    answer(model, source, tokenizer, session.config.sample, seed=session.config.seed, directory=session.directory)


# -- building and checking --------------------------------------------------------------------------------------------


def _model(config: RunConfig, origin: Origin, arithmetic: Arithmetic) -> tuple[Model, HeadChange | None]:
    """The model that a stage begins with, and what was changed of its starting weights for that."""
    model = build_from(config.model, seed=config.seed)
    change: HeadChange | None = None
    if origin.checkpoint is not None:
        weights = model_checkpoint.load_weights(origin.checkpoint)
        before = model_checkpoint.load_config(origin.checkpoint)
        if isinstance(model, Encoder) and isinstance(before, EncoderConfig) and has_new_head(before, model.config):
            weights, change = fit_weights(weights, before, model)
        model_checkpoint.check_weights(model, weights, asked_by=str(origin.checkpoint))
        model.load_state_dict(weights)
    model.to(arithmetic.parameters).train()
    set_backends(model, config)
    if config.trainer.compile:
        torch.compiler.reset()  # a process that trains many models would run into torch's limit of recompilations
        compile_blocks(model)
    if config.trainer.activation_checkpointing:
        checkpoint_activations(model)
    return model, change


def _check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens; raise it to at "
            "least that, or use a smaller tokenizer"
        )


class _Stages:
    """Says once when the preparation of data enters a stage that takes time."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, stage: PreparationStage, done: int, total: int | None) -> None:
        if stage not in self._said:
            self._said.add(stage)
            logger.info("data: %s%s", STAGE_WORDS[stage], f" {total / 1e6:.0f} MB" if total else "")


def process_rank(config: RunConfig) -> int:
    """Which of the run's processes this is, as its launcher (torchrun, SLURM, Lightning) says; 0: the main one."""
    if config.trainer.devices * config.trainer.nodes == 1:
        return 0
    for variable in ("RANK", "SLURM_PROCID"):
        if variable in os.environ:
            return int(os.environ[variable])
    return int(os.environ.get("NODE_RANK", 0)) * config.trainer.devices + int(os.environ.get("LOCAL_RANK", 0))
