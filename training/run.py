"""`train`: a run from its config, from the first check to the report."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from rich.console import Console

from longspan.data.prepare import Prepared, Stage, prepare
from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.evaluate import Evaluation
from longspan.evaluation.report import write_report
from longspan.model import checkpoint as model_checkpoint
from longspan.model.config import DecoderConfig
from longspan.model.decoder import Decoder, from_config

from . import run_directory as files
from .callbacks import Cadence, RunLoop, Throughput
from .checkpointing import Checkpoints, best_of, load_state
from .data_settings import STAGE_WORDS, prepare_settings, skipped_files, source_specs
from .datamodule import BatchPlan, PackedData
from .errors import RunFailed, Terminated, UserError
from .finish import evaluate, sample
from .metrics import MetricsFile, MetricsLog, open_trackers
from .module import LanguageModel, NonFinite, checkpoint_activations, compile_blocks
from .optim import build_schedule
from .plan import Peak, Plan, find_peak, plan, plan_for
from .precision import Arithmetic, choose_arithmetic, choose_device
from .progress import ProgressView, choose_style, logging_to
from .schema import RunConfig, as_request
from .signals import SignalFlag
from .start import Origin, check_attention, find_directory, find_origin, set_backends, settle, tokenizer_of

__all__ = ["RunResult", "plan", "train"]

logger = logging.getLogger("longspan.training")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended.

    final_step       optimizer steps done
    validation_loss  of the last validation, nats per loss token; None without held-out documents
    best_step        the step with the lowest one
    bits_per_byte    of the final evaluation; None where it is switched off
    """

    directory: Path
    final_step: int
    validation_loss: float | None
    best_step: int | None
    bits_per_byte: float | None


def train(config: RunConfig) -> RunResult:
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
        build_schedule(config.schedule, config.trainer.steps)
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
            return _train(config, directory, device, arithmetic, console, is_main=is_main)
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
    *,
    is_main: bool,
) -> RunResult:
    origin = find_origin(config, directory)
    config = settle(config, origin, directory)
    check_attention(config, device, arithmetic)
    prepared = prepare(
        prepare_settings(config.data, tokenizer=tokenizer_of(config, origin)), progress=_Stages() if is_main else None
    )
    _check_vocabulary(prepared.tokenizer, config.model)
    world = config.trainer.devices * config.trainer.nodes
    data = PackedData(
        prepared.store,
        config.data,
        BatchPlan(
            global_batch=config.trainer.global_batch,
            micro_batch=config.trainer.micro_batch,
            world=world,
            rank=process_rank(config),
        ),
        seed=config.seed,
        weights=dict(zip(prepared.store.sources, (spec.weight for spec in source_specs(config.data)), strict=True)),
        val_batches=config.trainer.val_batches,
        pin_memory=device.type == "cuda",
    )
    state = load_state(origin.checkpoint) if origin.resumes and origin.checkpoint is not None else None
    if state is not None:
        data.load_state_dict(state["data"])
        if state["step"] > config.trainer.steps:
            raise UserError(
                f"trainer.steps={config.trainer.steps}: the run in {directory} is at step {state['step']} already; "
                f"give more steps, or start another run from its weights (checkpoint={directory}, with its own output)"
            )
    peak = find_peak(device, arithmetic, world=world)
    documents = data.documents_per_sequence() if config.data.document_mask else None
    costs = plan_for(config, device, arithmetic, peak, documents=documents)
    model = _model(config, origin, arithmetic)

    # From here on the request is known to be sound, and the run directory is written.
    step = int(state["step"]) if state is not None else 0
    lineage: dict[str, object] = {}
    with ExitStack() as stack:
        stack.enter_context(_running(directory))
        if is_main:
            lineage = _open_directory(config, directory, origin, prepared, costs, device, state)
        stack.enter_context(logging_to(directory / files.LOG if is_main else None, None))
        logger.info("%s on %s; %s", arithmetic.precision, device, arithmetic.reason)
        for name, words in skipped_files(prepared.store).items():
            logger.warning("data: %s: %s", name, words)
        if peak.flops is not None:
            note = f"; {costs.flops_note}" if costs.flops_note else ""
            logger.info("mfu is the share of %.3g TFLOP/s, %s%s", peak.flops / 1e12, peak.basis, note)
        if step:
            logger.info("continuing at step %d from %s", step, origin.checkpoint)
        checkpoints = Checkpoints(directory, keep=config.trainer.keep, tokenizer=prepared.tokenizer, lineage=lineage)
        loop = _fit(
            config, directory, model, data, checkpoints, costs, peak, arithmetic, device, state, console, is_main
        )
        if not is_main:
            return _result(directory, loop, config.trainer.steps, None)
        return _finish(config, directory, loop, prepared, arithmetic, device, costs)


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


