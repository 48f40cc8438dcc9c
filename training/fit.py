"""The steps of a run under Lightning, from a settled request to the loop that saw them."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from rich.console import Console

from longspan.data.prepare import Prepared
from longspan.model.build import Model

from . import run_directory as files
from .callbacks import Cadence, RunLoop, Share, Throughput
from .checkpointing import Checkpoints
from .datamodule import StreamData
from .errors import RunFailed
from .labelled import mean_row, tally_maker
from .metrics import MetricsFile, MetricsLog, open_trackers
from .module import LanguageModel, NonFinite
from .objectives import Objective, objective_for
from .optim import stage_schedule
from .plan import Peak, Plan, StagePlan
from .precision import Arithmetic
from .progress import ProgressView, choose_style
from .schema import RunConfig, as_request
from .signals import SignalFlag
from .stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a caller of `train` has at hand, and a run would otherwise make by itself.

    prepared   the documents that it trains on; None: what its data say
    objective  what its model learns from them; None: what the model's kind learns
    """

    prepared: Prepared | None = None
    objective: Callable[[Model], Objective[Any]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Session:
    """One session of a run, with everything decided that its starting point and its data decide.

    peak       what MFU is a share of
    state      the training state that the session continues from; None: it is the first
    console    where progress is shown; None: nowhere
    is_main    whether this process writes the run directory
    objective  what the model learns
    """

    config: RunConfig
    directory: Path
    device: torch.device
    arithmetic: Arithmetic
    costs: Plan
    peak: Peak
    state: dict[str, Any] | None
    console: Console | None
    is_main: bool
    objective: Callable[[Model], Objective[Any]] = objective_for

    @property
    def step(self) -> int:
        """Optimizer steps that earlier sessions have done."""
        return int(self.state["step"]) if self.state is not None else 0


def fit(
    session: Session, stage: Stage, model: Model, data: StreamData, checkpoints: Checkpoints, signals: SignalFlag
) -> RunLoop:
    """Takes the steps that are left of a stage, with metrics and progress on the main process.

    Raises RunFailed, or Terminated when a signal stopped the run after saving.
    """
    config = session.config  # the whole run's; what the stage changes is in model, data and costs
    trainer_config = config.trainer
    costs = session.costs.stages[stage.number - 1].plan if session.costs.stages else session.costs
    tenth = max(1, trainer_config.steps // 10)
    row = mean_row(data)
    with ExitStack() as stack:
        view = None
        if session.is_main:
            quiet = Console(quiet=True)
            style = choose_style(config.callbacks.progress, session.console or quiet)
            view = ProgressView(
                style,
                session.console or quiet,
                steps=trainer_config.steps,
                seconds=config.callbacks.progress_seconds,
                stage=stage,
            )
            stack.enter_context(view)
        loop = RunLoop(
            data=data,
            cadence=Cadence(
                steps=stage.end,
                log_every=trainer_config.log_every,
                val_every=trainer_config.val_every or tenth,
                save_every=trainer_config.save_every or tenth,
            ),
            throughput=Throughput(
                tokens_per_step=costs.tokens_per_step if row is None else round(row * config.trainer.global_batch),
                flops_per_token=costs.flops_per_token,
                # Rows of many lengths have no one number of FLOPs a token, and so no MFU.
                peak_flops=session.peak.flops if row is None else None,
                before=_share(session.costs.stages[: stage.number - 1]),
                after=_share(session.costs.stages[stage.number :]),
            ),
            checkpoints=checkpoints,
            signals=signals,
            seed=config.seed,
            view=view,
            resume=session.state,
            # A run that started from weights continues without naming them again.
            advice="resume=auto" if config.checkpoint is None else "resume=auto instead of checkpoint=",
            stage=stage.name,
            tally=tally_maker(data, config),
        )
        if session.is_main:
            # A row that is still owed may be there already, from a session that was killed before it could save.
            kept = session.step - 1 if loop.owes_validation else session.step
            loop.metrics = stack.enter_context(_metrics(config, session.directory, resumed_step=kept))
        if session.state is not None and session.step >= stage.end and not loop.owes_validation:
            loop.adopt(session.state)
            return loop
        module = LanguageModel(
            session.objective(model),
            optimizer=config.optimizer,
            factor=stage_schedule(stage),
            arithmetic=session.arithmetic,
            clip=trainer_config.clip,
            nonfinite=trainer_config.nonfinite,
            shard=trainer_config.strategy == "fsdp",
        )
        stack.enter_context(quiet_lightning())
        trainer = Trainer(
            accelerator="gpu" if session.device.type == "cuda" else "cpu",
            devices=trainer_config.devices,
            num_nodes=trainer_config.nodes,
            strategy=_strategy(config),
            precision="32-true",  # autocast is the module's: it must not cover backward passes
            max_steps=stage.end,
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
            default_root_dir=str(session.directory),
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


def _share(costs: Sequence[StagePlan]) -> Share:
    plans = [each.plan for each in costs]
    return Share(
        steps=sum(plan.steps for plan in plans),
        tokens=sum(plan.tokens for plan in plans),
        flops=sum(plan.flops for plan in plans),
    )


@contextmanager
def _metrics(config: RunConfig, directory: Path, *, resumed_step: int) -> Iterator[MetricsLog]:
    trackers = open_trackers(config.logger, directory, config.name, as_request(config))
    with MetricsLog(MetricsFile(directory / files.METRICS, resumed_step=resumed_step), trackers) as metrics:
        yield metrics


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
def quiet_lightning() -> Iterator[None]:
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