def _fit(
    config: RunConfig,
    directory: Path,
    model: Decoder,
    data: PackedData,
    checkpoints: Checkpoints,
    costs: Plan,
    peak: Peak,
    arithmetic: Arithmetic,
    device: torch.device,
    state: dict | None,
    console: Console | None,
    is_main: bool,
) -> RunLoop:
    """The steps of the run, with metrics and progress on the main process."""
    trainer_config = config.trainer
    steps = trainer_config.steps
    tenth = max(1, steps // 10)
    signals = SignalFlag()
    with ExitStack() as stack:
        view = None
        if is_main:
            quiet = Console(quiet=True)
            style = choose_style(config.callbacks.progress, console or quiet)
            view = ProgressView(style, console or quiet, steps=steps, seconds=config.callbacks.progress_seconds)
            stack.enter_context(view)
        loop = RunLoop(
            data=data,
            cadence=Cadence(
                steps=steps,
                log_every=trainer_config.log_every,
                val_every=trainer_config.val_every or tenth,
                save_every=trainer_config.save_every or tenth,
            ),
            throughput=Throughput(
                tokens_per_step=costs.tokens_per_step, flops_per_token=costs.flops_per_token, peak_flops=peak.flops
            ),
            checkpoints=checkpoints,
            signals=signals,
            seed=config.seed,
            view=view,
            resume=state,
            # A run that started from weights continues without naming them again.
            advice="resume=auto" if config.checkpoint is None else "resume=auto instead of checkpoint=",
        )
        step = int(state["step"]) if state is not None else 0
        if is_main:
            # A row that is still owed may be there already, from a session that was killed before it could save.
            kept = step - 1 if loop.owes_validation else step
            loop.metrics = stack.enter_context(_metrics(config, directory, resumed_step=kept))
        if state is not None and step >= steps and not loop.owes_validation:
            loop.adopt(state)
            return loop
        module = LanguageModel(
            model,
            optimizer=config.optimizer,
            schedule=config.schedule,
            arithmetic=arithmetic,
            clip=trainer_config.clip,
            nonfinite=trainer_config.nonfinite,
            shard=trainer_config.strategy == "fsdp",
        )
        stack.enter_context(_quiet_lightning())
        stack.enter_context(signals.installed())
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=trainer_config.devices,
            num_nodes=trainer_config.nodes,
            strategy=_strategy(config),
            precision="32-true",  # autocast is the module's: it must not cover backward passes
            max_steps=steps,
            max_epochs=-1,
            callbacks=[loop],
            limit_val_batches=0,  # RunLoop validates
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            deterministic=trainer_config.deterministic,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(directory),
        )
        try:
            trainer.fit(module, datamodule=data)
        except NonFinite as error:
            raise RunFailed(f"{error}; {checkpoints.last_good()}") from error
        except SystemExit:
            if signals.received == signal.SIGINT:  # a second one: Lightning has turned it into an exit with code 1
                raise KeyboardInterrupt from None
            raise
    return loop


def _finish(
    config: RunConfig,
    directory: Path,
    loop: RunLoop,
    prepared: Prepared,
    arithmetic: Arithmetic,
    device: torch.device,
    costs: Plan,
) -> RunResult:
    """Evaluation and sample of the best checkpoint, summary and report."""
    chosen = model_checkpoint.resolve_checkpoint(directory)
    model = model_checkpoint.load_model(chosen, device=device)
    set_backends(model, config)
    evaluation: Evaluation | None = None
    if config.evaluation.enabled and len(prepared.store.documents("validation")):
        evaluation = evaluate(
            model,
            prepared,
            config.evaluation,
            context=config.data.context,
            arithmetic=arithmetic,
            device=device,
        )
        files.write_json(directory / files.EVALUATION, {"checkpoint": chosen.name, **evaluation.record()})
    sample(model, prepared.tokenizer, config.sample, seed=config.seed, directory=directory)
    result = _result(directory, loop, config.trainer.steps, evaluation)
    files.write_json(directory / files.SUMMARY, _summary(config, result, chosen, loop, costs, evaluation))
    if config.callbacks.report:
        write_report(directory)
    logger.info("finished: %s", _closing_words(result, evaluation, directory))
    return result


# -- building and checking --------------------------------------------------------------------------------------------


def _model(config: RunConfig, origin: Origin, arithmetic: Arithmetic) -> Decoder:
    model = from_config(config.model, seed=config.seed)
    if origin.checkpoint is not None:
        weights = model_checkpoint.load_weights(origin.checkpoint)
        model_checkpoint.check_weights(model, weights, asked_by=str(origin.checkpoint))
        model.load_state_dict(weights)
    model.to(arithmetic.parameters).train()
    set_backends(model, config)
    if config.trainer.activation_checkpointing:
        checkpoint_activations(model)
    if config.trainer.compile:
        compile_blocks(model)
    return model


def _check_vocabulary(tokenizer: Tokenizer, model: DecoderConfig) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens; raise it to at "
            "least that, or use a smaller tokenizer"
        )


# -- the run directory ------------------------------------------------------------------------------------------------


def _open_directory(
    config: RunConfig,
    directory: Path,
    origin: Origin,
    prepared: Prepared,
    costs: Plan,
    device: torch.device,
    state: dict | None,
) -> dict[str, object]:
    """Clears what a new run replaces, or what a killed one left; writes what is known at the start. The lineage."""
    lineage = files.lineage(seed=config.seed, data=_data_facts(prepared), parent=origin.parent, device=device)
    step = 0
    if state is not None:
        if (directory / files.LINEAGE).is_file():
            lineage = files.read_json(directory / files.LINEAGE)
        step = int(state["step"])
        Checkpoints(directory, keep=config.trainer.keep).sweep(after=step, best=best_of(state))
    else:
        files.clear(directory)
    sessions = lineage.setdefault("sessions", [])
    if isinstance(sessions, list):
        sessions.append({"started": files.now(), "step": step, "command": files.command()})
    # JSON is YAML; no YAML writer is needed for it.
    (directory / files.CONFIG).write_text(json.dumps(as_request(config), indent=2) + "\n")
    files.write_json(directory / files.LINEAGE, lineage)
    files.write_json(directory / files.ACCOUNTING, costs.to_dict())
    return lineage


def _data_facts(prepared: Prepared) -> dict[str, object]:
    store = prepared.store
    facts: dict[str, object] = {
        "store": os.path.abspath(prepared.directory),
        "manifest_sha256": store.manifest["self_sha256"],
        "tokenizer_sha256": store.tokenizer_sha256,
        "vocab_size": store.vocab_size,
    }
    for split, counts in store.counts.items():
        for name, count in counts.items():
            facts[f"{split}: {name}"] = f"{count.documents:,} documents, {count.tokens:,} tokens, {count.bytes:,} bytes"
    return facts | {f"left out: {name}": words for name, words in skipped_files(store).items()}


@contextmanager
def _metrics(config: RunConfig, directory: Path, *, resumed_step: int) -> Iterator[MetricsLog]:
    trackers = open_trackers(config.logger, directory, config.name, as_request(config))
    with MetricsLog(MetricsFile(directory / files.METRICS, resumed_step=resumed_step), trackers) as metrics:
        yield metrics


def _result(directory: Path, loop: RunLoop, steps: int, evaluation: Evaluation | None) -> RunResult:
    return RunResult(
        directory=directory,
        final_step=steps,
        validation_loss=loop.validation_loss,
        best_step=loop.best.step if loop.best is not None else None,
        bits_per_byte=evaluation.result.bits_per_byte if evaluation is not None else None,
    )


def _summary(
    config: RunConfig, result: RunResult, chosen: Path, loop: RunLoop, costs: Plan, evaluation: Evaluation | None
) -> dict[str, object]:
    summary: dict[str, object] = {
        "name": config.name,
        "model": config.model_name or config.model.architecture,
        "parameters": costs.parameters.total,
        "steps": result.final_step,
        "tokens": costs.tokens,
        "seconds": loop.seconds,
        "validation_loss": result.validation_loss,
        "best_step": result.best_step,
        "best_validation_loss": loop.best.validation_loss if loop.best is not None else None,
        "evaluated_checkpoint": chosen.name,
        "finished": files.now(),
    }
    if evaluation is not None:
        summary |= evaluation.headline()
    return summary


def _closing_words(result: RunResult, evaluation: Evaluation | None, directory: Path) -> str:
    words = [f"step {result.final_step}"]
    if result.validation_loss is not None:
        words.append(f"validation loss {result.validation_loss:.3f}")
    if evaluation is not None:
        words.append(evaluation.words())
    return ", ".join(words) + f"; everything is in {directory}"


class _Stages:
    """Says once when the preparation of data enters a stage that takes time."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, stage: Stage, done: int, total: int | None) -> None:
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


# -- Lightning --------------------------------------------------------------------------------------------------------


def _strategy(config: RunConfig) -> Strategy | str:
    world = config.trainer.devices * config.trainer.nodes
    if config.trainer.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    if config.trainer.strategy == "ddp" or world > 1:
        return DDPStrategy(gradient_as_bucket_view=True)
    return "auto"


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silences tips, advertisements and notices ("GPU available: False"), and three warnings that are not for us."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    former = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 makes tree specs in a way that torch 2.13 announces to change.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            # Lightning builds DDP on a side stream, where the gradients' accumulators then stay: one synchronisation.
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match", UserWarning)
            # Sequences come ready-made from a memory map: one process keeps up, and data.workers is the user's choice.
            warnings.filterwarnings("ignore", ".*does not have many workers.*", PossibleUserWarning)
            yield
    finally:
        for each, level in zip(loggers, former, strict=True):
            each.setLevel(level)
